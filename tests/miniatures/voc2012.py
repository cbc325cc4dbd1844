"""PASCAL VOC 2012 in small: the tree of 2007 without a test split, names by year, a mask for every picture.

Traps beyond those of 2007: a box with decimals, pictures in JPEGImages that no list names.
"""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.pictures import pattern, save
from tests.miniatures.voc2007 import SHOWN, write_devkit


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """VOCdevkit/VOC2012 with 4 x per_class pictures in each of train and val; returns VOCdevkit."""
    count = per_class * len(SHOWN)
    names = [f"{2007 + number % 5}_{27 + 3 * number:06d}" for number in range(2 * count)]
    splits = {"train": sorted(names[0::2]), "val": sorted(names[1::2])}
    devkit = write_devkit(root, "VOC2012", splits, shuffled=shuffled, seed=seed + 12, masked=1, float_box=True)
    for number in range(2):
        save(pattern(number, seed), devkit / f"VOC2012/JPEGImages/2012_{4000 + number:06d}.jpg")
    return devkit
