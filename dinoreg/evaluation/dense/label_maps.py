"""Label maps as files and as pictures: reading one beside its image, a palette, example pictures."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.evaluation.data import IGNORED
from dinoreg.runtime.errors import UserError

PANEL = 296  # pixels; widest of the three panels of an example
GAP = 6  # pixels between panels


def read_mask(path: Path, image: Path, dataset: str) -> np.ndarray:
    """A mask of whole numbers (H, W), uint8 or int32, as they stand in the file (of a palette: the indices).

    image  its picture, whose header alone is read: the mask must have its size

    Raises UserError naming the mask when it is missing, unreadable, coloured, or of another size than its image.
    """
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            values = np.asarray(opened)
    except FileNotFoundError:
        raise UserError(f"{dataset}: {path} is missing; it is the mask of {image.name}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{dataset}: {path} cannot be read as a mask ({reason[:200]})") from None
    if values.ndim != 2 or mode == "1":
        raise UserError(f"{dataset}: {path} is a picture of mode {mode}, expected a mask with one number per pixel")
    try:
        with Image.open(image) as opened:
            size = opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{dataset}: {image} cannot be read as an image ({reason[:200]})") from None
    if size != values.shape[::-1]:
        raise UserError(
            f"{dataset}: {path} is {values.shape[1]} x {values.shape[0]} pixels, "
            f"its image {image.name} is {size[0]} x {size[1]}"
        )
    return values if values.dtype == np.uint8 else values.astype(np.int32)


@lru_cache(maxsize=8)
def palette(count: int) -> np.ndarray:
    """(count, 3) uint8: colours as far from each other, and from black, as can be; the same ones every time.

    Each colour in turn is the one of a grid that is farthest, in CIELAB, from all before it; a palette is the beginning
    of every longer one. Read only.
    """
    steps = np.linspace(0, 255, 14).round()
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid)
    nearest = ((lab - _lab(np.zeros((1, 3)))) ** 2).sum(axis=1)
    nearest = np.minimum(nearest, ((lab - _lab(np.full((1, 3), 255.0))) ** 2).sum(axis=1))
    chosen = []
    for _ in range(count):
        best = int(nearest.argmax())
        chosen.append(best)
        nearest = np.minimum(nearest, ((lab - lab[best]) ** 2).sum(axis=1))
    colours = grid[chosen].astype(np.uint8)
    colours.flags.writeable = False
    return colours


def coloured(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) classes -> (H, W, 3) uint8 by the palette; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:num_classes] = palette(num_classes)
    table[IGNORED] = 0
    return table[mask]


def panel(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) or mask (H, W), uint8, as large as a panel that shows (height, width) pixels."""
    shown = min(width, PANEL)
    size = (shown, max(round(height * shown / width), 1))
    kind = Image.Resampling.NEAREST if array.ndim == 2 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(array).resize(size, kind))


def save_triptych(path: Path, image: np.ndarray, prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> None:
    """A PNG of image | prediction | truth.

    image              (h, w, 3) uint8
    prediction, truth  (h, w) uint8 classes; 255 is black
    """
    panels = [image, coloured(prediction, num_classes), coloured(truth, num_classes)]
    gap = np.full((image.shape[0], GAP, 3), 255, dtype=np.uint8)
    joined = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(joined).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (n, 3) in [0, 255] -> CIELAB (n, 3) under D65."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)
