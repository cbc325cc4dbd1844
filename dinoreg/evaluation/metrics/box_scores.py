"""The figures that a detector is quoted by: VOC's AP50 under both readings of the curve; COCO's AP, AP50, by size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dinoreg.evaluation.metrics.bootstrap import nanmean
from dinoreg.evaluation.metrics.box_ap import (
    ClassMatches,
    Detections,
    Truth,
    average_precision,
    coco_matches,
    voc_matches,
)

# Rule of a dataset: the metrics that it is quoted by.
RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"voc2007": ("AP50",), "voc2012": ("AP50",), "coco": ("AP", "AP50")}
)
NAMES = {"11": "11-point", "all": "all-points"}


@dataclass(frozen=True)
class Figure:
    """One number of a detector.

    per_class  {class: average precision} of the classes that occur
    resampled  weights (num_images,) -> the number on a set with each image that often
    """

    metric: str
    variant: str
    value: float
    per_class: dict[str, float]
    resampled: Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Scores:
    """The figures of a detector, the one that the rule puts first in front."""

    figures: tuple[Figure, ...]
    details: dict[str, float]

    def of(self, metric: str) -> float:
        """The first figure of a metric."""
        return next(figure.value for figure in self.figures if figure.metric == metric)


def score(found: Detections, truth: Truth, rule: str, names: Sequence[str] = ()) -> Scores:
    """A detector's figures by a rule of RULES; shares in [0, 1], averaged over the classes that occur.

    names  of the K classes, for `per_class`, which holds those that have one
    """
    if rule == "coco":
        by_size = coco_matches(found, truth)
        every = by_size["all"]
        precision = average_precision(every, "101")
        details = {
            f"AP {size}": nanmean(average_precision(by_size[size], "101")) for size in ("small", "medium", "large")
        }
        details["AP75"] = nanmean(precision[5:6])
        half = [matches.at(0) for matches in every]
        figures = (_figure("AP", "", every, "101", names), _figure("AP50", "", half, "101", names))
        return Scores(figures, details)
    matches = voc_matches(found, truth)
    order = ("all", "11") if rule == "voc2012" else ("11", "all")
    return Scores(tuple(_figure("AP50", NAMES[points], matches, points, names) for points in order), {})


def whole_images(sizes: np.ndarray, often: np.ndarray) -> Detections:
    """What needs no model: on every image the whole of it as each class, surer the more often a class occurs.

    sizes  (n, 2) height and width of the images        often  (K,) objects of each class
    """
    count, classes = len(sizes), len(often)
    boxes = np.zeros((count * classes, 4))
    boxes[:, 2:] = sizes[:, ::-1].repeat(classes, axis=0)
    scores = np.tile(often / max(often.sum(), 1), count)
    return Detections(np.arange(count).repeat(classes), boxes, np.tile(np.arange(classes), count), scores)


def _figure(metric: str, variant: str, matches: list[ClassMatches], points: str, names: Sequence[str]) -> Figure:
    precision = average_precision(matches, points)
    per_class = {name: nanmean(values) for name, values in zip(names, precision.T) if np.isfinite(values).any()}

    def resampled(weights: np.ndarray) -> float:
        return nanmean(average_precision(matches, points, weights))

    return Figure(metric, variant, nanmean(precision), per_class, resampled)
