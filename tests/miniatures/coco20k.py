"""COCO-20k in small: train2014 with its annotations, and the list of some of its images in its own order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.miniatures.coco2017 import CATEGORIES, write_split


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """coco/ with 3 x per_class + 4 pictures in train2014, all but 4 of them listed; returns that folder."""
    count = per_class * len(CATEGORIES) + 4
    folder = root / "coco"
    ids = [25 + 7 * number for number in range(count)]
    write_split(folder, "train2014", "COCO_train2014_{:012d}.jpg", ids, shuffled=shuffled, seed=seed + 30)
    listed = [ids[0], *ids[5:]] if count > 5 else ids[:1]
    order = np.random.default_rng([seed, 20]).permutation(len(listed))
    rows = "".join(f"train2014/COCO_train2014_{listed[index]:012d}.jpg\n" for index in order)
    (folder / "coco_20k_filenames.txt").write_text(rows)
    return folder
