"""COCO's instance annotations: one large JSON file, read into arrays.

A training file has 860,000 objects with polygons in hundreds of megabytes. The polygons are dropped as each object
closes, before the next is read, so that memory holds the text and the numbers, not gigabytes of coordinates.
Categories have ids with gaps, mapped to 0..K-1 in their order; images are in the order of their ids, as COCO's own
tools have them, those without any object included.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dinoreg.data.source import Source
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.readers.files import read_json, require_distinct
from dinoreg.runtime.errors import UserError

T = TypeVar("T")

EMPTY_SIDE = 1e-3  # pixels; a box that is narrower holds nothing to learn from
OBJECT = np.dtype([("image", "i8"), ("label", "i8"), ("box", "f4", 4), ("crowd", "?")])


@dataclass(frozen=True)
class Instances:
    """The objects of a file, image by image in the order of the images' ids.

    ids         (n,) int64 of the images
    files       (n,) names of the images' files
    objects     per image (k,) OBJECT: boxes in pixels, labels in the order of ids
    categories  (K,) names in the order of their ids
    """

    ids: np.ndarray
    files: list[str]
    objects: list[np.ndarray]
    categories: list[str]

    def boxed(self, source: Source, images: np.ndarray | None = None) -> Boxed:
        """The images as a split; nothing in COCO is difficult.

        source  the files of these images
        images  (m,) indices of some images, in the order wanted; None: all of them
        """
        objects = self.objects if images is None else [self.objects[index] for index in images]
        # Copies, because PyTorch takes no views of fields; `ascontiguousarray` leaves one of a single object as it is.
        boxes, labels, crowd = ([each[field].copy() for each in objects] for field in ("box", "label", "crowd"))
        difficult = [np.zeros_like(each) for each in crowd]
        return Boxed(source, boxes, labels, len(self.categories), difficult, crowd)


def read_instances(path: Path, dataset: str, archive: str, empty: bool = True) -> Instances:
    """Every image and object of an `instances_*.json`; UserError, in one line, for a file that is not one.

    empty  whether boxes without width or height are objects too; their images stay in any case
    """
    images, annotations, elements = read_lists(path, ("images", "annotations", "categories"), dataset, archive)
    where = f"{dataset}: {path}"
    files = sorted(converted(images, image_file, "an image without id and file_name", where))
    categories = dict(converted(elements, category_name, "a category without id and name", where))
    if not files or not categories:
        raise UserError(f"{where} has {len(files)} images and {len(categories)} categories")
    ids = np.array([number for number, _ in files], dtype=np.int64)
    require_distinct(ids.tolist(), "image", where)
    lacking = "an object without image_id, category_id and bbox"
    objects = np.fromiter(converted(annotations, partial(_annotation, where), lacking, where), dtype=OBJECT)
    owners = positions(ids, objects["image"], "an object is of image", where)
    objects["label"] = positions(np.array(sorted(categories)), objects["label"], "an object is of category", where)
    if not empty:
        filled = ((objects["box"][:, 2:] - objects["box"][:, :2]) > EMPTY_SIDE).all(axis=1)
        objects, owners = objects[filled], owners[filled]
    ends = np.cumsum(np.bincount(owners, minlength=len(ids)))
    by_image = np.split(objects[np.argsort(owners, kind="stable")], ends[:-1])
    names = [categories[number] for number in sorted(categories)]
    return Instances(ids, [file for _, file in files], by_image, names)


def read_lists(path: Path, names: Sequence[str], dataset: str, archive: str) -> list[list[Any]]:
    """The lists of these names in a file of COCO's form, without polygons; UserError for a file without one of them."""
    content = read_json(path, dataset, archive, object_hook=_without_polygons)
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{dataset}: {path} has no list {name!r}, expected one of each of {', '.join(names)}")
    return [content[name] for name in names]


def _without_polygons(element: dict[str, Any]) -> dict[str, Any]:
    element.pop("segmentation", None)
    return element


def converted(elements: list[Any], convert: Callable[[Any], T], lacking: str, where: str) -> Iterator[T]:
    """`convert` of every element; UserError with `where`, `lacking` and the element where that fails."""
    for element in elements:
        try:
            yield convert(element)
        except UserError:
            raise
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError(f"{where}: {lacking}: {str(element)[:100]}") from None


def image_file(element: Any) -> tuple[int, str]:
    """Id and file name of an element of "images"; TypeError, KeyError or ValueError for one without them."""
    return int(element["id"]), os.fspath(element["file_name"])  # a TypeError for what is no text


def category_name(element: Any) -> tuple[int, str]:
    """Id and name of an element of "categories"; TypeError, KeyError or ValueError for one without them."""
    return int(element["id"]), str(element["name"])


def _annotation(where: str, element: Any) -> tuple[int, int, tuple[float, ...], int]:
    """An OBJECT by the file's ids: image, category, box with exclusive ends (x0, y0, x1, y1), and crowd flag."""
    x, y, width, height = box = tuple(float(value) for value in element["bbox"])
    image, crowd = int(element["image_id"]), element.get("iscrowd", 0)
    if not all(map(math.isfinite, box)) or width < 0 or height < 0 or crowd not in (0, 1):
        raise UserError(f"{where}: an object of image {image} has the box {box} and iscrowd {crowd}")
    return image, int(element["category_id"]), (x, y, x + width, y + height), crowd


def positions(known: np.ndarray, wanted: np.ndarray | list[int], what: str, where: str) -> np.ndarray:
    """Index of each wanted id (m,) among the known ones (n,), which ascend: (m,) int64.

    what, where  what has the id and the file, for the UserError on an unknown id
    """
    wanted = np.asarray(wanted)
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    wrong = np.flatnonzero(known[places] != wanted)
    if len(wrong):
        raise UserError(f"{where}: {what} {wanted[wrong[0]]}, which the file does not list")
    return places.astype(np.int64)
