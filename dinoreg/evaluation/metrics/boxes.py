"""Boxes that discovery and detection share: their check, areas and overlaps.

A box is x0, y0, x1, y1 in pixels, continuous, ends exclusive. Overlaps of VOC's inclusive coordinates from 1 with the
"+1 pixel" areas of its development kit are the same numbers, of (xmin - 1, ymin - 1, xmax, ymax).
"""

from collections.abc import Sequence

import numpy as np

from dinoreg.evaluation.data import Boxed
from dinoreg.runtime.errors import UserError

MISSING = "the {name} split is missing, or its images have no boxes"


def check_boxes(split: Boxed, name: str) -> None:
    """UserError where the boxes, labels, flags or areas of a split are out of shape or range.

    name  of the split, for messages
    """
    count = len(split)
    columns: dict[str, Sequence[np.ndarray]] = {"boxes": split.boxes, "labels": split.labels}
    columns |= {"difficult flags": split.difficult, "crowd flags": split.crowd}
    if split.area is not None:
        columns["areas"] = split.area
    for what, values in columns.items():
        if len(values) != count:
            raise UserError(f"the {name} split: {count} images came with {what} of {len(values)}")
    for index in range(count):
        boxes, labels = np.asarray(split.boxes[index]), np.asarray(split.labels[index])
        where = split.source.name(index)
        if boxes.shape != (len(labels), 4) or any(len(values[index]) != len(labels) for values in columns.values()):
            raise UserError(f"{where}: boxes of shape {boxes.shape} came with {len(labels)} labels, expected (k, 4)")
        if len(labels) and (labels.min() < 0 or labels.max() >= split.num_classes):
            raise UserError(f"{where}: a box has a label out of range, expected 0..{split.num_classes - 1}")
        if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
            raise UserError(f"{where}: a box is not finite or ends before it starts, expected x0, y0, x1, y1")


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
