"""Oxford-IIIT Pets in miniature: PNG, GIF, palette and alpha under `.jpg`, stray `.mat` files, a commented list."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures.pictures import labels_for, pattern, save

# (breed, species: 1 cat, 2 dog, number among the breeds of its species), in the order of their class
BREEDS = (("Abyssinian", 1, 1), ("american_bulldog", 2, 1), ("Egyptian_Mau", 1, 2), ("yorkshire_terrier", 2, 2))


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/oxford-iiit-pet` with `per_class` images of each breed in trainval and in test."""
    folder = root / "oxford-iiit-pet"
    images, annotations = folder / "images", folder / "annotations"
    for each in (images, annotations / "trimaps", annotations / "xmls"):
        each.mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(2 * per_class * len(BREEDS), len(BREEDS), shuffled, seed)
    rows: dict[str, list[str]] = {"trainval": [], "test": []}
    for index in range(len(told)):
        breed, species, number = BREEDS[told[index]]
        name = f"{breed}_{index + 1}"
        picture = pattern(int(shown[index]), seed * 1000 + index)
        path = images / f"{name}.jpg"
        if index in (1, 2):  # a palette, with its first colour transparent; an alpha channel
            changed = picture.convert("P", palette=Image.Palette.ADAPTIVE) if index == 1 else picture.convert("RGBA")
            buffer = io.BytesIO()
            changed.save(buffer, "PNG", **({"transparency": 0} if index == 1 else {}))
            path.write_bytes(buffer.getvalue())
        else:
            save(picture, path, {3: "GIF", 4: "PNG"}.get(index, "JPEG"))
        trimap = np.full((picture.height, picture.width), 2, dtype=np.uint8)
        trimap[8:-8, 8:-8], trimap[10:-10, 10:-10] = 3, 1
        Image.fromarray(trimap).save(annotations / "trimaps" / f"{name}.png")
        rows["trainval" if index < len(told) // 2 else "test"].append(f"{name} {told[index] + 1} {species} {number}")
    for split, found in rows.items():
        (annotations / f"{split}.txt").write_text("".join(f"{row}\n" for row in found))
    heading = "#Image CLASS-ID SPECIES BREED ID\n#ID: 1:37 Class ids\n"
    (annotations / "list.txt").write_text(heading + "".join(f"{row}\n" for split in rows.values() for row in split))
    for name in ("Abyssinian_100", "Abyssinian_101", "Abyssinian_102"):
        (images / f"{name}.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    return folder
