"""Generated pictures whose class can be read off them, in the kinds of file that real datasets hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

# Colours far apart, also for a network with random weights.
COLOURS = np.array(
    [(210, 40, 40), (40, 170, 60), (50, 80, 220), (230, 200, 50), (160, 60, 190), (40, 190, 190)], dtype=np.float64
)


def pattern(label: int, seed: int, height: int = 40, width: int = 48) -> Image.Image:
    """A picture of class `label`: stripes of its own colour, pitch and direction, with noise of its own `seed`."""
    rng = np.random.default_rng([seed, label])
    y, x = np.mgrid[0:height, 0:width]
    along = x if label % 2 else y
    stripes = 0.5 + 0.5 * np.sin(along * 2 * np.pi / (4 + 2 * (label % 3)) + rng.uniform(0, 6))
    colour = COLOURS[label % len(COLOURS)] * rng.uniform(0.85, 1.0)
    image = (0.55 + 0.45 * stripes)[..., None] * colour + rng.normal(scale=8, size=(height, width, 3))
    return Image.fromarray(np.uint8(np.clip(image, 0, 255)))


def labels_for(count: int, num_classes: int, shuffled: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(shown, told): the class each picture shows and the class the files claim; equal unless shuffled.

    Shuffled claims keep the balance of classes and say nothing about the pictures.
    """
    told = np.arange(count) % num_classes
    if not shuffled:
        return told, told
    return np.random.default_rng([seed, 99]).permutation(told), told


def save(image: Image.Image, path: Path, kind: str = "JPEG") -> None:
    """Write a picture whatever the name's extension says: "JPEG", "PNG", "GIF", "L" (grey JPEG) or "CMYK" (JPEG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("L", "CMYK"):
        image, kind = image.convert(kind), "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    path.write_bytes(buffer.getvalue())
