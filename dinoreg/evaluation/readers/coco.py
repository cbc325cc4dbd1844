"""COCO's instance annotations: one large JSON file, read into arrays.

A training file has 860,000 objects with polygons in hundreds of megabytes. The polygons are dropped as each object
closes, before the next is read, so that memory holds the text and the numbers, not gigabytes of coordinates.
Categories have ids with gaps, mapped to 0..K-1 in their order; images are in the order of their ids, as COCO's own
tools have them, those without any object included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.data.source import Source
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.readers.files import read_json
from dinoreg.runtime.errors import UserError

EMPTY_SIDE = 1e-3  # pixels; a box that is narrower holds nothing to learn from
LISTS = ("images", "annotations", "categories")
ANNOTATION = np.dtype([("image", "i8"), ("category", "i8"), ("box", "f8", 4), ("area", "f8"), ("crowd", "?")])
OBJECT = np.dtype([("box", "f4", 4), ("label", "i8"), ("crowd", "?"), ("area", "f4")])


class Ragged(Sequence[np.ndarray]):
    """Arrays of different lengths, kept as one.

    values  (m, ...)
    starts  (n + 1,): array i is values[starts[i] : starts[i + 1]]
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.starts = values, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        return self.values[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: np.ndarray) -> Ragged:
        """The arrays of some indices, in their order."""
        lengths = np.diff(self.starts)[indices]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.arange(starts[-1]) - np.repeat(starts[:-1] - self.starts[indices], lengths)
        return Ragged(self.values[rows], starts)


@dataclass(frozen=True)
class Instances:
    """The objects of a file, image by image in the order of the images' ids.

    ids, files   (n,) int64, and the names of the images' files
    objects      (k,) OBJECT per image
    categories   (K,) names in the order of their ids
    """

    ids: np.ndarray
    files: list[str]
    objects: Ragged
    categories: list[str]

    def take(self, indices: np.ndarray) -> Instances:
        """Some images, in the given order."""
        files = [self.files[index] for index in indices.tolist()]
        return replace(self, ids=self.ids[indices], files=files, objects=self.objects.take(indices))

    def without_empty(self) -> Instances:
        """Without boxes that have no width or height; images stay."""
        boxes = self.objects.values["box"]
        filled = ((boxes[:, 2:] - boxes[:, :2]) > EMPTY_SIDE).all(axis=1)
        starts = np.concatenate([[0], np.cumsum(filled)])[self.objects.starts]
        return replace(self, objects=Ragged(self.objects.values[filled], starts))

    def boxed(self, source: Source) -> Boxed:
        """With the images' files; nothing in COCO is difficult."""
        values, starts = self.objects.values, self.objects.starts
        boxes, labels, crowd, area = (
            Ragged(np.ascontiguousarray(values[field]), starts) for field in ("box", "label", "crowd", "area")
        )
        difficult = Ragged(np.zeros(len(values), dtype=bool), starts)
        return Boxed(source, boxes, labels, len(self.categories), difficult, crowd, area)


def read_instances(path: Path, dataset: str, archive: str) -> Instances:
    """Every image and object of an `instances_*.json`; UserError, in one line, for a file that is not one."""
    content = read_json(path, dataset, archive, object_hook=_without_polygons)
    where = f"{dataset}: {path}"
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{where} has no list {key!r}, expected COCO's instances")
    images = [_image(element, where) for element in content["images"]]
    names = dict(_category(element, where) for element in content["categories"])
    if not images or not names:
        raise UserError(f"{where} has {len(images)} images and {len(names)} categories")
    images.sort(key=lambda image: image[0])
    ids = np.array([number for number, _ in images], dtype=np.int64)
    repeated = np.flatnonzero(np.diff(ids) == 0)
    if len(repeated):
        raise UserError(f"{where}: image {ids[repeated[0]]} is there twice")
    rows = np.fromiter((_annotation(element, where) for element in content["annotations"]), dtype=ANNOTATION)
    owners = _places(ids, rows["image"], "image", where)
    objects = np.empty(len(rows), dtype=OBJECT)
    objects["label"] = _places(np.array(sorted(names)), rows["category"], "category", where)
    objects["box"] = rows["box"]
    objects["area"], objects["crowd"] = rows["area"], rows["crowd"]
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(ids)))])
    by_image = Ragged(objects[np.argsort(owners, kind="stable")], starts)
    return Instances(ids, [file for _, file in images], by_image, [names[number] for number in sorted(names)])


def _without_polygons(element: dict[str, Any]) -> dict[str, Any]:
    element.pop("segmentation", None)
    return element


def _image(element: Any, where: str) -> tuple[int, str]:
    try:
        number, name = int(element["id"]), element["file_name"]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{where}: an image without id and file_name: {str(element)[:100]}") from None
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: image {number} has the file_name {name!r}")
    return number, name


def _annotation(element: Any, where: str) -> tuple[int, int, tuple[float, ...], float, int]:
    """An ANNOTATION: image, category, box with exclusive ends (x0, y0, x1, y1), area and crowd flag of an object."""
    try:
        image, category = int(element["image_id"]), int(element["category_id"])
        x, y, width, height = (float(value) for value in element["bbox"])
        area = float(element.get("area", width * height))
        crowd = int(element.get("iscrowd", 0))
    except (TypeError, KeyError, ValueError, AttributeError):
        shown = str(element)[:100]
        raise UserError(f"{where}: an object without image_id, category_id and bbox: {shown}") from None
    box = (x, y, width, height)
    if not all(map(math.isfinite, (*box, area))) or width < 0 or height < 0 or crowd not in (0, 1):
        raise UserError(f"{where}: an object of image {image} has the box {box} and iscrowd {crowd}")
    return image, category, (x, y, x + width, y + height), area, crowd


def _category(element: Any, where: str) -> tuple[int, str]:
    try:
        return int(element["id"]), str(element["name"])
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{where}: a category without id and name: {str(element)[:100]}") from None


def _places(known: np.ndarray, wanted: np.ndarray, what: str, where: str) -> np.ndarray:
    """Where each wanted id is among the known, ascending ones."""
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    wrong = np.flatnonzero(known[places] != wanted)
    if len(wrong):
        raise UserError(f"{where}: an object is of {what} {wanted[wrong[0]]}, which the file does not list")
    return places.astype(np.int64)
