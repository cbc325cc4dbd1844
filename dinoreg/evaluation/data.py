"""The data that protocols receive: one class per kind of ground truth. Pixels are read on access.

Every image comes through a `Source` (bytes or pixels by index, with a name for messages); labels are checked here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dinoreg.data.source import ChosenSource, Source
from dinoreg.runtime.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

IGNORED = 255  # in a segmentation mask: void, counts neither way


class Split:
    """Images of any kind of ground truth; what checks and caches need to know of them.

    HELD    fields of the ground truth that is held in memory
    PIXELS  (field, what it is called, its numbers a pixel) of the ground truth that lies over the pixels: index ->
            (H, W), with several numbers (H, W, numbers)
    """

    source: Source
    HELD: ClassVar[tuple[str, ...]] = ()
    PIXELS: ClassVar[tuple[tuple[str, str, int], ...]] = ()

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> int:
        """Index in the source of image `index` of the split."""
        return index

    def truth_stamp(self) -> str:
        """16 hexadecimal digits that change when the ground truth does."""
        digest = hashlib.sha256(str(getattr(self, "stamp", "")).encode())
        for name in self.HELD:
            values = getattr(self, name)
            for each in [values] if isinstance(values, np.ndarray) else values:
                digest.update(np.ascontiguousarray(each).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _ImageLabels(Split):
    """Images with one label or several each, some of which may be learnt from and others tested.

    labels    (n,) or (n, num_classes); UserError for other than one row an image, and for none
    pictures  (n,) the same number for copies of one picture, which are never on two sides; None: there are none
    """

    source: Source
    labels: np.ndarray
    num_classes: int
    pictures: np.ndarray | None = None
    HELD = ("labels",)

    def chosen(self, rows: np.ndarray) -> Self:
        """Some of the images, as one of several choices from them; rows (m,) are their places."""
        pictures = None if self.pictures is None else self.pictures[rows]
        source = ChosenSource(self.source, rows, one_of_many=True)
        return replace(self, source=source, labels=self.labels[rows], pictures=pictures)

    def _take_labels(self, kind: type) -> None:
        """The labels as an array of a type; UserError unless there is one for each image, and any."""
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=kind))
        if len(self.source) != len(self.labels):
            raise UserError(f"{len(self.source)} images came with {len(self.labels)} labels")
        if not len(self.labels):
            raise UserError("a split has no images")


@dataclass(frozen=True)
class Labelled(_ImageLabels):
    """Images with one class each.

    labels  (n,) int64 in [0, num_classes); UserError for any other, for other than one an image, and for none
    among   (m,) the classes that answers are chosen from, ascending; None: all
    """

    among: np.ndarray | None = None

    @property
    def answers(self) -> np.ndarray:
        """(m,) the classes that an answer is chosen from."""
        return np.arange(self.num_classes) if self.among is None else self.among

    def __post_init__(self) -> None:
        self._take_labels(np.int64)
        for index in np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))[:1].tolist():
            wrong = f"label {self.labels[index]} is out of range, expected 0..{self.num_classes - 1}"
            raise UserError(f"{self.source.name(index)}: {wrong}")


@dataclass(frozen=True)
class MultiLabelled(_ImageLabels):
    """Images with a set of classes each.

    labels  (n, num_classes) int8: 1 present, 0 absent, -1 not to be counted for that class; UserError for any other,
            and where there is not one row an image
    """

    def __post_init__(self) -> None:
        self._take_labels(np.int8)
        if self.labels.shape[1:] != (self.num_classes,) or not np.isin(self.labels, (-1, 0, 1)).all():
            raise UserError(f"multi-label targets must be (n, {self.num_classes}) of 1, 0 and -1")


@dataclass(frozen=True)
class Segmented(Split):
    """Images with a class for every pixel.

    mask  index -> (H, W) uint8 of the image's own size: class in [0, num_classes), or 255 where ignored;
          UserError naming the file when it is missing, of another size or out of range
    """

    source: Source
    mask: Callable[[int], np.ndarray]
    num_classes: int
    stamp: str = ""  # of the masks: changes when they do
    PIXELS = (("mask", "mask", 1),)


@dataclass(frozen=True)
class DepthMaps(Split):
    """Images with a depth for every pixel.

    depth  index -> (H, W) float32 metres of the image's own size, 0 where unknown
    """

    source: Source
    depth: Callable[[int], np.ndarray]
    stamp: str = ""  # of the depth maps: changes when they do
    PIXELS = (("depth", "depth map", 1),)


@dataclass(frozen=True)
class Boxed(Split):
    """Images with boxes.

    boxes      per image (k, 4) float32: x0, y0, x1, y1 in pixels, continuous (ends exclusive)
    labels     per image (k,) int64 in [0, num_classes)
    difficult  per image (k,) bool: not counted either way by VOC's AP
    crowd      per image (k,) bool: a region of many, counted by neither discovery nor training

    UserError where one is out of shape or range.
    """

    source: Source
    boxes: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    num_classes: int
    difficult: Sequence[np.ndarray]
    crowd: Sequence[np.ndarray]
    HELD = ("boxes", "labels", "difficult", "crowd")

    def __post_init__(self) -> None:
        columns: dict[str, Sequence[np.ndarray]] = {name: getattr(self, name) for name in self.HELD}
        for what, values in columns.items():
            if len(values) != len(self):
                raise UserError(f"{len(self)} images came with {what} of {len(values)}")
        for index, (boxes, labels) in enumerate(zip(map(np.asarray, self.boxes), map(np.asarray, self.labels))):
            if boxes.shape != (len(labels), 4) or any(len(values[index]) != len(labels) for values in columns.values()):
                wrong = f"boxes of shape {boxes.shape} came with {len(labels)} labels, expected (k, 4)"
            elif len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
                wrong = f"a box has a label out of range, expected 0..{self.num_classes - 1}"
            elif not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
                wrong = "a box is not finite or ends before it starts, expected x0, y0, x1, y1"
            else:
                continue
            raise UserError(f"{self.source.name(index)}: {wrong}")

    def chosen(self, rows: np.ndarray) -> Self:
        """Some of the images; rows (m,) are their places."""
        parts: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in self.HELD}
        return replace(self, source=ChosenSource(self.source, rows), **parts)


@dataclass(frozen=True)
class Searched(Split):
    """Images of a database, or queries that search it.

    relevance  (queries, images of the database) int8: 1 easy, 2 hard to find, 0 another, -1 counted neither way; of the
               database (0, 0)
    """

    source: Source
    relevance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int8))
    HELD = ("relevance",)


@dataclass(frozen=True)
class FlowPairs(Split):
    """Pairs of consecutive frames with the flow from the first to the second.

    first, second  (n,) indices into `source`
    scenes         (n,) name of each pair's scene
    flow           pair -> (H, W, 2) float32 pixels, (u, v) = (right, down)
    valid          pair -> (H, W) bool: where the ground truth is reliable
    occluded       pair -> (H, W) bool: not visible in the second frame
    """

    source: Source
    first: np.ndarray
    second: np.ndarray
    scenes: Sequence[str]
    flow: Callable[[int], np.ndarray]
    valid: Callable[[int], np.ndarray]
    occluded: Callable[[int], np.ndarray]
    stamp: str = ""  # of the flow files: changes when they do
    PIXELS = (("flow", "flow", 2), ("valid", "validity mask", 1), ("occluded", "occlusion mask", 1))

    def __len__(self) -> int:
        return len(self.first)

    def image(self, index: int) -> int:
        """Index in the source of the first frame of pair `index`."""
        return int(self.first[index])


@dataclass(frozen=True)
class Data:
    """The splits of a dataset, by name, and further facts that protocols need.

    splits       "train", "val", "test"; "val" only where one is official; a protocol says which it needs
    class_names  (num_classes,) or empty
    variant      in words, where a choice was made: "banner cropped", "split 1", "seed 0, 30 per class"
    extra        anything else that one protocol needs of one dataset
    folds        (n,) int64, or None. With folds, "test" holds all images and is the only split: those of each fold are
                 tested after learning from those of the others
    options      (side of the encoder's crops in pixels) -> options of the protocol that follow from the data, such as
                 the largest depth; the user's own win
    """

    splits: dict[str, Any]
    class_names: Sequence[str] = ()
    variant: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    folds: np.ndarray | None = None
    options: Callable[[int], Mapping[str, Any]] = lambda _side: {}

    def names(self, num_classes: int) -> list[str]:
        """A name for each class; its number where it has none."""
        return [str(name) for name in [*self.class_names, *range(len(self.class_names), num_classes)]]
