"""How well two label maps agree over a whole dataset: intersections and unions of classes, and what follows from them.

Counts are kept per image and only for the classes that an image has, so that images can be drawn anew for the bootstrap
without a confusion matrix for each. The mIoU is the benchmarks': the counts of all images are added up first,
pixels of 255 do not count, and classes that never occur are left out of the mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.data import IGNORED
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.runtime.errors import UserError


class Confusion:
    """Counts of right, true and predicted pixels per image and class."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"a confusion needs at least one class, got {num_classes}")
        self.num_classes = num_classes
        self.num_images = 0
        self._rows: list[np.ndarray] = []
        self._table: np.ndarray | None = None

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image.

        truth, prediction  (H, W) whole numbers: classes in [0, num_classes); truth also 255, which does not count

        Raises UserError when the shapes differ or a class is out of range.
        """
        if truth.shape != prediction.shape:
            raise UserError(f"a prediction of {prediction.shape} pixels for a mask of {truth.shape}")
        counted = truth != IGNORED
        true, predicted = truth[counted], prediction[counted]
        for what, values in (("mask", true), ("prediction", predicted)):
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                wrong = int(values.max() if values.max() >= self.num_classes else values.min())
                raise UserError(f"class {wrong} in a {what}, expected 0..{self.num_classes - 1}")
        counts = [np.bincount(each, minlength=self.num_classes) for each in (true[true == predicted], true, predicted)]
        present = np.flatnonzero(counts[1] + counts[2])
        image = np.full(len(present), self.num_images)
        self._rows.append(np.stack([image, present, *(each[present] for each in counts)]).astype(np.int64))
        self.num_images += 1
        self._table = None

    def totals(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right, true and predicted pixels of every class, 3 x (num_classes,) float64, exact below 2^53.

        weights  (num_images,) how often each image counts; once by default
        """
        image, label, *counts = self._packed()
        if weights is not None:
            counts = [each * weights[image] for each in counts]
        right, true, predicted = (np.bincount(label, each, minlength=self.num_classes) for each in counts)
        return right, true, predicted

    def iou(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Intersection over union of every class (num_classes,) in [0, 1]; NaN where neither map has the class."""
        right, true, predicted = self.totals(weights)
        return _ratio(right, true + predicted - right)

    def miou(self, weights: np.ndarray | None = None) -> float:
        """Mean of the defined `iou`s in [0, 1]; NaN when there is none."""
        return _mean(self.iou(weights))

    def pixel_accuracy(self) -> float:
        """Share of counted pixels that are right; NaN when none counts."""
        right, true, _ = self.totals()
        return float(_ratio(right.sum(), true.sum()))

    def mean_accuracy(self) -> float:
        """Share of each true class's pixels that are right, averaged over the classes that the masks have."""
        right, true, _ = self.totals()
        return _mean(_ratio(right, true))

    def interval(self, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95 % percentile bootstrap interval of `miou` over images."""
        return bootstrap_statistic(self.num_images, self.miou, samples=samples, seed=seed)

    def constant(self) -> tuple[int, float]:
        """The class that most true pixels have, and the mIoU of predicting it everywhere: the trivial baseline."""
        _, true, _ = self.totals()
        best = int(true.argmax())
        present = int((true > 0).sum())
        return best, float(true[best] / true.sum() / present) if present else float("nan")

    def state(self) -> dict[str, int | Tensor]:
        """Everything counted so far, as plain values."""
        return {"num_images": self.num_images, "table": torch.from_numpy(self._packed().copy())}

    def load_state(self, state: dict[str, int | Tensor]) -> None:
        self.num_images = int(state["num_images"])
        self._table = torch.as_tensor(state["table"]).numpy()
        self._rows = [self._table]

    def _packed(self) -> np.ndarray:
        """(5, m): image, class, right, true, predicted."""
        if self._table is None:
            self._table = np.concatenate(self._rows, axis=1) if self._rows else np.zeros((5, 0), dtype=np.int64)
            self._rows = [self._table]
        return self._table


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator / denominator)


def _mean(values: np.ndarray) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else float("nan")
