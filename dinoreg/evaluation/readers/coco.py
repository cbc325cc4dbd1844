"""COCO's instance annotations: one large JSON file, read element by element into arrays.

A training file has 860,000 objects with polygons in hundreds of megabytes; decoded at once they take gigabytes. Here
one object is decoded at a time and only its box, class, area and crowd flag are kept: memory stays near 100 MB.
Categories have ids with gaps, mapped to 0..K-1 in their order; images are in the order of their ids, as COCO's own
tools have them, those without any object included.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from dinoreg.data.source import Source
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.readers.text import missing
from dinoreg.runtime.errors import UserError

CHUNK = 1 << 22  # characters read at a time
MOST = 1 << 26  # characters of one element
EMPTY_SIDE = 1e-3  # pixels; a box that is narrower holds nothing to learn from


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
        place = int(index) % len(self)
        return self.values[self.starts[place] : self.starts[place + 1]]

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
    boxes        (k, 4) float32 per image: x0, y0, x1, y1
    categories   (K,) names in the order of their ids
    """

    ids: np.ndarray
    files: list[str]
    boxes: Ragged
    labels: Ragged
    crowd: Ragged
    area: Ragged
    categories: list[str]

    def take(self, indices: np.ndarray) -> Instances:
        """Some images, in the order of their places here."""
        return replace(
            self,
            ids=self.ids[indices],
            files=[self.files[index] for index in indices.tolist()],
            boxes=self.boxes.take(indices),
            labels=self.labels.take(indices),
            crowd=self.crowd.take(indices),
            area=self.area.take(indices),
        )

    def without_empty(self) -> Instances:
        """Without boxes that have no width or height; images stay."""
        boxes = self.boxes.values
        kept = ((boxes[:, 2:] - boxes[:, :2]) > EMPTY_SIDE).all(axis=1)
        starts = np.concatenate([[0], np.cumsum(kept)])[self.boxes.starts]

        def part(each: Ragged) -> Ragged:
            return Ragged(each.values[kept], starts)

        return replace(
            self, boxes=part(self.boxes), labels=part(self.labels), crowd=part(self.crowd), area=part(self.area)
        )

    def boxed(self, source: Source) -> Boxed:
        """With the images' files; nothing in COCO is difficult."""
        difficult = Ragged(np.zeros(len(self.boxes.values), dtype=bool), self.boxes.starts)
        return Boxed(source, self.boxes, self.labels, len(self.categories), difficult, self.crowd, self.area)


def read_instances(path: Path, dataset: str, archive: str) -> Instances:
    """Every image and object of an `instances_*.json`; UserError for a file that is not one."""
    found = _Collector(path, dataset)
    handlers = {"images": found.image, "annotations": found.annotation, "categories": found.category}
    try:
        with path.open(encoding="utf-8") as file:
            seen = stream(file, handlers)
    except FileNotFoundError:
        raise missing(path, dataset, archive) from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{dataset}: {path} cannot be read as JSON ({str(error)[:200]})") from None
    for key in handlers:
        if key not in seen:
            raise UserError(f"{dataset}: {path} has no list {key!r}, expected COCO's instances")
    return found.instances()


