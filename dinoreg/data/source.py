"""What a source of images is: images by index, undecoded."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """A run of consecutive indices that is shuffled on its own and drawn with a share of `weight`."""

    start: int
    length: int
    weight: float


class Source(ABC):
    """Images by index, undecoded. Safe to read from many threads."""

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

    def groups(self) -> list[Group]:
        """How the indices are drawn; one group unless the source is a weighted mixture."""
        return [Group(0, len(self), 1.0)]
