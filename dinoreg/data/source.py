"""What a source of images is: images by index, undecoded."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoreg.data.decode import MAX_PIXELS, MIN_SIDE, EncodedImage
from dinoreg.data.value_range import BadImage, ValueRange

LOOKED_AT = 16  # images that tell whether a data set has more than eight bits


class Group(NamedTuple):
    """A run of consecutive indices that is shuffled on its own and drawn with a share of `weight`."""

    start: int
    length: int
    weight: float


class Source(ABC):
    """Images by index, undecoded. Safe to read from many threads.

    value_range  of the whole data set, by which its pixels are scaled; None: by the type of each file
    """

    value_range: ValueRange | None = None

    @property
    def passed_over(self) -> dict[str, int]:
        """Files that lie between the images and are none, by ending."""
        return {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """A file's bytes, or pixels (H, W, C) uint8. Raises BadImage when the file cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person calls this image: its path, or "scenes:17"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images or their order do."""

    def stamp(self) -> str:
        """As `fingerprint`, and it also changes when images are replaced under their old names."""
        return self.fingerprint()

    def image(self, index: int, in_channels: int = 3, max_pixels: int = MAX_PIXELS) -> EncodedImage:
        """Image `index`, its size known; raises BadImage when it cannot be used for training."""
        return EncodedImage(self.read(index), in_channels, max_pixels, MIN_SIDE, self.value_range)

    def pixels(self, index: int, in_channels: int = 3) -> Tensor:
        """Image `index` as everything but the loader sees it: (C, H, W) on the scale of bytes.

        uint8, or float32 in 0..255 where the data set has more than eight bits; raises BadImage when unreadable
        """
        return EncodedImage(self.read(index), in_channels, value_range=self.value_range, min_side=1).pixels()

    def is_deep(self, in_channels: int = 3) -> bool:
        """Whether its pixels need more than eight bits, by its range and by some images from all over it."""
        if self.value_range is not None:
            return True
        for index in np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(np.int64)):
            try:
                if self.pixels(int(index), in_channels).dtype != torch.uint8:
                    return True
            except BadImage:
                continue
        return False

    def groups(self) -> list[Group]:
        """How the indices are drawn; one group unless the source is a weighted mixture."""
        return [Group(0, len(self), 1.0)]
