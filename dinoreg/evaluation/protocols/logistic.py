"""P3, logistic regression on the frozen class token: the protocol of the fine-grained suite.

SimCLR B.8.1 and DINOv2 §7.2: no augmentation, short side to the crop's size and a centre crop; C from a path of 45,
chosen on the official validation split or on a seeded tenth of train, refitted on train and validation, scored once.
"""

from __future__ import annotations

import time

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.features.images import CentreCrop, read_rgb
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, bootstrap_statistic, mean_per_class_accuracy
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.softmax_regression import select_and_fit
from dinoreg.runtime.errors import UserError

PICTURE_SIZE = 224  # pixels of an example


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """The headline (top-1 or mean per class, as the task says) and the other of the two."""
    chosen = options.logistic
    if chosen.token not in ("cls", "cls+mean"):
        raise UserError(f"logistic.token={chosen.token}: expected cls or cls+mean")
    started = time.monotonic()
    train, test = labelled(data, "train"), labelled(data, "test")
    val = data.splits.get("val")
    features = {name: class_tokens(encoder, split, context, name, chosen.token) for name, split in data.splits.items()}
    cs = tuple(np.geomspace(chosen.min_c, chosen.max_c, chosen.num_c))
    found = select_and_fit(
        features["train"],
        train.labels,
        train.num_classes,
        cs,
        validation=None if val is None else (features["val"], val.labels),
        join_validation=True,
        validation_share=chosen.validation_share,
        seed=context.seed,
        patience=chosen.patience,
        device=encoder.device,
    )
    predicted = found.model.predict(features["test"]).numpy()
    share = f"a class-balanced {chosen.validation_share:.0%} of train, seed {context.seed}"
    settings = {
        "C": found.C,
        "path": [[each.C, each.accuracy] for each in found.path],
        "edge": found.C in (found.path[0].C, cs[-1]),  # a wider path might score higher
        "token": chosen.token if encoder.pools else "cls",
        "image_size": context.image_size,
        "converged": found.model.converged,
    }
    if context.examples is not None:
        draw_mistakes(test, predicted, data.class_names, context, "logistic")
    return accuracy_rows(
        "logistic regression",
        predicted,
        test.labels,
        task.metric,
        {
            "chosen_on": "the official validation split" if val is not None else share,
            "seeds": (context.seed,),
            "n_train": len(train) + (len(val) if val is not None else 0),
            "n_test": len(test),
            "chance": 1.0 / train.num_classes,
            "settings": settings,
            "variant": data.variant,
            "hours": (time.monotonic() - started) / 3600,
        },
    )


def labelled(data: Data, name: str) -> Labelled:
    split = data.splits.get(name)
    if not isinstance(split, Labelled):
        raise UserError(f"the {name} split is missing, or its images do not have one class each")
    return split


def class_tokens(encoder: Encoder, split: Labelled, context: Context, what: str, token: str = "cls") -> Tensor:
    """Frozen features of a split's centre crops, (n, D) or (n, 2 D), on the CPU and memory-mapped."""
    crop = CentreCrop(context.image_size, context.image_size)
    found = context.features.extract(
        encoder, split.source, crop, (-1,), mean_patch=token == "cls+mean", what=f"features of {what}"
    )
    return found.tensor(range(len(found.slots)))


def accuracy_rows(protocol: str, predicted: np.ndarray, labels: np.ndarray, metric: str, common: dict) -> list[Row]:
    """Top-1 and mean per class with their intervals, the task's metric first."""
    correct = predicted == labels
    values = {"top-1": float(correct.mean()), "mean per class": mean_per_class_accuracy(predicted, labels)}
    if metric not in values:
        raise UserError(f"metric {metric!r}: classification has {' and '.join(values)}")
    intervals = {"top-1": bootstrap_interval(correct), "mean per class": _per_class_interval(correct, labels)}
    order = sorted(values, key=lambda name: name != metric)
    return [
        Row(protocol, name, values[name], *intervals[name], details={"micro and macro": values}, **common)
        for name in order
    ]


def _per_class_interval(correct: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    if correct.all() or not correct.any():
        return bootstrap_interval(correct)
    _, classes = np.unique(labels, return_inverse=True)

    def mean_per_class(weights: np.ndarray) -> float:
        counts = np.bincount(classes, weights=weights)
        right = np.bincount(classes, weights=weights * correct)
        return float((right[counts > 0] / counts[counts > 0]).mean())

    return bootstrap_statistic(len(labels), mean_per_class)


def draw_mistakes(test: Labelled, predicted: np.ndarray, names: object, context: Context, prefix: str) -> None:
    """Pictures of a few test images with what was said of them; half of them mistakes, where there are any."""
    rng = np.random.default_rng(context.seed)
    wrong, right = (rng.permutation(np.flatnonzero((predicted == test.labels) == hit)) for hit in (False, True))
    half = context.num_examples // 2
    picked = [*wrong[: max(half, context.num_examples - len(right))], *right][: context.num_examples]
    known = list(names) if names else []  # type: ignore[call-overload]

    def name(label: int) -> str:
        return str(known[label]) if label < len(known) else str(label)

    assert context.examples is not None
    context.examples.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(picked):
        said, true = int(predicted[index]), int(test.labels[index])
        text = [name(said)] if said == true else [f"said {name(said)}", f"is {name(true)}"]
        caption(read_rgb(test.source, int(index)), text, said == true).save(
            context.examples / f"{prefix}_{number:02d}.png"
        )


def caption(image: Image.Image, text: list[str], good: bool) -> Image.Image:
    """A picture with lines of text below it; a green or a red edge."""
    picture = Image.fromarray(CentreCrop(PICTURE_SIZE, PICTURE_SIZE)(image))
    canvas = Image.new("RGB", (PICTURE_SIZE + 8, PICTURE_SIZE + 8 + 14 * len(text)), (24, 27, 33))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, PICTURE_SIZE + 7, PICTURE_SIZE + 7), fill=(21, 127, 91) if good else (179, 50, 43))
    canvas.paste(picture, (4, 4))
    for number, line in enumerate(text):
        draw.text((6, PICTURE_SIZE + 7 + 14 * number), line[:38], fill=(228, 232, 239))
    return canvas
