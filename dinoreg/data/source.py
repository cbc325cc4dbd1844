"""Where images come from: files, the embedded scenes, and several or some of these, all with one interface.

A source hands out undecoded images by index. It knows nothing of order, crops or batches.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dinoreg.data.decode import MAX_PIXELS, MIN_SIDE, EncodedImage, pillow_rgb, read_bands
from dinoreg.data.folder_index import PathBlock
from dinoreg.data.value_range import BadImage, RawPixels, ValueRange
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.places import is_url, joined, read_place, state

if TYPE_CHECKING:
    from torch import Tensor

STAMPED_FILES, STAMPED_URLS = 50_000, 64  # whose sizes and times are looked at when features are cached
LEVELS = 512  # weights of single images that are told apart
SCENES_CACHE_BYTES = 1 << 30  # rendered scenes kept in memory at most


class Group(NamedTuple):
    """A run of consecutive indices that is shuffled on its own and drawn with a share of `weight`.

    parts  None: all are shuffled together. (first index of each part, ascending; how many of them are held in memory):
           images of a part are read together, so that as many parts as are held are shuffled together, then the next
    """

    start: int
    length: int
    weight: float
    parts: tuple[np.ndarray, int] | None = None


class Source(ABC):
    """Images by index, undecoded. Safe to read from many threads.

    value_range  of the whole data set, by which its pixels are scaled; None: by the type of each file
    as_trained   whether evaluations see the pixels that training would, as they do of one's own data; the images of
                 published benchmarks they see as the published numbers did
    in_channels  of the encoder that an evaluation reads the images for
    whole        whether a benchmark's images are seen whole: as published they are crops already
    """

    value_range: ValueRange | None = None
    as_trained = False
    in_channels = 3
    whole = False

    @property
    def passed_over(self) -> dict[str, int]:
        """Files that lie between the images and are none, by ending."""
        return {}

    @abstractmethod
    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray | RawPixels:
        """A file's bytes, or pixels, (H, W, C) uint8 or raw. Raises BadImage when the file cannot be read.

        Every kind of source defines this or `read_within`.
        """
        return self.read_within(index, MAX_PIXELS)

    def read_within(self, index: int, max_pixels: int) -> bytes | np.ndarray | RawPixels:
        """As `read`; BadImage also for more pixels, where they are decoded here already."""
        return self.read(index)

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person calls this image: its path, or "scenes:17"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images or their order do."""

    def stamp(self) -> str:
        """As `fingerprint`, and it also changes when images are replaced under their old names."""
        return self.fingerprint()

    def image(
        self, index: int, in_channels: int = 3, max_pixels: int = MAX_PIXELS, by_pillow: bool = False
    ) -> EncodedImage:
        """Image `index`, its size known; raises BadImage when it cannot be used for training.

        by_pillow  read as `pillow_rgb` does
        """
        data = self.read_within(index, max_pixels)
        if by_pillow and isinstance(data, bytes):
            data = np.asarray(pillow_rgb(data, max_pixels))
        return EncodedImage(data, in_channels, max_pixels, MIN_SIDE, self.value_range)

    def decode(self, index: int, in_channels: int = 3) -> Tensor:
        """Image `index` as everything but the loader sees it: (C, H, W) on the scale of bytes.

        uint8, or float32 in 0..255 where the data set has more than eight bits; raises BadImage when unreadable
        """
        return EncodedImage(self.read(index), in_channels, value_range=self.value_range, min_side=1).pixels()

    def shards(self) -> list[tuple[str, int]]:
        """(name, images) of the files that the images lie in, in order, where these hold several."""
        return []

    def groups(self) -> list[Group]:
        """How the indices are drawn; one group unless the source is a weighted mixture."""
        return [Group(0, len(self), 1.0)]


class PathSource(Source):
    """Files below one root folder.

    bands  files of one channel that make a picture; those of one follow each other in `paths`
    """

    def __init__(self, root: str, paths: PathBlock, bands: int = 1) -> None:
        self.root, self.paths, self.bands = root, paths, bands

    @property
    def passed_over(self) -> dict[str, int]:
        """Files below the root that are no images, by ending."""
        return self.paths.passed_over

    def __len__(self) -> int:
        return len(self.paths) // self.bands

    def read_within(self, index: int, max_pixels: int) -> bytes | RawPixels:
        """The bytes of a file, or the pixels of several; BadImage when one cannot be read or these have more pixels."""
        files: list[tuple[str, bytes]] = []
        for place in range(index * self.bands, (index + 1) * self.bands):
            try:
                files.append((self.paths[place], read_place(joined(self.root, self.paths[place]))))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                raise BadImage(reason if self.bands == 1 else f"{self.paths[place]}: {reason}") from error
        return files[0][1] if self.bands == 1 else read_bands(files, max_pixels)

    def name(self, index: int) -> str:
        """The path of the picture's file, or of its first, below the root, with the root."""
        return joined(self.root, self.paths[index * self.bands])

    def fingerprint(self) -> str:
        """Over the paths below the root, not their contents."""
        return hashlib.sha256(self.paths.block).hexdigest()[:16]

    def stamp(self) -> str:
        """By sizes and times of change; of more than STAMPED_FILES files, of that many at equal distances."""
        most = STAMPED_URLS if is_url(self.root) else STAMPED_FILES
        places = np.linspace(0, len(self.paths) - 1, min(len(self.paths), most)).astype(np.int64)
        return stamp_of_files(self.paths.block, (joined(self.root, self.paths[int(place)]) for place in places))


