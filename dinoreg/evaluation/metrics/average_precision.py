"""Average precision as PASCAL VOC defines it, with 11 points (until 2009) or all (since 2010), of any ranked list.

Equal scores are one step of the curve, so that the order of the images never matters. The eleven recall levels are
compared as whole numbers, 10 · found >= k · all: in floating point 3 of 10 would miss the level 0.3.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

COCO_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Curve:
    """Precision and recall along a ranking.

    true, false  (m,) number right and number wrong up to each rank, cumulative, not descending
    positives    number of all that could be found
    """

    true: np.ndarray
    false: np.ndarray
    positives: float

    @cached_property
    def precision(self) -> np.ndarray:
        """(m,) the share in [0, 1] that is right up to each rank, 0 where nothing has been counted yet."""
        return self.true / np.maximum(self.true + self.false, 1e-300)

    @cached_property
    def envelope(self) -> np.ndarray:
        """(m,) the best precision at this recall or a larger one, in [0, 1]."""
        return np.maximum.accumulate(self.precision[::-1])[::-1]

    def average(self, points: str = "all") -> float:
        """Average precision in [0, 1]; NaN where there is nothing to find.

        points  "11": mean of the envelope at recall 0, 0.1, ..., 1 (VOC 2007); "101": at 0, 0.01, ..., 1 (COCO);
                "all": area under the envelope (VOC since 2010); "trapezoid": mean of the precision before and behind
                each step (Oxford Buildings)
        """
        if self.positives <= 0:
            return float("nan")
        if points in ("11", "101"):
            if points == "11":
                reached = np.searchsorted(10 * self.true, np.arange(11) * self.positives, side="left")
            else:
                reached = np.searchsorted(self.true / self.positives, COCO_RECALLS, side="left")
            return float(np.append(self.envelope, 0.0)[reached].mean())
        if points == "trapezoid":
            before = self.true - np.diff(self.true, prepend=0.0)
            ranked = before + self.false
            earlier = np.divide(before, ranked, out=np.ones_like(before), where=ranked > 0)
            return float((np.diff(self.true, prepend=0.0) * (earlier + self.precision)).sum() / 2 / self.positives)
        return float((np.diff(self.true, prepend=0.0) * self.envelope).sum() / self.positives)


class Ranking:
    """Images sorted once by falling score, for the curves of many bootstrap draws.

    scores   (n,) real, not NaN
    labels   (n,) true where the class is present
    ignored  (n,) true where the image counts neither way, or None
    """

    def __init__(self, scores: ArrayLike, labels: ArrayLike, ignored: ArrayLike | None = None) -> None:
        values, present = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
        left_out = np.zeros(len(values), dtype=bool) if ignored is None else np.asarray(ignored, dtype=bool)
        counted = np.flatnonzero(~left_out)
        self.order = counted[np.argsort(-values[counted], kind="stable")]
        self.present = present[self.order]
        ranked = values[self.order]
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1) if len(ranked) else np.empty(0, np.int64)
        # The end of each run of equal scores. Over runs without positives recall is constant and precision only falls,
        # so they do not change the average and are left out.
        found = np.cumsum(self.present)[last]
        kept = np.diff(found, prepend=0) > 0
        self.steps, self.found = last[kept], found[kept]

    def curve(self, weights: ArrayLike | None = None) -> Curve:
        """The curve of the ranking, with one point for each score at which recall grows.

        weights  (n,) how often each image is counted; None: once
        """
        count = np.ones(len(self.order)) if weights is None else np.asarray(weights, dtype=np.float64)[self.order]
        every = np.cumsum(count)[self.steps]
        positives = np.cumsum(count[self.present])
        true = positives[self.found - 1]
        return Curve(true, every - true, float(positives[-1]) if len(positives) else 0.0)
