"""CUB-200-2011 in miniature: ids that follow no order of paths, lists in different orders, one grey image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.miniatures.pictures import labels_for, pattern, save

CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/CUB_200_2011` with `per_class` images of each class in train and in test."""
    folder = root / "CUB_200_2011"
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    (folder / "attributes").mkdir(exist_ok=True)
    shown, told = labels_for(2 * per_class * len(CLASSES), len(CLASSES), shuffled, seed)
    rng = np.random.default_rng([seed, 7])
    ids = rng.permutation(len(told)) + 1
    in_train = np.arange(len(told)) < len(told) // 2
    images, labels, flags, boxes = {}, {}, {}, {}
    for index in range(len(told)):
        name = CLASSES[told[index]]
        path = f"{name}/{name[4:]}_{index:04d}_{796_000 + index}.jpg"
        save(pattern(int(shown[index]), seed * 1000 + index), folder / "images" / path, "L" if index == 4 else "JPEG")
        images[ids[index]], labels[ids[index]] = path, int(told[index]) + 1
        flags[ids[index]], boxes[ids[index]] = int(in_train[index]), "4.0 3.0 30.0 25.0"
    _list(folder / "images.txt", images, sorted(images))
    _list(folder / "image_class_labels.txt", labels, rng.permutation(sorted(labels)))
    _list(folder / "train_test_split.txt", flags, sorted(flags, reverse=True))
    _list(folder / "bounding_boxes.txt", boxes, sorted(boxes))
    _list(folder / "classes.txt", dict(enumerate(CLASSES, 1)), range(1, len(CLASSES) + 1))
    (folder / "parts" / "parts.txt").write_text("1 back\n2 beak\n")
    (root / "attributes.txt").write_text("1 has_bill_shape::curved_(up_or_down)\n")
    return folder


def _list(path: Path, values: dict, order: object) -> None:
    path.write_text("".join(f"{number} {values[number]}\n" for number in order))  # type: ignore[attr-defined]
