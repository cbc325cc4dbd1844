"""Files with a number for every pixel: masks and depth maps."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinoreg.data.decode import ORIENTATION_TAG
from dinoreg.evaluation.data import IGNORED
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.regular_files import load_array, open_regular

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)
GREY = 0  # colour type of a PNG
NOT_DEPTH = "disparity is not depth, focal length x baseline / disparity is"


class PixelFile(NamedTuple):
    """The numbers of a picture file, unchanged.

    values        (H, W) or (H, W, C) as the file has them (of a palette: the indices)
    mode, format  in Pillow's words
    turn          the file's own EXIF orientation; 0 where a TIFF's was applied while it was read
    """

    values: np.ndarray
    mode: str
    format: str
    turn: int = 1


def read_pixels(path: Path, mode: str | None = None) -> PixelFile:
    """The numbers of a picture file; raises one of UNREADABLE.

    mode  that Pillow converts it to first; None: as it is
    """
    with open_regular(path) as file, Image.open(file) as opened:
        turn = 1
        with suppress(Exception):  # broken metadata does not make the pixels bad
            turn = int(opened.getexif().get(ORIENTATION_TAG, 1))
        values, bits = np.asarray(opened.convert(mode) if mode else opened), 0 if mode else _grey_bits(path)
        if bits in (2, 4):  # Pillow stretches these to 0..255
            values = values // (255 // (2**bits - 1))
        return PixelFile(values, opened.mode, str(opened.format), 0 if opened.format == "TIFF" and turn != 1 else turn)


def read_mask(path: Path, classes: range, void: int, dataset: str) -> np.ndarray:
    """A mask (H, W) uint8: a class from 0, or IGNORED (255).

    classes  the values of the classes 0..K-1 in the file (of a palette: the indices), K <= 255
    void     the value that is ignored
    dataset  in front of every message

    Raises UserError naming the file when it is missing, unreadable or coloured, and for any other value.
    """
    where, first, last = f"{dataset}: {path}", classes[0], classes[-1]
    with reworded(f"{where} cannot be read as a mask", *UNREADABLE):
        values, mode, _, _ = read_pixels(path)
    if values.ndim != 2:
        raise UserError(f"{where} is a picture in colour ({mode}), expected a palette or grey PNG of class numbers")
    wrong = values[(values != void) & ((values < first) | (values > last))]
    if len(wrong):
        expected = f"{void}..{last}" if void == first - 1 else f"{first}..{last} or {void}"
        raise UserError(f"{where} has the value {wrong[0]}, expected {expected}")
    return np.where(values == void, IGNORED, values - first).astype(np.uint8)


def read_depth(path: Path) -> PixelFile:
    """The numbers (H, W) of a depth file as they are; UserError for one that cannot be read or has no single number for
    each pixel."""
    with reworded(f"{path}: cannot be read as a depth map", *UNREADABLE):
        numbers = path.suffix.lower() == ".npy"
        pixels = PixelFile(load_array(path), "", "npy") if numbers else read_pixels(path)
    values = pixels.values
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiu" or pixels.mode == "P":
        what = f"a picture of mode {pixels.mode}" if pixels.mode else f"{values.dtype} {values.shape}"
        raise UserError(f"{path}: holds {what}, expected a depth (height, width) for each pixel; {NOT_DEPTH}")
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if known.min(initial=0) < 0:
        raise UserError(f"{path}: holds a depth of {known.min():g}, expected 0 (unknown) or more")
    return pixels._replace(values=values)


def read_millimetres(path: Path) -> np.ndarray:
    """A depth map (H, W) float32 in metres, 0 where unknown, of a file in millimetres; UserError for one of bytes."""
    values = read_depth(path).values
    if values.dtype.itemsize == 1:
        raise UserError(f"{path}: holds bytes, expected a depth map of 16 bits, in millimetres")
    return values.astype(np.float32) / np.float32(1000)


def _grey_bits(path: Path) -> int:
    """Bits of a grey PNG's pixel as the file has them; 0 for any other kind of picture."""
    with open(path, "rb") as file:
        head = file.read(26)  # signature, length, "IHDR", width, height, bits, colour type
    return head[24] if len(head) == 26 and head.startswith(b"\x89PNG") and head[25] == GREY else 0