class _Collector:
    """Numbers of images and objects as they come by; objects may come before their images."""

    def __init__(self, path: Path, dataset: str) -> None:
        self.where = f"{dataset}: {path}"
        self.image_ids = array("q")
        self.files: list[str] = []
        self.owners, self.kinds = array("q"), array("q")
        self.numbers, self.crowds = array("d"), array("b")  # x, y, width, height, area
        self.names: dict[int, str] = {}

    def image(self, element: Any) -> None:
        try:
            number, name = int(element["id"]), element["file_name"]
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{self.where}: an image without id and file_name: {str(element)[:100]}") from None
        if not isinstance(name, str) or not name:
            raise UserError(f"{self.where}: image {number} has the file_name {name!r}")
        self.image_ids.append(number)
        self.files.append(name)

    def annotation(self, element: Any) -> None:
        try:
            owner, kind = int(element["image_id"]), int(element["category_id"])
            x, y, width, height = (float(value) for value in element["bbox"])
            area = float(element.get("area", width * height))
            crowd = int(element.get("iscrowd", 0))
        except (TypeError, KeyError, ValueError, AttributeError):
            told = str(element)[:100]
            raise UserError(f"{self.where}: an object without image_id, category_id and bbox: {told}") from None
        numbers = (x, y, width, height, area)
        if not all(math.isfinite(value) for value in numbers) or width < 0 or height < 0 or crowd not in (0, 1):
            raise UserError(f"{self.where}: an object of image {owner} has the box {numbers[:4]} and iscrowd {crowd}")
        self.owners.append(owner)
        self.kinds.append(kind)
        self.numbers.extend(numbers)
        self.crowds.append(crowd)

    def category(self, element: Any) -> None:
        try:
            self.names[int(element["id"])] = str(element["name"])
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{self.where}: a category without id and name: {str(element)[:100]}") from None

    def instances(self) -> Instances:
        if not self.image_ids or not self.names:
            raise UserError(f"{self.where} has {len(self.image_ids)} images and {len(self.names)} categories")
        ids = np.frombuffer(self.image_ids, dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        twice = np.flatnonzero(np.diff(ids) == 0)
        if len(twice):
            raise UserError(f"{self.where}: image {ids[twice[0]]} is there twice")
        images = self._places(ids, np.array(self.owners, dtype=np.int64), "image")
        labels = self._places(np.array(sorted(self.names)), np.array(self.kinds, dtype=np.int64), "category")
        by_image = np.argsort(images, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(images, minlength=len(ids)))])
        numbers = np.array(self.numbers, dtype=np.float64).reshape(-1, 5)[by_image]
        boxes = numbers[:, :4].copy()
        boxes[:, 2:] += boxes[:, :2]
        return Instances(
            ids,
            [self.files[index] for index in order.tolist()],
            Ragged(boxes.astype(np.float32), starts),
            Ragged(labels[by_image], starts),
            Ragged(np.array(self.crowds, dtype=bool)[by_image], starts),
            Ragged(numbers[:, 4].astype(np.float32), starts),
            [self.names[number] for number in sorted(self.names)],
        )

    def _places(self, known: np.ndarray, asked: np.ndarray, what: str) -> np.ndarray:
        """Where each asked id is among the known, ascending ones."""
        places = np.searchsorted(known, asked).clip(max=len(known) - 1)
        wrong = np.flatnonzero(known[places] != asked)
        if len(wrong):
            raise UserError(f"{self.where}: an object is of {what} {asked[wrong[0]]}, which the file does not list")
        return places.astype(np.int64)


def stream(file: IO[str], handlers: Mapping[str, Callable[[Any], None]]) -> set[str]:
    """Hand the elements of some arrays of a JSON object to their handlers, one by one; the rest is read and dropped.

    returns  the keys of the arrays that were there. Raises ValueError for what is not a JSON object of this form.
    """
    reader = _Reader(file)
    seen: set[str] = set()
    reader.take("{")
    if reader.peek() == "}":
        return seen
    while True:
        key = reader.value()
        reader.take(":")
        if key in handlers and reader.peek() == "[":
            seen.add(key)
            for element in reader.elements():
                handlers[key](element)
        else:
            reader.value()
        if reader.take(",}") == "}":
            return seen


class _Reader:
    """JSON values out of a text file, with no more of it in memory than the value at hand and a chunk."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            raise ValueError(f"found {found or 'the end'!r}, expected one of {expected!r}")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                found, end = self.decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number may go on
                    self.at = end
                    return found
            except json.JSONDecodeError:
                if self.ended:
                    raise ValueError("it ends in the middle of a value, or is not JSON") from None
            if len(self.text) - self.at > MOST:
                raise ValueError(f"a value of more than {MOST:,} characters, or not JSON")
            self._more()

    def elements(self) -> Iterator[Any]:
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def _more(self) -> None:
        chunk = self.file.read(CHUNK)
        self.text, self.at, self.ended = self.text[self.at :] + chunk, 0, not chunk
