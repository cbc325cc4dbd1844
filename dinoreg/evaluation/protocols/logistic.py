"""Logistic regression on the frozen class token: the protocol of the fine-grained suite.

SimCLR B.8.1 and DINOv2 §7.2: no augmentation, short side to the crop's size and a centre crop; C from a path of 45,
chosen by the task's metric on the official validation split or on a seeded tenth of train, refitted on train and
validation, scored once. Unlike in DINOv2's code, that tenth is drawn class by class, among equal scores the lower
validation loss decides, and each fit starts at the one before and goes on until it has converged.
"""

import numpy as np

from dinoreg.evaluation.protocols.classification import (
    accuracy_rows,
    class_tokens,
    draw_mistakes,
    equal_features,
    fit_classes,
    labelled_folds,
)
from dinoreg.evaluation.protocols.measurement import OFFICIAL, Measurement, learnt_from, per_fold
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.regularisation_path import Path


def evaluate(measured: Measurement) -> list[Row]:
    """The headline (top-1 or mean per class, as the task says) and the other of the two, in [0, 1].

    raises  as `labelled_folds` and `extract_features`
    """
    chosen, encoder, context = measured.options.logistic, measured.encoder, measured.context
    test, folds = labelled_folds(measured)
    pooled = chosen.token == "cls+mean"
    predicted, paths = np.empty(len(test), dtype=np.int64), list[Path]()
    for fold in folds:
        train, val = fold.train, fold.val
        features = class_tokens(measured, train.source, "train", pooled)
        validation = None if val is None else (class_tokens(measured, val.source, "val", pooled), val.labels)
        test_features = class_tokens(measured, fold.test.source, "test", pooled)
        found = fit_classes(features, train, chosen, measured.task.metric, context.seed, encoder.device, validation)
        predicted[fold.rows] = found.model.predict(test_features).numpy()
        paths.append(found)
    draw_mistakes(measured, test, predicted, "logistic")
    ends = [path.C.item() in (path.visited[0].C, chosen.max_c) for path in paths]
    settings = {
        "C": per_fold([path.C.item() for path in paths]),
        "path": per_fold([path.scores for path in paths]),
        "edge": any(ends),  # a wider path might score higher
        "token": chosen.token if encoder.pools else "cls",
        "image_size": context.image_size,
        "converged": all(path.model.converged for path in paths),
    }
    val = folds[0].val
    share = f"a class-balanced {chosen.validation_share:.0%} of train, seed {context.seed}"
    return accuracy_rows(
        measured,
        test,
        predicted,
        chosen_on=share if val is None else OFFICIAL,
        n_train=learnt_from([len(fold.train) for fold in folds]) + (0 if val is None else len(val)),
        settings=settings,
        warnings=equal_features(train.source, features, "training"),
    )
