"""Food-101 in miniature: three dishes, JSON lists and their text twins, one PNG and one CMYK file under `.jpg`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.miniatures.pictures import labels_for, pattern, save

CLASSES = ("apple_pie", "baklava", "french_fries")


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/food-101` with `per_class` images of each dish in train and in test."""
    folder = root / "food-101"
    meta = folder / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(2 * per_class * len(CLASSES), len(CLASSES), shuffled, seed)
    listed: dict[str, dict[str, list[str]]] = {split: {name: [] for name in CLASSES} for split in ("train", "test")}
    for index in range(len(told)):
        split = "train" if index < len(told) // 2 else "test"
        path = f"{CLASSES[told[index]]}/{1_000_000 + 7919 * index}"
        kind = {1: "PNG", 2: "CMYK"}.get(index, "JPEG")
        save(pattern(int(shown[index]), seed * 1000 + index), folder / "images" / f"{path}.jpg", kind)
        listed[split][CLASSES[told[index]]].append(path)
    for split, classes in listed.items():
        # The order of the classes in the JSON says nothing about their numbers.
        backwards = {name: classes[name] for name in reversed(CLASSES)}
        (meta / f"{split}.json").write_text(json.dumps(backwards))
        rows = [path for name in CLASSES for path in classes[name]]
        (meta / f"{split}.txt").write_text("".join(f"{path}\n" for path in rows))
    (meta / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (meta / "labels.txt").write_text("".join(f"{name.replace('_', ' ').title()}\n" for name in CLASSES))
    (folder / "README.txt").write_text("stray\n")
    return folder
