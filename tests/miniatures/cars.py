"""Stanford Cars in miniature, in both layouts: MATLAB struct arrays, 1-based classes, a test list without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from tests.miniatures.pictures import labels_for, pattern, save

NAMES = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012")


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, combined: bool = False) -> Path:
    """`root/stanford_cars` with `per_class` images of each class in train and in test.

    combined  the layout with `cars_annos.mat`, in which train and test take turns
    """
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(2 * per_class * len(NAMES), len(NAMES), shuffled, seed)
    half, names = len(told) // 2, np.array([NAMES], dtype=object)
    records: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for index in range(len(told)):
        split = "train" if index < half else "test"
        number = len(records[split]) + 1
        file = f"{2 * number - (split == 'train'):06d}.jpg" if combined else f"{number:05d}.jpg"
        place = folder / ("car_ims" if combined else f"cars_{split}")
        save(pattern(int(shown[index]), seed * 1000 + index), place / file, "L" if index == 1 else "JPEG")
        corners = {name: np.uint8(value) for name, value in zip(BOX, (3, 2, 40, 33))}
        label = {"class": np.uint8(told[index] + 1)}
        if combined:
            path = {"relative_im_path": f"car_ims/{file}"}
            records[split].append({**path, **corners, **label, "test": np.uint8(split == "test")})
        else:
            records[split].append({**corners, **label, "fname": file})
    if combined:
        (folder / "devkit").rmdir()
        turns = [record for pair in zip(records["train"], records["test"]) for record in pair]
        content = {"annotations": annotations(turns), "class_names": names}
        scipy.io.savemat(str(folder / "cars_annos.mat"), content)
        return folder
    scipy.io.savemat(str(folder / "devkit" / "cars_meta.mat"), {"class_names": names})
    save_annotations(folder / "devkit" / "cars_train_annos.mat", records["train"])
    save_annotations(folder / "cars_test_annos_withlabels.mat", records["test"])
    unlabelled = [{key: value for key, value in record.items() if key != "class"} for record in records["test"]]
    save_annotations(folder / "devkit" / "cars_test_annos.mat", unlabelled)
    return folder


BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def save_annotations(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    scipy.io.savemat(str(path), {"annotations": annotations(records)})


def annotations(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A (1, n) struct array as MATLAB keeps it."""
    found = np.empty((1, len(records)), dtype=[(name, object) for name in records[0]])
    for index, record in enumerate(records):
        for name, value in record.items():
            found[name][0, index] = value
    return found
