"""iNaturalist 2018 in small: three categories of two supercategories, annotations in another order than the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.miniatures.pictures import labels_for, pattern, save

CATEGORIES = (("Plantae", "Acer rubrum"), ("Plantae", "Quercus alba"), ("Aves", "Corvus corax"))


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/inat2018` with per_class training images of a category and half as many validation images, in one tree."""
    folder = root / "inat2018"
    for split, each, first in (("train", per_class, 100), ("val", max(per_class // 2, 1), 40_000)):
        shown, told = labels_for(each * len(CATEGORIES), len(CATEGORIES), shuffled, seed + first)
        images, annotations = [], []
        for index, (picture, label) in enumerate(zip(shown, told)):
            kingdom, _ = CATEGORIES[label]
            name = f"train_val2018/{kingdom}/{label}/{(first + index) * 2654435761 % 2**32:032x}.jpg"
            image = pattern(int(picture), seed + first + index)
            save(image, folder / name)
            # Identifiers are neither positions nor ascending with them.
            identity = first + (7 * index) % (each * len(CATEGORIES))
            images.append({"id": identity, "file_name": name, "width": image.width, "height": image.height})
            annotations.append({"id": identity, "image_id": identity, "category_id": int(label)})
        shuffle = np.random.default_rng(seed + first).permutation(len(annotations))
        content: dict[str, Any] = {
            "info": {"year": 2018},
            "licenses": [],
            "images": images,
            "annotations": [annotations[position] for position in shuffle],
            "categories": [
                {"id": label, "name": name, "supercategory": kingdom}
                for label, (kingdom, name) in reversed(list(enumerate(CATEGORIES)))
            ],
        }
        (folder / f"{split}2018.json").write_text(json.dumps(content))
    return folder
