"""Average precision of boxes: PASCAL VOC's (AP50, 11-point or all-points) and COCO's (AP[.5:.95], crowds).

Which detection finds which object is settled once, image by image (`voc_matches`, `coco_matches`); then the average
precision of any weighting of the images needs cumulative sums only (`average_precision`): the bootstrap is cheap.
VOC: the development kit's rules, where an object's best detection counts once and difficult objects count neither way.
COCO: the rules of pycocotools' COCOeval, where a crowd takes any number of detections and none of them counts.
`score` gives the figures that a detector is quoted by: VOC's AP50 under both readings of the curve; COCO's AP, AP50.

A box is x0, y0, x1, y1 in pixels, continuous, ends exclusive. Overlaps of VOC's inclusive coordinates from 1 with the
"+1 pixel" areas of its development kit are the same numbers, of (xmin - 1, ymin - 1, xmax, ymax).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.metrics.average_precision import Ranking
from dinoreg.evaluation.metrics.bootstrap import nanmean

VOC_OVERLAP = 0.5
COCO_OVERLAPS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100  # of an image and class that COCO looks at
# Rule of a dataset: the metrics that it is quoted by.
RULES = {"voc2007": ("AP50",), "voc2012": ("AP50",), "coco": ("AP", "AP50")}
NAMES = {"11": "11-point", "all": "all-points"}
MISSING = "the {name} split is missing, or its images have no boxes"


def overlaps(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union of all pairs.

    a, b     (n, 4) and (m, 4) x0, y0, x1, y1 in pixels
    crowd    (m,) bool: where true, COCO's rule for regions: the intersection over the area of `a`
    returns  (n, m) float64 in [0, 1]; 0 where the divisor is
    """
    a, b = np.asarray(a, dtype=np.float64).reshape(-1, 4), np.asarray(b, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    area_a, area_b = areas(a)[:, None], areas(b)[None]
    union = area_a + area_b - shared
    if crowd is not None:
        union = np.where(np.asarray(crowd, dtype=bool)[None], area_a, union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def areas(boxes: np.ndarray) -> np.ndarray:
    """The areas (n,) float64, in square pixels, of boxes (n, 4)."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@dataclass(frozen=True)
class Detections:
    """Every detection of a split.

    image   (n,) int64 number of the image
    boxes   (n, 4) x0, y0, x1, y1 in pixels of the original image
    labels  (n,) int64 class
    scores  (n,) confidence, of which only the order counts
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, images: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Detections:
        """The detections of images in a row: boxes (k, 4) in pixels, labels (k,) and scores (k,) of each, on the
        CPU."""
        boxes, labels, scores = (torch.cat([each[part] for each in images]).numpy() for part in range(3))
        return cls(np.repeat(np.arange(len(images)), [len(each[1]) for each in images]), boxes, labels, scores)


@dataclass(frozen=True)
class Truth:
    """Every object of a split, laid out like `Detections`.

    ignored  (m,) bool: counted neither way
    crowd    (m,) bool: a region of many, by COCO's rule
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray
    num_images: int
    num_classes: int

    @classmethod
    def of(cls, split: Boxed) -> Truth:
        """The objects of a split's images; difficult ones are ignored."""
        counts = [len(labels) for labels in split.labels]

        def joined(values: Sequence[np.ndarray], kind: type, *width: int) -> np.ndarray:
            return np.concatenate([np.zeros((0, *width)), *values]).astype(kind)

        crowd = joined(split.crowd, np.bool_)
        return cls(
            image=np.repeat(np.arange(len(counts)), counts),
            boxes=joined(split.boxes, np.float64, 4),
            labels=joined(split.labels, np.int64),
            ignored=joined(split.difficult, np.bool_) | crowd,
            crowd=crowd,
            num_images=len(counts),
            num_classes=split.num_classes,
        )


class ClassMatches(NamedTuple):
    """One class's detections, surest first, under T overlap thresholds.

    image      (m,) number of the image
    rankings   (T) of the detections: right where it finds an object, ignored where it counts neither way
    positives  (num_images,) int64 objects that are to be found
    """

    image: np.ndarray
    rankings: list[Ranking]
    positives: np.ndarray


def voc_matches(found: Detections, truth: Truth) -> list[ClassMatches]:
    """For every class, which detections count as right by VOC's development kit, at an overlap of 0.5 (T = 1).

    A detection belongs to the object that it overlaps most, if that is by a half or more. Of several that belong to
    one object that of the highest score is right and the others are wrong; those of a difficult object do not count.
    """
    hit, counted = np.zeros((1, len(found.image)), dtype=bool), np.ones((1, len(found.image)), dtype=bool)
    for detections, objects in _pairs(found, truth):
        shared = overlaps(found.boxes[detections], truth.boxes[objects])
        nearest = shared.argmax(axis=1)
        near = shared[np.arange(len(detections)), nearest] >= VOC_OVERLAP
        difficult = truth.ignored[objects][nearest]
        counted[0, detections[near & difficult]] = False
        rows = np.flatnonzero(near & ~difficult)
        _, surest = np.unique(nearest[rows], return_index=True)
        hit[0, detections[rows[surest]]] = True
    return _by_class(found, truth, hit, counted, ~truth.ignored)


def coco_matches(found: Detections, truth: Truth) -> list[ClassMatches]:
    """For every class, which detections count as right by COCO's rules (T = 10 overlaps).

    By falling score, a detection takes the free object that it overlaps most (of equals the last), one that counts
    before one that does not. Difficult objects and crowds do not count, nor do detections that take them. Of an image
    and class only the MAX_DETECTIONS of the highest scores take part.
    """
    groups = [each[:MAX_DETECTIONS] for each in _groups(found.labels, found.image, found.scores).values()]
    rows = np.sort(np.concatenate(groups)) if groups else np.zeros(0, dtype=np.int64)
    found = Detections(found.image[rows], found.boxes[rows], found.labels[rows], found.scores[rows])
    hit = np.zeros((len(COCO_OVERLAPS), len(rows)), dtype=bool)
    counted = np.ones_like(hit)
    for places, objects in _pairs(found, truth):
        shared = overlaps(found.boxes[places], truth.boxes[objects], truth.crowd[objects])
        ignored = truth.ignored[objects]
        matched = _match(shared, ignored, truth.crowd[objects])  # (T, d) number of the object or -1
        hit[:, places] = (matched >= 0) & ~ignored[matched]
        counted[:, places] = (matched < 0) | ~ignored[matched]
    return _by_class(found, truth, hit, counted, ~truth.ignored)


def average_precision(matches: Iterable[ClassMatches], points: str, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision (T, K) in [0, 1] of every threshold and class; NaN for a class without objects.

    points   where the precision is read: at the recalls of "11" (VOC 2007) or "101" points (COCO), or at "all" (the
             area under the curve, VOC since 2010). The precision at a recall is the best reached there or further on.
    weights  (num_images,) how often each image is in the set; once where None
    """
    found = []
    for image, rankings, positives in matches:
        total = float(positives.sum() if weights is None else positives @ weights)
        often = None if weights is None else weights[image]
        found.append([replace(ranking.curve(often), positives=total).average(points) for ranking in rankings])
    return np.array(found).T


def _match(shared: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The object that each detection (surest first) is matched to under every threshold, or -1.

    shared (d, m), ignored (m,), crowd (m,) -> (T, d) int64
    """
    # All thresholds at once: COCOeval's loops over them and over sizes take seven times as long (6.3 s for 1,000 images
    # of 80 classes with 100 detections each, 0.9 s here), which is minutes on COCO's 5,000 with baselines and rates.
    least = np.minimum(COCO_OVERLAPS, 1 - 1e-10)
    count, num_objects = shared.shape
    match, free = np.full((len(least), count), -1), np.ones((len(least), num_objects), dtype=bool)
    for number in np.flatnonzero(shared.max(axis=1) >= least.min()):
        fits = free & (shared[number] >= least[:, None])  # (T, m)
        preferred = fits & ~ignored
        fits = np.where(preferred.any(axis=1, keepdims=True), preferred, fits)
        last = num_objects - 1 - np.where(fits, shared[number], -1.0)[:, ::-1].argmax(axis=1)  # (T,)
        found = fits.any(axis=1)
        match[found, number] = last[found]
        taken = found & ~crowd[last]
        free[taken, last[taken]] = False
    return match


def _groups(labels: np.ndarray, image: np.ndarray, scores: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """{(class, image): places of what is of both}, of the highest score first, earlier first among equals."""
    order = np.lexsort((-scores, image, labels))
    same = (np.diff(labels[order]) == 0) & (np.diff(image[order]) == 0)
    groups = np.split(order, np.flatnonzero(~same) + 1) if len(order) else []
    return {(int(labels[each[0]]), int(image[each[0]])): each for each in groups}


def _pairs(found: Detections, truth: Truth) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of the detections and of the objects of every image and class that has both."""
    objects = _groups(truth.labels, truth.image, np.zeros(len(truth.labels)))
    detections = _groups(found.labels, found.image, found.scores)
    return ((each, objects[key]) for key, each in detections.items() if key in objects)


def _by_class(
    found: Detections, truth: Truth, hit: np.ndarray, counted: np.ndarray, positive: np.ndarray
) -> list[ClassMatches]:
    """The flags (T, n) class by class, each from the surest detection of all images on."""
    order = np.lexsort((found.image, -found.scores, found.labels))
    bounds = np.searchsorted(found.labels[order], np.arange(truth.num_classes + 1))
    matches = []
    for label, (start, end) in enumerate(pairwise(bounds)):
        rows = order[start:end]
        rankings = [
            Ranking(-np.arange(len(rows)), right, left_out) for right, left_out in zip(hit[:, rows], ~counted[:, rows])
        ]
        positives = np.bincount(truth.image[positive & (truth.labels == label)], minlength=truth.num_images)
        matches.append(ClassMatches(found.image[rows], rankings, positives))
    return matches


@dataclass(frozen=True)
class Figure:
    """One figure of a detector, in [0, 1].

    per_class  {class: average precision} of the classes that occur
    resampled  weights (num_images,) -> the figure on a set with each image that often
    """

    metric: str
    variant: str
    value: float
    per_class: dict[str, float]
    resampled: Callable[[np.ndarray], float]


def score(found: Detections, truth: Truth, rule: str, names: Sequence[str] = ()) -> list[Figure]:
    """A detector's figures by a rule of RULES; shares in [0, 1], averaged over the classes that occur.

    rule     "coco": AP[.5:.95] and AP50 at 101 recalls; else VOC's AP50, all-points and 11-point
    names    of the K classes, for `per_class`
    returns  first the one that the rule quotes: AP, all-points for "voc2012", else 11-point
    """

    def figure(metric: str, variant: str, matches: list[ClassMatches], points: str) -> Figure:
        precision = average_precision(matches, points)
        per_class = {name: nanmean(values) for name, values in zip(names, precision.T) if np.isfinite(values).any()}

        def resampled(weights: np.ndarray) -> float:
            return nanmean(average_precision(matches, points, weights))

        return Figure(metric, variant, nanmean(precision), per_class, resampled)

    if rule != "coco":
        matches = voc_matches(found, truth)
        order = ("all", "11") if rule == "voc2012" else ("11", "all")
        return [figure("AP50", NAMES[points], matches, points) for points in order]
    every = coco_matches(found, truth)
    half = [each._replace(rankings=each.rankings[:1]) for each in every]
    return [figure("AP", "", every, "101"), figure("AP50", "", half, "101")]
