"""ImageNet-R in small: pictures of three of the four classes of an ImageNet-1k in small."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.imagenet1k import WNIDS
from tests.miniatures.imagenet_v2 import write_set

CLASSES = (1, 2, 3)  # ranks of their wnids


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """root/imagenet_r with per_class pictures of each of CLASSES."""
    options = {"per_class": per_class, "shuffled": shuffled, "seed": seed}
    return write_set(root, "imagenet_r", lambda label: WNIDS[label], classes=CLASSES, **options)
