"""How well two label maps agree over a whole dataset: intersections and unions of classes, and what follows from them.

Counts are kept per image and only for the classes that an image has, so that images can be drawn anew for the bootstrap
without a confusion matrix for each. The mIoU is the benchmarks': the counts of all images are added up first,
pixels of 255 do not count, and classes that never occur are left out of the mean.
"""

from collections.abc import Sequence

import numpy as np

from dinoreg.evaluation.data import IGNORED
from dinoreg.evaluation.metrics.bootstrap import nanmean


def count_pixels(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """The counts of one image, (m, 4) int64: class, right, true and predicted pixels of each class that occurs.

    truth, prediction  (H, W) whole numbers: classes in [0, num_classes); truth also 255, which does not count
    """
    counted = truth != IGNORED
    true, predicted = truth[counted], prediction[counted]
    counts = [np.bincount(each, minlength=num_classes) for each in (true[true == predicted], true, predicted)]
    present = np.flatnonzero(counts[1] + counts[2])
    return np.stack([present, *(each[present] for each in counts)], axis=1).astype(np.int64)


class Confusion:
    """Counts of right, true and predicted pixels per image and class.

    images  of each image the counts (m, 4) of `count_pixels`
    """

    def __init__(self, num_classes: int, images: Sequence[np.ndarray]) -> None:
        self.num_classes, self.num_images = num_classes, len(images)
        self._image = np.repeat(np.arange(len(images)), [len(each) for each in images])
        self._class, *self._counts = np.concatenate([np.zeros((0, 4), dtype=np.int64), *images]).T

    def totals(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right, true and predicted pixels of every class, 3 x (num_classes,) float64, exact below 2^53.

        weights  (num_images,) how often each image counts; once by default
        """
        scale = 1 if weights is None else weights[self._image]
        right, true, predicted = (
            np.bincount(self._class, each * scale, minlength=self.num_classes) for each in self._counts
        )
        return right, true, predicted

    def iou(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Intersection over union of every class (num_classes,) in [0, 1]; NaN where neither map has the class.

        weights  (num_images,) how often each image counts; once by default
        """
        right, true, predicted = self.totals(weights)
        return _ratio(right, true + predicted - right)

    def miou(self, weights: np.ndarray | None = None) -> float:
        """Mean of the defined `iou`s in [0, 1]; NaN when there is none.

        weights  (num_images,) how often each image counts; once by default
        """
        return nanmean(self.iou(weights))

    def pixel_accuracy(self) -> float:
        """Share of counted pixels that are right, in [0, 1]; NaN when none counts."""
        right, true, _ = self.totals()
        return float(_ratio(right.sum(), true.sum()))

    def mean_accuracy(self) -> float:
        """Share in [0, 1] of each class's pixels that are right, averaged over the classes of the masks; NaN without
        any."""
        right, true, _ = self.totals()
        return nanmean(_ratio(right, true))

    def constant(self, weights: np.ndarray | None = None) -> tuple[int, float]:
        """The class that most true pixels have, and the mIoU in [0, 1] of predicting it everywhere: a trivial
        baseline.

        weights  (num_images,) how often each image counts; once by default
        """
        _, true, _ = self.totals(weights)
        best = int(true.argmax())
        present = int((true > 0).sum())
        return best, float(true[best] / true.sum() / present) if present else float("nan")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator / denominator)
