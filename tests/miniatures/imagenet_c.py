"""ImageNet-C in small: corruption/severity/<wnid>/ beside an ImageNet-1k in small, and a corruption too many."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.imagenet1k import WNIDS
from tests.miniatures.imagenet_v2 import write_set

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, grouped: bool = False) -> Path:
    """root/imagenet_c with a fourth of per_class pictures of each class, corruption and severity (1 and 5 of the five).

    grouped  below folders called after the archives
    """
    options = {"per_class": max(per_class // 4, 1), "shuffled": shuffled, "learnt": per_class}
    kinds = [f"{group}/{name}" if grouped else name for group, names in GROUPS.items() for name in names]
    for number, kind in enumerate([*kinds, "spatter"]):
        for severity in (1, 5):
            place = f"{kind}/{severity}"
            folder = write_set(
                root, "imagenet_c", lambda label, place=place: f"{place}/{WNIDS[label]}", seed=seed + number, **options
            )
    return folder
