"""P3, logistic regression on the frozen class token: the protocol of the fine-grained suite.

SimCLR B.8.1 and DINOv2 §7.2: no augmentation, short side to the crop's size and a centre crop; C from a path of 45,
chosen on the official validation split or on a seeded tenth of train, refitted on train and validation, scored once.
"""

import numpy as np

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.classification import Classification, class_tokens, draw_mistakes
from dinoreg.evaluation.protocols.measurement import OFFICIAL
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.regularisation_path import select_and_fit
from dinoreg.runtime.errors import UserError


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """The headline (top-1 or mean per class, as the task says) and the other of the two."""
    chosen = options.logistic
    if chosen.token not in ("cls", "cls+mean"):
        raise UserError(f"logistic.token={chosen.token}: expected cls or cls+mean")
    measured = Classification(data, task, context)
    train, test, val = measured.splits()
    features = {
        name: class_tokens(encoder, split.source, context, name, chosen.token)
        for name, split in (("train", train), ("val", val), ("test", test))
        if split is not None
    }
    cs = np.geomspace(chosen.min_c, chosen.max_c, chosen.num_c).tolist()
    found = select_and_fit(
        features["train"],
        train.labels,
        train.num_classes,
        cs,
        validation=None if val is None else (features["val"], val.labels),
        validation_share=chosen.validation_share,
        seed=context.seed,
        patience=chosen.patience,
        device=encoder.device,
    )
    predicted = found.model.predict(features["test"]).numpy()
    draw_mistakes(test, predicted, data.class_names, context, "logistic")
    share = f"a class-balanced {chosen.validation_share:.0%} of train, seed {context.seed}"
    settings = {
        "C": found.C,
        "path": [[each.C, each.accuracy] for each in found.path],
        "edge": found.C in (found.path[0].C, cs[-1]),  # a wider path might score higher
        "token": chosen.token if encoder.pools else "cls",
        "image_size": context.image_size,
        "converged": found.model.converged,
    }
    return measured.accuracy_rows(
        predicted,
        chosen_on=share if val is None else OFFICIAL,
        n_train=len(train) + (0 if val is None else len(val)),
        settings=settings,
    )
