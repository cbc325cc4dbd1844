"""ImageNet-1k in small: four classes in torchvision's folders, two of one name, with CMYK, grey and PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.miniatures.pictures import labels_for, pattern, save

# Two of the names are the same, and the order of wnids is not that in which the devkit numbers the classes.
CLASSES = {
    "n02012849": ("crane",),
    "n02105855": ("Shetland sheepdog", "Shetland sheep dog", "Shetland"),
    "n03126707": ("crane",),
    "n01440764": ("tench", "Tinca tinca"),
}
WNIDS = sorted(CLASSES)


def write(
    root: Path,
    *,
    per_class: int = 6,
    shuffled: bool = False,
    seed: int = 0,
    meta: bool = True,
    flat_val: bool = False,
    extra: bool = False,
) -> Path:
    """`root/imagenet1k` with per_class training images of a class and half as many validation images.

    meta      with torchvision's meta.bin
    flat_val  the validation images lie beside each other, as in the archive
    extra     with DINOv2's entries-*.npy, in an order of their own, and labels.txt
    """
    folder = root / "imagenet1k"
    listed: dict[str, list[tuple[int, str]]] = {"train": [], "val": []}
    shown, told = labels_for(per_class * len(WNIDS), len(WNIDS), shuffled, seed)
    for index, (picture, label) in enumerate(zip(shown, told)):
        wnid = WNIDS[label]
        number = 2933 if wnid == "n02105855" and index < len(WNIDS) else 10 + 7 * index
        kind = {0: "CMYK", len(WNIDS) + 2: "L"}.get(index, "PNG" if number == 2933 else "JPEG")
        save(pattern(int(picture), seed + index), folder / "train" / wnid / f"{wnid}_{number}.JPEG", kind)
        listed["train"].append((number, wnid))
    shown, told = labels_for(max(per_class // 2, 1) * len(WNIDS), len(WNIDS), shuffled, seed + 1)
    # Validation images are numbered without regard to their class.
    numbers = np.random.default_rng(seed).permutation(len(shown)) + 1
    order = [""] * len(shown)
    for index, (picture, label, number) in enumerate(zip(shown, told, numbers)):
        wnid = WNIDS[label]
        below = folder / "val" if flat_val else folder / "val" / wnid
        save(pattern(int(picture), seed + 5000 + index), below / f"ILSVRC2012_val_{number:08d}.JPEG")
        listed["val"].append((int(number), wnid))
        order[number - 1] = wnid
    if meta:
        torch.save((CLASSES, order), folder / "meta.bin")
    if extra:
        text = "".join(f"{wnid},{CLASSES[wnid][0]}\n" for wnid in WNIDS)
        (folder / "labels.txt").write_text(text)
        (folder / "extra").mkdir()
        for split, rows in listed.items():
            _dump(folder / "extra" / f"entries-{split.upper()}.npy", rows[::-1])
    return folder


def _dump(path: Path, rows: list[tuple[int, str]]) -> None:
    kinds = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U20")]
    table = np.empty(len(rows), dtype=kinds)
    for position, (number, wnid) in enumerate(rows):
        table[position] = (number, WNIDS.index(wnid), wnid, CLASSES[wnid][0])
    np.save(path, table)
