"""ImageNet-V2 in small: folders called 0, 1, … beside an ImageNet-1k in small, whose sorted wnids they number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.miniatures import imagenet1k
from tests.miniatures.pictures import labels_for, pattern, save


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """root/imagenet_v2 with per_class pictures of each class, and root/imagenet1k unless it is there."""
    return write_set(root, "imagenet_v2", lambda label: str(label), per_class=per_class, shuffled=shuffled, seed=seed)


def write_set(
    root: Path,
    name: str,
    place: Callable[[int], str],
    *,
    classes: tuple[int, ...] = (0, 1, 2, 3),
    per_class: int = 6,
    shuffled: bool = False,
    seed: int = 0,
    learnt: int = 6,
) -> Path:
    """A set of new pictures of some of the miniature's classes; the folder of the set.

    place   class -> its folder below that of the set
    learnt  training images of a class
    """
    if not (root / "imagenet1k").exists():
        imagenet1k.write(root, per_class=learnt)
    folder = root / name
    shown, told = labels_for(per_class * len(classes), len(classes), shuffled, seed + 3)
    for number, (picture, label) in enumerate(zip(shown, told)):
        save(pattern(classes[picture], seed + 9000 + number), folder / place(classes[label]) / f"{number}.JPEG")
    (folder / "README.txt").write_text("not a picture")
    return folder
