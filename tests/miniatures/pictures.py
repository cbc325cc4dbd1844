"""Generated pictures whose class can be read off them, in the kinds of file that real datasets hold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


def numbered(folder: Path, count: int) -> Path:
    """A new folder of pictures 00.png, 01.png, … of three kinds."""
    folder.mkdir()
    for number in range(count):
        pattern(number % 3, number).save(folder / f"{number:02d}.png")
    return folder


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


class Thing(NamedTuple):
    """An object of a scene: its class, its place (x0, y0, x1, y1 in pixels, ends exclusive), whether it is faint."""

    label: int
    box: tuple[int, int, int, int]
    faint: bool = False


def arrange(labels: Sequence[int], seed: int, height: int = 70, width: int = 84, cell: int = 14) -> list[Thing]:
    """One or two objects of the given classes, apart from each other, two or three cells long, nearly on the grid."""
    rng = np.random.default_rng([seed, 7, len(labels)])
    rows, columns = height // cell, width // cell
    along, across = max(rows, columns), min(rows, columns)  # two objects lie along the longer side
    things = []
    for number, label in enumerate(labels):
        long = int(rng.integers(2, 4)) if len(labels) == 1 else 2
        wide = int(rng.integers(2, 4))
        if len(labels) == 1:
            start = int(rng.integers(1, along - long))
        else:
            start = 0 if number == 0 else along - long - int(rng.integers(0, 2))
        side = int(rng.integers(1, across - wide + 1)) if wide == 2 else 1
        x, y, w, h = (start, side, long, wide) if columns >= rows else (side, start, wide, long)
        left, top = x * cell + int(rng.integers(0, 3)), y * cell + int(rng.integers(0, 3))
        right, bottom = (x + w) * cell - int(rng.integers(0, 3)), (y + h) * cell - int(rng.integers(0, 3))
        things.append(Thing(label, (left, top, min(right, width), min(bottom, height))))
    return things


def scene(things: Sequence[Thing], seed: int, height: int = 70, width: int = 84) -> Image.Image:
    """Objects in the colour of their class on a grey ground.

    Each is darker to the left and greyer to the bottom, so that a patch also tells where in its object it is.
    """
    rng = np.random.default_rng([seed, 8])
    image = np.full((height, width, 3), 118.0) + rng.uniform(-6, 6)
    for label, (x0, y0, x1, y1), faint in things:
        u = np.linspace(0, 1, x1 - x0)[None, :, None]
        v = np.linspace(0, 1, y1 - y0)[:, None, None]
        colour = COLOURS[label % len(COLOURS)] * (0.75 + 0.25 * u) + 40 * v
        image[y0:y1, x0:x1] = 0.5 * colour + 59 if faint else colour
    return Image.fromarray(np.uint8(np.clip(image + rng.normal(scale=3, size=image.shape), 0, 255)))
