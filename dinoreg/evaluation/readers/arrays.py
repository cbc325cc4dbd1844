"""Sources that are not files as they lie on disk: images of one size in memory, and files with rows cut off.

CIFAR comes as arrays; Aircraft's files carry a banner that is no part of the picture.
"""

import hashlib
import io
from functools import cached_property

import numpy as np
from PIL import Image

from dinoreg.data.decode import BadImage
from dinoreg.data.source import ChosenSource, Source
from dinoreg.runtime.errors import one_line


class ArraySource(Source):
    """Images of one size held in memory.

    pixels  (n, H, W, 3) uint8 in any memory layout, so that a view costs no copy; ValueError for any other
    title   where they come from: image 17 is called "TITLE:17"
    """

    def __init__(self, pixels: np.ndarray, title: str) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels must be (n, H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        self.pixels, self.title = pixels, title

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8, contiguous."""
        return np.ascontiguousarray(self.pixels[index])

    def name(self, index: int) -> str:
        """ "TITLE:index"."""
        return f"{self.title}:{index}"

    def fingerprint(self) -> str:
        """16 hexadecimal digits over the shape and every pixel."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        for image in self.pixels:
            digest.update(image.tobytes())
        return digest.hexdigest()[:16]


class BottomCutSource(ChosenSource):
    """Another source's image files, decoded to RGB, without their lowest `rows` rows of pixels."""

    def __init__(self, source: Source, rows: int) -> None:
        super().__init__(source, np.arange(len(source)))
        self.rows = rows

    def read(self, index: int) -> np.ndarray:
        """(H - rows, W, 3) uint8; BadImage for what cannot be decoded or has no more than `rows` rows."""
        data = self.source.read(index)
        try:
            image = Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
            width, height = image.size
            if height <= self.rows:
                raise BadImage(f"{height} rows of pixels, of which the lowest {self.rows} are to be cut off")
            return np.asarray(image.convert("RGB").crop((0, 0, width, height - self.rows)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadImage(one_line(error)) from error

    def _with_indices(self, text: str) -> str:
        """A fingerprint or stamp of the source, with what is done to its images."""
        return super()._with_indices(f"{text} without the lowest {self.rows} rows")