def stamp_of_files(start: bytes, paths: Iterable[str]) -> str:
    """16 hexadecimal digits that change with `start` and with the sizes and times of change of files."""
    digest = hashlib.sha256(start)
    for path in paths:
        try:
            digest.update(" ".join(map(str, (*state(path), ""))).encode())
        except OSError:
            digest.update(b"missing ")
    return digest.hexdigest()[:16]


def _render(index: int, size: int, seed: int) -> np.ndarray:
    from dinoreg.scenes.render import render_image  # a tenth of a start that only looks for files

    return render_image(index, size, seed)


class ScenesSource(Source):
    """The embedded procedural pictures first..first+count, rendered when read, kept in memory as far as they fit."""

    def __init__(self, count: int = 20_000, size: int = 64, seed: int = 0, first: int = 0) -> None:
        self.count, self.size, self.seed, self.first = count, size, seed, first
        self._render = lru_cache(SCENES_CACHE_BYTES // (size * size * 3))(partial(_render, size=size, seed=seed))

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        """The rendered scene, (size, size, 3) uint8; not to be written to."""
        return self._render(self.first + index)

    def name(self, index: int) -> str:
        """`scenes:NUMBER`."""
        return f"scenes:{self.first + index}"

    def fingerprint(self) -> str:
        """Over count, size, seed and first number."""
        text = f"scenes count={self.count} size={self.size} seed={self.seed} first={self.first}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class JoinedSource(Source):
    """Several sources in a row; with weights, a mixture in which each has its share of the draws."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.parts, self.weights = list(parts), weights
        self._starts = np.cumsum([0] + [len(part) for part in parts])

    @property
    def passed_over(self) -> dict[str, int]:
        """The sums over all parts."""
        return dict(sum((Counter(part.passed_over) for part in self.parts), Counter()))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def read_within(self, index: int, max_pixels: int) -> bytes | np.ndarray | RawPixels:
        """What the part reads; BadImage when it cannot."""
        part, local = self._locate(index)
        return part.read_within(local, max_pixels)

    def name(self, index: int) -> str:
        """The name that the image has in its part."""
        part, local = self._locate(index)
        return part.name(local)

    def fingerprint(self) -> str:
        """Over the parts' fingerprints and the weights."""
        parts = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr((parts, self.weights)).encode()).hexdigest()[:16]

    def groups(self) -> list[Group]:
        """Those of each part with its share of the draws; one for all where nothing weighs them."""
        inner = [part.groups() for part in self.parts]
        if self.weights is None and all(len(groups) == 1 and groups[0].parts is None for groups in inner):
            return super().groups()
        shares = self.weights or [len(part) for part in self.parts]
        return [
            group._replace(start=int(start) + group.start, weight=share / sum(shares) * group.weight)
            for start, share, groups in zip(self._starts, shares, inner)
            for group in groups
        ]


def _of_the_other(name: str) -> Any:
    """An attribute that a choice of images shares with the source that they are chosen from."""
    return property(lambda self: getattr(self.source, name), lambda self, value: setattr(self.source, name, value))


class ChosenSource(Source):
    """Some images of another source, in the order of `indices`, read as that one is.

    one_of_many  whether other choices of the same images are measured as well, so that features are extracted of all
                 images of the other source
    """

    value_range, as_trained, in_channels = map(_of_the_other, ("value_range", "as_trained", "in_channels"))

    def __init__(self, source: Source, indices: np.ndarray, one_of_many: bool = False) -> None:
        self.source, self.indices, self.one_of_many = source, np.asarray(indices, dtype=np.int64), one_of_many

    def __len__(self) -> int:
        return len(self.indices)

    def read_within(self, index: int, max_pixels: int) -> bytes | np.ndarray | RawPixels:
        """What the other source reads; BadImage when it cannot."""
        return self.source.read_within(int(self.indices[index]), max_pixels)

    def name(self, index: int) -> str:
        """The name that the image has in the other source."""
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Over the other source's fingerprint and the indices."""
        return self._with_indices(self.source.fingerprint())

    def stamp(self) -> str:
        """Over the other source's stamp and the indices."""
        return self._with_indices(self.source.stamp())

    def _with_indices(self, text: str) -> str:
        return hashlib.sha256(text.encode() + self.indices.tobytes()).hexdigest()[:16]


class WeightedSource(ChosenSource):
    """Images of another source that are drawn by weights of their own, in the order of these.

    Images of one weight are a group of the sampler's. More than LEVELS weights are rounded to as many, at equal ratios.
    """

    def __init__(self, source: Source, weights: np.ndarray) -> None:
        """weights  (n,) float64, at least 0 and finite: images of weight 0 are left out; UserError where all are"""
        known = np.unique(weights[weights > 0])
        if not len(known):
            raise UserError("data: every image of the list has the weight 0")
        if len(known) > LEVELS:
            known = np.geomspace(known[0], known[-1], LEVELS)
            weights = np.where(weights > 0, known[np.searchsorted(np.sqrt(known[1:] * known[:-1]), weights)], 0)
        order = np.argsort(weights, kind="stable")
        super().__init__(source, order[weights[order] > 0])
        self._levels, self._starts = np.unique(weights[self.indices], return_index=True)

    def _with_indices(self, text: str) -> str:
        return super()._with_indices(f"{text} {self._levels.tolist()} {self._starts.tolist()}")

    def groups(self) -> list[Group]:
        """A group of each weight, whose share is that of its images together."""
        lengths = np.diff(self._starts, append=len(self))
        shares = self._levels * lengths / (self._levels @ lengths)
        return [
            Group(int(start), int(length), float(share)) for start, length, share in zip(self._starts, lengths, shares)
        ]
