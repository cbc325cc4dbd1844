"""Weighted k-NN on frozen class tokens, for every k of the options: DINO's and DINOv2's protocol, without training."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.dense.pictures import strip
from dinoreg.evaluation.features.images import read_picture, shown
from dinoreg.evaluation.metrics.knn_rankme import knn_predict, nearest_neighbours
from dinoreg.evaluation.protocols.classification import (
    GREEN,
    RED,
    accuracy_row,
    class_tokens,
    corruption_rows,
    equal_features,
    framed,
    labelled_folds,
)
from dinoreg.evaluation.protocols.measurement import Fold, Measurement, learnt_from
from dinoreg.evaluation.result import Row

RESIZE = 256 / 224  # short side over crop, as DINOv2's k-NN and linear evaluations have it
GALLERY = 6  # neighbours shown beside a query
SIDE, BLUE = 112, (59, 125, 216)  # pixels of a picture in a strip, edge of the query


def evaluate(measured: Measurement) -> list[Row]:
    """One row for each k, accuracy in [0, 1]; k = 20 first where it is among them: papers do not say which they quote.

    raises  as `labelled_folds` and `extract_features`
    """
    chosen, encoder, context = measured.options.knn, measured.encoder, measured.context
    test, folds = labelled_folds(measured)
    predicted = {k: np.empty(len(test), dtype=np.int64) for k in sorted(chosen.k, key=lambda each: (each != 20, each))}
    if test.among is not None:  # only images of the classes that an answer is chosen from vote
        learnt = (np.flatnonzero(np.isin(fold.train.labels, test.among)) for fold in folds)
        folds = [replace(fold, train=fold.train.chosen(rows)) for fold, rows in zip(folds, learnt)]
    for number, fold in enumerate(folds):
        bank = class_tokens(measured, fold.train.source, "train", resize=RESIZE)
        queries = class_tokens(measured, fold.test.source, "test", resize=RESIZE)
        labels = torch.from_numpy(fold.train.labels)
        votes = knn_predict(bank.to(encoder.device), labels, queries, test.num_classes, chosen.k, chosen.temperature)
        for k, classes in predicted.items():
            classes[fold.rows] = votes[k].argmax(dim=-1).cpu().numpy()
        if number == 0:
            _gallery(bank, queries, fold, context)
    rows: list[Row] = []
    n_train = learnt_from([len(fold.train) for fold in folds])
    equal = equal_features(fold.train.source, bank, "training")
    fewest = min(len(fold.train) for fold in folds)
    for k, classes in predicted.items():
        warnings = (*equal, *([f"knn.k={k}: all of the {fewest:,} training pictures vote"] if k > fewest else ()))
        settings = {"k": k, "temperature": chosen.temperature, "image_size": context.image_size}
        fields = {"variant": f"k = {k}", "n_train": n_train, "settings": settings, "warnings": warnings}
        rows.append(accuracy_row(measured, test, classes, measured.task.metric, tables=not rows, **fields))
        rows += corruption_rows(measured, test, classes, **fields)
    return rows


def _gallery(bank: Tensor, queries: Tensor, fold: Fold[Labelled], context: Context) -> None:
    """Strips of a test image and its nearest training images; green edges for those of its class."""
    if context.examples is None:
        return
    train, test = fold.train, fold.test
    generator = torch.Generator().manual_seed(context.seed)
    picked = torch.randperm(len(test), generator=generator)[: context.num_examples]
    _, nearest = nearest_neighbours(bank, queries[picked], min(GALLERY, len(train)))
    for number, (query, neighbours) in enumerate(zip(picked.tolist(), nearest.tolist())):
        panels = [framed(shown(read_picture(test.source, query)), SIDE, 3, BLUE)]
        for index in neighbours:
            edge = GREEN if train.labels[index] == test.labels[query] else RED
            panels.append(framed(shown(read_picture(train.source, index)), SIDE, 3, edge))
        context.save_example(strip(panels), "knn", number)
