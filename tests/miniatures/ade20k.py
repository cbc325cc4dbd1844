"""ADE20K in miniature: photographs of all sizes made of coloured regions, masks with 0, 1 and 150, 150 class names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures.pictures import COLOURS, save

CLASSES = (1, 2, 75, 150)  # as in the files; 0 is "other"
SIZES = ((56, 70), (64, 48), (42, 42), (50, 77))  # height, width


def scene(height: int, width: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """Four rectangles that meet in a point, each with the colour of its class, and a grey strip of "other".

    Returns the picture and its mask (height, width) uint8 with values out of 0 and CLASSES.
    """
    rng = np.random.default_rng([seed, 18])
    y, x = int(height * rng.uniform(0.35, 0.65)), int(width * rng.uniform(0.35, 0.65))
    order = rng.permutation(len(CLASSES))
    kind = np.empty((height, width), dtype=np.int64)
    kind[:y, :x], kind[:y, x:], kind[y:, :x], kind[y:, x:] = order
    pixels = COLOURS[kind] * rng.uniform(0.85, 1.0)
    mask = np.array(CLASSES, dtype=np.uint8)[kind]
    pixels[:4], mask[:4] = 128, 0
    pixels = pixels + rng.normal(scale=8, size=pixels.shape)
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255))), mask


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """Below root/ADEChallengeData2016: 3 x per_class training and per_class validation pairs.

    shuffled  the classes of the masks change places from image to image, whatever the picture shows
    """
    folder = root / "ADEChallengeData2016"
    for part, prefix, count in (("training", "train", 3 * per_class), ("validation", "val", per_class)):
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            image, mask = scene(height, width, 1000 * (part == "validation") + 10_000 * seed + number)
            if shuffled:
                # Out of any four images each colour has been each class once.
                table = np.zeros(256, dtype=np.uint8)
                table[list(CLASSES)] = np.roll(CLASSES, number + number // 4)
                mask = table[mask]
            name = f"ADE_{prefix}_{number + 1:08d}"
            save(image, folder / "images" / part / f"{name}.jpg")
            save(Image.fromarray(mask), folder / "annotations" / part / f"{name}.png", "PNG")
    rows = [f"{n}\t0.0067\t100\t10\t{n % 2}\tobject {n}, thing {n}" for n in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    (folder / "sceneCategories.txt").write_text("ADE_train_00000001 street\n")
    return folder
