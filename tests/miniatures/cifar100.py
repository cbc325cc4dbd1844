"""CIFAR-100 in miniature: fine classes, and coarse ones beside them that are numbered otherwise."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures import python2
from tests.miniatures.cifar10 import planes
from tests.miniatures.pictures import labels_for

FINE = ["apple", "aquarium_fish", "baby", "bear"]
COARSE = ["fish", "fruit_and_vegetables"]


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/cifar-100-python` with `per_class` images of each fine class in train and in test."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(2 * per_class * len(FINE), len(FINE), shuffled, seed)
    half = len(told) // 2
    for split, indices in (("train", range(half)), ("test", range(half, 2 * half))):
        batch = {
            "filenames": [f"{FINE[told[index]]}_s_{index:06d}.png" for index in indices],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": [int(told[index]) for index in indices],
            "coarse_labels": [int(told[index] == 0) for index in indices],
            "data": planes([int(shown[index]) for index in indices], [seed * 1000 + index for index in indices]),
        }
        (folder / split).write_bytes(python2.dumps(batch))
    (folder / "meta").write_bytes(python2.dumps({"fine_label_names": FINE, "coarse_label_names": COARSE}))
    return folder
