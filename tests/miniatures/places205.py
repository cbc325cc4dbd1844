"""Places205 in small: three kinds of scenes, one of them a folder deeper, and lists that are no CSV."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.pictures import labels_for, pattern, save

CATEGORIES = ("a/abbey", "b/basilica", "c/church/outdoor")
IMAGES = "data/vision/torralba/deeplearning/images256"


def write(
    root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, images: str = IMAGES, absent: bool = False
) -> Path:
    """`root/places205` with per_class training images of a class and half as many validation images.

    images  where the images lie in it
    absent  the training list ends with a file that is not there
    """
    folder = root / "places205"
    lists = folder / "trainvalsplit_places205"
    lists.mkdir(parents=True)
    for split, each, first in (("train", per_class, 0), ("val", max(per_class // 2, 1), 5000)):
        shown, told = labels_for(each * len(CATEGORIES), len(CATEGORIES), shuffled, seed + first)
        rows = []
        for index, (picture, label) in enumerate(zip(shown, told)):
            name = f"{CATEGORIES[label]}/gsun_{(first + index) * 2654435761 % 2**32:032x}.jpg"
            save(pattern(int(picture), seed + first + index), folder / images / name)
            rows.append(f"{name} {label}\n")
        if absent and split == "train":
            rows.append("a/abbey/gsun_absent.jpg 0\n")
        (lists / f"{split}_places205.csv").write_text("".join(rows))
    numbers = "".join(f"/{name} {number}\n" for number, name in enumerate(CATEGORIES))
    (lists / "categoryIndex_places205.csv").write_text(numbers)
    return folder
