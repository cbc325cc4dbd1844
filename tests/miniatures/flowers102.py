"""Oxford Flowers-102 in miniature: ids and classes from 1, ids that follow no order, a test larger than train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from tests.miniatures.pictures import labels_for, pattern, save

NUM_CLASSES = 3


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/flowers-102` with `per_class` images of each class in train and val, and twice as many in the test."""
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True, exist_ok=True)
    count = per_class * NUM_CLASSES
    shown, told = labels_for(4 * count, NUM_CLASSES, shuffled, seed)
    ids = np.random.default_rng([seed, 3]).permutation(4 * count) + 1
    labels = np.zeros((1, 4 * count), dtype=np.uint8)
    for index, number in enumerate(ids):
        labels[0, number - 1] = told[index] + 1
        save(pattern(int(shown[index]), seed * 1000 + index), folder / "jpg" / f"image_{number:05d}.jpg")
    parts = {"trnid": ids[:count], "valid": ids[count : 2 * count], "tstid": ids[2 * count :]}
    scipy.io.savemat(str(folder / "imagelabels.mat"), {"labels": labels})
    sets = {name: np.array([part], dtype=np.uint16) for name, part in parts.items()}
    scipy.io.savemat(str(folder / "setid.mat"), sets)
    return folder
