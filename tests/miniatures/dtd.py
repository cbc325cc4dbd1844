"""DTD in miniature: the archive's `dtd/` inside another, and several of the ten official splits."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.pictures import labels_for, pattern, save

CLASSES = ("banded", "blotchy", "braided")
SPLITS = ("train", "val", "test")


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, partitions: int = 2) -> Path:
    """`root/dtd/dtd` with `per_class` images of each class in train, val and test; each split turns the three round."""
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(3 * per_class * len(CLASSES), len(CLASSES), shuffled, seed)
    rows = []
    for index in range(len(told)):
        name = CLASSES[told[index]]
        rows.append(f"{name}/{name}_{index + 2:04d}.jpg")
        save(pattern(int(shown[index]), seed * 1000 + index), folder / "images" / rows[-1])
    third = per_class * len(CLASSES)
    for partition in range(1, partitions + 1):
        for number, split in enumerate(SPLITS):
            start = (number + partition - 1) % 3 * third
            listed = "".join(f"{row}\n" for row in sorted(rows[start : start + third]))
            (folder / "labels" / f"{split}{partition}.txt").write_text(listed)
    joint = "".join(f"{row} {row.partition('/')[0]} \n" for row in rows)
    (folder / "labels" / "labels_joint_anno.txt").write_text(joint)
    (folder / "images" / "banded" / ".directory").write_text("[Dolphin]\n")
    return folder
