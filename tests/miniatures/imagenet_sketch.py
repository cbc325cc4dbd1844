"""ImageNet-Sketch in small: sketch/<wnid>/ beside an ImageNet-1k in small."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.imagenet1k import WNIDS
from tests.miniatures.imagenet_v2 import write_set


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """root/imagenet_sketch with per_class pictures of each class."""
    options = {"per_class": per_class, "shuffled": shuffled, "seed": seed}
    return write_set(root, "imagenet_sketch", lambda label: f"sketch/{WNIDS[label]}", **options)
