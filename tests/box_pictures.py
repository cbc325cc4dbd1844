"""Pictures with objects at known places, for the tests of discovery and detection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinoreg.data.source import Source
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Boxed

COLOURS = np.array([(230, 60, 40), (60, 200, 70), (70, 90, 230)], dtype=np.float64)


class Pictures(Source):
    """Pixels held in memory; `reads` lists the indices that were asked for."""

    def __init__(self, pixels: Sequence[np.ndarray]) -> None:
        self.pixels, self.reads = list(pixels), []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        return self.pixels[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def fingerprint(self) -> str:
        return f"{len(self.pixels):016x}"


def split_of(
    pixels: Sequence[np.ndarray],
    boxes: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[Sequence[int]],
    classes: int,
) -> Boxed:
    none = [np.zeros(len(each), dtype=bool) for each in labels]
    return Boxed(
        Pictures(pixels),
        [np.array(each, dtype=np.float32).reshape(-1, 4) for each in boxes],
        [np.array(each, dtype=np.int64) for each in labels],
        classes,
        none,
        [each.copy() for each in none],
    )


def bright_on_dark(count: int, seed: int, patch: int = 8) -> Boxed:
    """One bright rectangle on a dark ground, on the grid of patches but for sides that the picture cuts off."""
    rng = np.random.default_rng(seed)
    pixels, boxes = [], []
    for _ in range(count):
        height, width = int(rng.integers(40, 60)), int(rng.integers(44, 70))
        rows, columns = -(-height // patch), -(-width // patch)
        top, left = int(rng.integers(0, rows - 2)), int(rng.integers(0, columns - 2))
        bottom, right = int(rng.integers(top + 2, min(top + 4, rows) + 1)), min(left + 3, columns)
        box = (left * patch, top * patch, min(right * patch, width), min(bottom * patch, height))
        image = np.full((height, width, 3), 30.0)
        image[box[1] : box[3], box[0] : box[2]] = 240
        pixels.append(np.uint8(np.clip(image + rng.normal(scale=4, size=image.shape), 0, 255)))
        boxes.append([box])
    return split_of(pixels, boxes, [[0]] * count, 1)


def coloured(count: int, seed: int, shuffled: bool = False, patch: int = 8) -> Boxed:
    """One or two squares of three patches in the colour of their class, from which every place in them can be read.

    shuffled  the boxes told are those of other pictures
    """
    rng = np.random.default_rng(seed)
    pixels, boxes, labels = [], [], []
    steps = np.array([-1, 0, 1]).repeat(patch)  # even columns tell the place across, odd ones along
    for number in range(count):
        height, width = ((5, 8), (8, 5))[number % 2]
        image = np.full((height * patch, width * patch, 3), 110.0)
        places, classes = [], []
        for half in range(1 + number % 3 % 2):
            label = int(rng.integers(len(COLOURS)))
            along, across = int(rng.integers(0, 2)) + (4 if half else 0), int(rng.integers(0, 3))
            row, column = (across, along) if width > height else (along, across)
            y, x = row * patch, column * patch
            tile = np.broadcast_to(COLOURS[label], (3 * patch, 3 * patch, 3)).copy()
            tile[:, ::2] += 22 * steps[None, ::2, None]
            tile[:, 1::2] += 22 * steps[:, None, None]
            image[y : y + 3 * patch, x : x + 3 * patch] = tile
            places.append((x, y, x + 3 * patch, y + 3 * patch))
            classes.append(label)
        pixels.append(np.uint8(np.clip(image + rng.normal(scale=3, size=image.shape), 0, 255)))
        boxes.append(places)
        labels.append(classes)
    if shuffled:
        moved = np.random.default_rng([seed, 1]).permutation(count)
        boxes, labels = [boxes[each] for each in moved], [labels[each] for each in moved]
    return split_of(pixels, boxes, labels, len(COLOURS))


def context(folder: Path, examples: bool = False, batch_size: int = 8, num_examples: int = 3) -> Context:
    return Context(
        folder / "features",
        folder / "state",
        folder / "examples" if examples else None,
        seed=0,
        image_size=32,
        batch_size=batch_size,
        workers=0,
        num_examples=num_examples,
    )
