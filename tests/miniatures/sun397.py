"""SUN397 in miniature: a nested class, lists beside the folder, GIF and PNG under `.jpg`, images that no list names."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.pictures import labels_for, pattern, save

CLASSES = ("/a/abbey", "/c/church/indoor", "/c/church/outdoor")
PREFIXES = ("Training", "Testing")


def write(
    root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, splits: int = 2, inside: bool = False
) -> Path:
    """`root/SUN397` with `per_class` images of each class in either half of every split.

    splits  how many of the ten there are; each next one swaps the halves
    inside  the lists lie in the folder instead of beside it
    """
    folder = root / "SUN397"
    folder.mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(2 * per_class * len(CLASSES), len(CLASSES), shuffled, seed)
    halves: tuple[list[str], list[str]] = ([], [])
    for index in range(len(told)):
        path = f"{CLASSES[told[index]]}/sun_a{'bcdefghijklmnopqrstuvwxyz'[index % 25]}{index:06d}.jpg"
        save(
            pattern(int(shown[index]), seed * 1000 + index), folder / path[1:], {1: "GIF", 4: "PNG"}.get(index, "JPEG")
        )
        halves[index >= len(told) // 2].append(path)
    # Most images of the archive are in no half of a given split.
    save(pattern(0, seed * 1000 + 999), folder / "a" / "abbey" / "sun_azzunlisted.jpg")
    (folder / "ClassName.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for split in range(1, splits + 1):
        for number, prefix in enumerate(PREFIXES):
            rows = halves[(number + split - 1) % 2]
            place = folder if inside else root
            (place / f"{prefix}_{split:02d}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder
