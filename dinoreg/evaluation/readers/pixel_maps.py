"""Files with a number for every pixel: label maps, which must have the size of their image, and depth maps."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinoreg.data.decode import ORIENTATION_TAG
from dinoreg.evaluation.data import IGNORED
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.regular_files import open_regular

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)
GREY = 0  # colour type of a PNG
DEPTH_MODES = ("I;16", "I;16B", "I;16L", "I")  # Pillow's names
MILLIMETRES = 1000.0  # in a metre


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


def read_label_map(path: Path, image: Path, dataset: str = "") -> np.ndarray:
    """A label map of integers (H, W), uint8 or int32, with the values in the file (of a palette: the indices).

    image    the picture it belongs to, whose header alone is read: both must have the same size
    dataset  in front of every message

    Raises UserError naming the file when it is missing, unreadable, coloured, or of another size than its image.
    """
    where = f"{dataset}: {path}" if dataset else f"{path}:"
    if not path.exists():
        raise UserError(f"{where} is missing; it is the mask of {image.name}")
    with reworded(f"{where} cannot be read as a mask", *UNREADABLE):
        values, mode, _, _ = read_pixels(path)
    if values.ndim != 2:
        raise UserError(f"{where} is a picture in colour ({mode}), expected a palette or grey PNG of class numbers")
    require_size(where, values, image, dataset)
    return values.astype(np.uint8 if values.dtype.itemsize == 1 else np.int32, copy=False)


def read_mask(path: Path, image: Path, classes: range, void: int = IGNORED, dataset: str = "") -> np.ndarray:
    """A mask (H, W) uint8 of its image's size: a class from 0, or IGNORED (255).

    image    the picture it belongs to
    classes  the values of the classes 0..K-1 in the file, K <= 255
    void     the value that is ignored
    dataset  in front of every message

    Raises UserError as `read_label_map` does, and for any other value.
    """
    values = read_label_map(path, image, dataset)
    first, last = classes[0], classes[-1]
    wrong = values[(values != void) & ((values < first) | (values > last))]
    if len(wrong):
        where = f"{dataset}: {path}" if dataset else f"{path}:"
        expected = f"{void}..{last}" if void == first - 1 else f"{first}..{last} or {void}"
        raise UserError(f"{where} has the value {wrong[0]}, expected {expected}")
    return np.where(values == void, IGNORED, values - first).astype(np.uint8)


def read_depth_map(path: Path) -> np.ndarray:
    """A depth map (H, W) float32 in metres, 0 where unknown.

    path    of a 16-bit PNG (or TIFF) in millimetres; UserError naming it for a missing, unreadable or other file
    """
    with reworded(f"{path}: cannot be read as a depth map", *UNREADABLE):
        values, mode, _, _ = read_pixels(path)
    if mode not in DEPTH_MODES:
        raise UserError(
            f"{path}: is an image of mode {mode}, expected a depth map of 16 bits and one channel, in millimetres"
        )
    return values.astype(np.float32) / np.float32(MILLIMETRES)


def require_size(where: str, values: np.ndarray, image: Path, dataset: str = "") -> None:
    """UserError unless a map (H, W) has the size of its image.

    where, dataset  in front of messages on the map, and on the image
    """
    picture = f"{dataset}: {image}" if dataset else f"{image}:"
    cautious = reworded(f"{picture} cannot be read as an image", *UNREADABLE)
    with cautious, open_regular(image) as file, Image.open(file) as opened:
        width, height = opened.size
    if values.shape != (height, width):
        raise UserError(
            f"{where} is {values.shape[1]} x {values.shape[0]} pixels, its image {image.name} is {width} x {height}"
        )


def _grey_bits(path: Path) -> int:
    """Bits of a grey PNG's pixel as the file has them; 0 for any other kind of picture."""
    with open(path, "rb") as file:
        head = file.read(26)  # signature, length, "IHDR", width, height, bits, colour type
    return head[24] if len(head) == 26 and head.startswith(b"\x89PNG") and head[25] == GREY else 0
