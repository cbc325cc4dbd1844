"""Caltech-101 in miniature: the background folder with its stray file, unequal classes, one grey image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from tests.miniatures.pictures import labels_for, pattern, save

# Category -> folder of its annotations; in the order of their names, capitals first.
CATEGORIES = {"Faces": "Faces_2", "accordion": "accordion", "airplanes": "Airplanes_Side_2"}
BACKGROUND = "BACKGROUND_Google"


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/caltech101`; a draw of `caltech101.train_per_class=PER_CLASS` leaves as many images for the test.

    The last class has two more than the others.
    """
    folder = root / "caltech101"
    images = folder / "101_ObjectCategories"
    names = list(CATEGORIES)
    shown, told = labels_for(2 * per_class * len(names), len(names), shuffled, seed)
    shown, told = np.append(shown, [2, 2]), np.append(told, [2, 2])
    counts = dict.fromkeys(names, 0)
    for index in range(len(told)):
        name = names[told[index]]
        counts[name] += 1
        path = images / name / f"image_{counts[name]:04d}.jpg"
        save(pattern(int(shown[index]), seed * 1000 + index), path, "L" if index == 1 else "JPEG")
        outline = folder / "Annotations" / CATEGORIES[name] / f"annotation_{counts[name]:04d}.mat"
        outline.parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(str(outline), {"obj_contour": np.array([[1.0, 9.0, 9.0], [1.0, 1.0, 9.0]])})
    for index in range(3):
        save(pattern(3 + index, seed * 1000 + 900 + index), images / BACKGROUND / f"image_{index + 1:04d}.jpg")
    (images / BACKGROUND / "tmp").write_bytes(b"left over")
    return folder
