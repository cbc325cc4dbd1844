"""What a dataset hands to a protocol: one class per kind of ground truth. Pixels are read when they are asked for.

Every image comes through a `Source` (bytes or pixels by index, with a name for messages); labels are checked here.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinoreg.data.source import Source
from dinoreg.runtime.errors import UserError

IGNORED = 255  # in a segmentation mask: void, counts neither way


class Split:
    """Images of any kind of ground truth; what a check and a cache need to know of it."""

    source: Source

    def maps(self) -> dict[str, Callable[[int], np.ndarray]]:
        """{what it is called: index -> (H, W, ...)} of ground truth that lies over the pixels."""
        return {}

    def image(self, index: int) -> int:
        """Where image `index` of the split lies in the source."""
        return index

    def arrays(self) -> Iterator[np.ndarray]:
        """Ground truth that is held in memory."""
        yield from ()

    def truth_stamp(self) -> str:
        """16 hexadecimal digits that change when the ground truth does."""
        digest = hashlib.sha256(str(getattr(self, "stamp", "")).encode())
        for each in self.arrays():
            digest.update(np.ascontiguousarray(each).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Labelled(Split):
    """Images with one class each.

    labels  (n,) int64 in [0, num_classes)
    """

    source: Source
    labels: np.ndarray
    num_classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        _match(self.source, self.labels)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            raise UserError(
                f"{self.source.name(int(outside[0]))}: label {self.labels[outside[0]]} is out of range, "
                f"expected 0..{self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def arrays(self) -> Iterator[np.ndarray]:
        yield self.labels


@dataclass(frozen=True)
class MultiLabelled(Split):
    """Images with a set of classes each.

    labels  (n, num_classes) int8: 1 present, 0 absent, -1 not to be counted for that class
    """

    source: Source
    labels: np.ndarray
    num_classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int8))
        _match(self.source, self.labels)
        if self.labels.shape[1:] != (self.num_classes,) or not np.isin(self.labels, (-1, 0, 1)).all():
            raise UserError(f"multi-label targets must be (n, {self.num_classes}) of 1, 0 and -1")

    def __len__(self) -> int:
        return len(self.labels)

    def arrays(self) -> Iterator[np.ndarray]:
        yield self.labels


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

    def __len__(self) -> int:
        return len(self.source)

    def maps(self) -> dict[str, Callable[[int], np.ndarray]]:
        return {"mask": self.mask}


@dataclass(frozen=True)
class DepthMaps(Split):
    """Images with a depth for every pixel.

    depth  index -> (H, W) float32 metres of the image's own size, 0 where unknown
    """

    source: Source
    depth: Callable[[int], np.ndarray]
    stamp: str = ""  # of the depth maps: changes when they do

    def __len__(self) -> int:
        return len(self.source)

    def maps(self) -> dict[str, Callable[[int], np.ndarray]]:
        return {"depth map": self.depth}


@dataclass(frozen=True)
class Boxed(Split):
    """Images with boxes.

    boxes      per image (k, 4) float32: x0, y0, x1, y1 in pixels, continuous (ends exclusive)
    labels     per image (k,) int64 in [0, num_classes)
    difficult  per image (k,) bool: not counted either way by VOC's AP
    crowd      per image (k,) bool: a region of many, counted by neither discovery nor training
    area       per image (k,) float32, for COCO's size classes; the box's own where None
    """

    source: Source
    boxes: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    num_classes: int
    difficult: Sequence[np.ndarray]
    crowd: Sequence[np.ndarray]
    area: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def arrays(self) -> Iterator[np.ndarray]:
        for kind in (self.boxes, self.labels, self.difficult, self.crowd):
            yield from kind


@dataclass(frozen=True)
class FlowPairs(Split):
    """Pairs of consecutive frames with the flow from the first to the second.

    first, second  (n,) indices into `source`
    scenes         (n,) name of each pair's scene
    flow           pair -> (H, W, 2) float32 pixels, (u, v) = (right, down)
    valid          pair -> (H, W) bool: ground truth to be trusted
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

    def __len__(self) -> int:
        return len(self.first)

    def maps(self) -> dict[str, Callable[[int], np.ndarray]]:
        return {"flow": self.flow, "validity mask": self.valid, "occlusion mask": self.occluded}

    def image(self, index: int) -> int:
        return int(self.first[index])


@dataclass(frozen=True)
class Data:
    """The splits of a dataset, by name, and what a protocol may want to know besides.

    splits       "train", "val", "test"; "val" only where one is official; a protocol says which it needs
    class_names  (num_classes,) or empty
    variant      in words, where a choice was made: "banner cropped", "split 1", "seed 0, 30 per class"
    extra        anything else that one protocol needs of one dataset
    """

    splits: dict[str, Any]
    class_names: Sequence[str] = ()
    variant: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def _match(source: Source, labels: np.ndarray) -> None:
    if len(source) != len(labels):
        raise UserError(f"{len(source)} images came with {len(labels)} labels")
    if not len(source):
        raise UserError("a split has no images")
