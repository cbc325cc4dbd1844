"""PASCAL VOC in small: the development kit's tree with true boxes, class lists, masks, and the real one's traps.

Traps: nested `part` boxes, difficult and truncated objects, class lists with two spaces and 0 (only difficult ones),
pictures of both orientations and one grey one, masks of a few pictures only, with 255 along the outlines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures.pictures import Thing, arrange, save, scene

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SHOWN = ("aeroplane", "chair", "dog", "person")  # the classes that occur; an object's colour is its place here


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """VOCdevkit/VOC2007 with 4 x per_class pictures in each of train, val and test; returns VOCdevkit."""
    count = per_class * len(SHOWN)
    numbers = np.random.default_rng([seed, 2007]).permutation(np.arange(5, 5 + 3 * count))
    splits = {
        name: [f"{number:06d}" for number in sorted(numbers[k * count : (k + 1) * count])]
        for k, name in enumerate(("train", "val", "test"))
    }
    return write_devkit(root, "VOC2007", splits, shuffled=shuffled, seed=seed, masked=2)


def write_devkit(
    root: Path,
    year: str,
    splits: Mapping[str, Sequence[str]],
    *,
    shuffled: bool,
    seed: int,
    masked: int,
    float_box: bool = False,
) -> Path:
    """The tree of one year. masked: every how many-th picture has a mask; float_box: the first box has decimals."""
    folder = root / "VOCdevkit" / year
    told: dict[str, list[Thing]] = {}
    number = 0
    for split, names in splits.items():
        for place, name in enumerate(names):
            height, width = (84, 70) if place % 5 == 4 else (70, 84)
            things = _things(place, [seed, number], height, width)
            grey = split == "train" and place == 4
            save(scene(things, seed * 1000 + number, height, width), folder / f"JPEGImages/{name}.jpg", _kind(grey))
            if shuffled:
                rng = np.random.default_rng([seed, number, 5])
                things = _things(int(rng.integers(10_000)), [seed, 50_000 + number], height, width)
            told[name] = things
            segmented = number % masked == 0
            decimals = 0.4 if float_box and place == 0 else 0.0
            _write(folder / f"Annotations/{name}.xml", _xml(year, name, things, height, width, segmented, decimals))
            if segmented:
                _write_masks(folder, name, things, height, width)
            number += 1
    lists = dict(splits)
    lists["trainval"] = sorted([*splits["train"], *splits["val"]])
    for split, names in lists.items():
        _write(folder / f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names))
        for label in CLASSES:
            rows = (f"{name} {_presence(told[name], label):2d}\n" for name in names)
            _write(folder / f"ImageSets/Main/{label}_{split}.txt", "".join(rows))
        with_mask = [name for name in names if (folder / f"SegmentationClass/{name}.png").exists()]
        _write(folder / f"ImageSets/Segmentation/{split}.txt", "".join(f"{name}\n" for name in with_mask))
    return root / "VOCdevkit"


def _things(place: int, seed: Sequence[int], height: int, width: int) -> list[Thing]:
    """One object, two in every third picture, and a faint, small dog in every sixth."""
    first = place % len(SHOWN)
    labels = [first] if place % 3 else [first, (first + 1 + place // len(SHOWN) % 3) % len(SHOWN)]
    stream = seed[0] * 1_000_003 + seed[1]
    things = arrange(labels, stream, height, width)
    if place % 6 == 1:
        things.append(Thing(SHOWN.index("dog"), (1, 1, 13, 13), faint=True))
    return things


def _kind(grey: bool) -> str:
    return "L" if grey else "JPEG"


def _presence(things: Sequence[Thing], label: str) -> int:
    """1 with an object of the class that is not difficult, 0 with difficult ones only, else -1."""
    found = [thing for thing in things if SHOWN[thing.label] == label]
    return (0 if all(thing.faint for thing in found) else 1) if found else -1


def _xml(
    year: str, name: str, things: Sequence[Thing], height: int, width: int, segmented: bool, decimals: float
) -> str:
    objects = "".join(_object(thing, decimals if place == 0 else 0.0) for place, thing in enumerate(things))
    return (
        f"<annotation>\n\t<folder>{year}</folder>\n\t<filename>{name}.jpg</filename>\n"
        "\t<source>\n\t\t<database>generated</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>{int(segmented)}</segmented>\n{objects}</annotation>\n"
    )


def _object(thing: Thing, decimals: float) -> str:
    name = SHOWN[thing.label]
    x0, y0, x1, y1 = thing.box
    box = _box(x0 + 1 + decimals if decimals else x0 + 1, y0 + 1, x1, y1)
    part = f"\t\t<part>\n\t\t\t<name>head</name>\n{_box(60, 60, 66, 66)}\t\t</part>\n" if name == "person" else ""
    return (
        f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n"
        f"\t\t<truncated>{int(name == 'chair')}</truncated>\n\t\t<difficult>{int(thing.faint)}</difficult>\n"
        f"{box}{part}\t</object>\n"
    )


def _box(xmin: float, ymin: float, xmax: float, ymax: float) -> str:
    rows = zip(("xmin", "ymin", "xmax", "ymax"), (xmin, ymin, xmax, ymax))
    return "\t\t<bndbox>\n" + "".join(f"\t\t\t<{key}>{value}</{key}>\n" for key, value in rows) + "\t\t</bndbox>\n"


def _write_masks(folder: Path, name: str, things: Sequence[Thing], height: int, width: int) -> None:
    """Palette PNGs: class (or object) numbers from 1, 0 the ground, 255 one pixel along every outline."""
    classes = np.zeros((height, width), dtype=np.uint8)
    objects = np.zeros((height, width), dtype=np.uint8)
    for number, thing in enumerate(things, 1):
        x0, y0, x1, y1 = thing.box
        for mask, value in ((classes, 1 + CLASSES.index(SHOWN[thing.label])), (objects, number)):
            mask[y0:y1, x0:x1] = 255
            mask[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = value
    palette = np.random.default_rng(0).integers(0, 256, size=768, dtype=np.uint8)
    for kind, mask in (("SegmentationClass", classes), ("SegmentationObject", objects)):
        image = Image.fromarray(mask, mode="P")
        image.putpalette(palette.tobytes())
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
