"""FGVC-Aircraft in miniature: a class with a space, one with a slash, and a banner that shows another class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures.pictures import labels_for, pattern, save

# (variant, family, manufacturer), in the order of variants.txt
VARIANTS = (("707-320", "Boeing 707", "Boeing"), ("Cessna 172", "Cessna 172", "Cessna"),
            ("F/A-18", "F/A-18", "McDonnell Douglas"))  # fmt: skip
LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
HEIGHT, WIDTH, BANNER = 40, 48, 20  # pixels


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/fgvc-aircraft-2013b` with `per_class` images of each variant in train, val and test."""
    folder = root / "fgvc-aircraft-2013b"
    data = folder / "data"
    (data / "images").mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(3 * per_class * len(VARIANTS), len(VARIANTS), shuffled, seed)
    ids = np.random.default_rng([seed, 5]).permutation(len(told)) + 1_025_794
    for level, name in enumerate(LEVELS.values()):
        (data / name).write_text("".join(f"{each}\n" for each in sorted({row[level] for row in VARIANTS})))
    rows: dict[str, list[int]] = {split: [] for split in ("train", "val", "test")}
    for index in range(len(told)):
        plane = pattern(int(shown[index]), seed * 1000 + index, HEIGHT, WIDTH)
        banner = pattern(int(told[index] + 1 + index // 3) % 3, seed * 1000 + 500 + index, BANNER, WIDTH)
        whole = Image.new("RGB", (WIDTH, HEIGHT + BANNER))
        whole.paste(plane, (0, 0))
        whole.paste(banner, (0, HEIGHT))
        save(whole, data / "images" / f"{ids[index]:07d}.jpg")
        rows[("train", "val", "test")[index // (per_class * len(VARIANTS))]].append(index)
    rows["trainval"] = rows["train"] + rows["val"]
    for level, kind in enumerate(LEVELS):
        for split, indices in rows.items():
            listed = "".join(f"{ids[index]:07d} {VARIANTS[told[index]][level]}\n" for index in indices)
            (data / f"images_{kind}_{split}.txt").write_text(listed)
    (data / "images_box.txt").write_text("".join(f"{number:07d} 1 1 {WIDTH} {HEIGHT}\n" for number in ids))
    return folder
