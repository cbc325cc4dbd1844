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
) -> Path:
    """`root/imagenet1k` with per_class training images of a class and half as many validation images.

    meta      with torchvision's meta.bin
    """
    folder = root / "imagenet1k"
    shown, told = labels_for(per_class * len(WNIDS), len(WNIDS), shuffled, seed)
    for index, (picture, label) in enumerate(zip(shown, told)):
        wnid = WNIDS[label]
        number = 2933 if wnid == "n02105855" and index < len(WNIDS) else 10 + 7 * index
        kind = {0: "CMYK", len(WNIDS) + 2: "L"}.get(index, "PNG" if number == 2933 else "JPEG")
        save(pattern(int(picture), seed + index), folder / "train" / wnid / f"{wnid}_{number}.JPEG", kind)
    shown, told = labels_for(max(per_class // 2, 1) * len(WNIDS), len(WNIDS), shuffled, seed + 1)
    # Validation images are numbered without regard to their class.
    numbers = np.random.default_rng(seed).permutation(len(shown)) + 1
    order = [""] * len(shown)
    for index, (picture, label, number) in enumerate(zip(shown, told, numbers)):
        wnid = WNIDS[label]
        path = folder / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG"
        save(pattern(int(picture), seed + 5000 + index), path)
        order[number - 1] = wnid
    if meta:
        torch.save((CLASSES, order), folder / "meta.bin")
    return folder
