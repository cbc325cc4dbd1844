"""COCO 2017 in small: two image folders and two JSON files with true boxes, and the real ones' traps.

Traps: category ids with gaps, images out of order in the file, an image without objects, a grey one, a crowd with an
uncompressed RLE, a box without width, annotations in front of the images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.miniatures.pictures import Thing, arrange, save, scene

CATEGORIES = ((1, "person", "person"), (44, "bottle", "kitchen"), (90, "toothbrush", "indoor"))
CROWD_BOX = (1, 1, 13, 13)


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """coco/ with 3 x per_class pictures in train2017 and in val2017; returns that folder."""
    count = per_class * len(CATEGORIES)
    folder = root / "coco"
    for part, name in enumerate(("train2017", "val2017")):
        ids = [9 + 16 * number + 5 * part for number in range(count)]
        write_split(folder, name, "{:012d}.jpg", ids, shuffled=shuffled, seed=seed + 10 + part)
    return folder


def write_split(folder: Path, name: str, pattern: str, ids: Sequence[int], *, shuffled: bool, seed: int) -> None:
    """The images of a split and its annotations. Image 2 is grey, image 3 has no object, every fifth has a crowd."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, number in enumerate(ids):
        height, width = (84, 70) if place % 5 == 4 else (70, 84)
        things = _things(place, seed, height, width)
        path = folder / name / pattern.format(number)
        save(scene(things, seed * 1000 + place, height, width), path, "L" if place == 2 else "JPEG")
        if shuffled:
            drawn = int(np.random.default_rng([seed, place]).integers(10_000))
            things = _things(drawn, seed + 500 + place, height, width)
        images.append({"id": number, "file_name": path.name, "width": width, "height": height, "license": 1})
        annotations += [_annotation(number, thing, height, width) for thing in things]
        if place == 1:  # a box without width
            flat = {"bbox": [20.0, 30.0, 0.0, 12.0], "area": 0.0, "iscrowd": 0, "segmentation": []}
            annotations.append({"image_id": number, "category_id": 44, **flat})
    rng = np.random.default_rng(seed)
    for each, identity in zip(annotations, rng.permutation(len(annotations)).tolist()):
        each["id"] = 1000 + identity
    text = json.dumps(
        {
            "info": {"description": "generated", "year": 2017},
            "licenses": [{"id": 1, "name": "none", "url": ""}],
            "annotations": [annotations[index] for index in rng.permutation(len(annotations))],
            "images": [images[index] for index in rng.permutation(len(images))],
            "categories": [{"id": i, "name": n, "supercategory": s} for i, n, s in reversed(CATEGORIES)],
        }
    )
    path = folder / "annotations" / f"instances_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _things(place: int, seed: int, height: int, width: int) -> list[Thing]:
    if place == 3:
        return []
    first = place % len(CATEGORIES)
    labels = [first] if place % 4 else [first, (first + 1 + place // 4 % 2) % len(CATEGORIES)]
    things = arrange(labels, 1000 * seed + place, height, width)
    return [*things, Thing(0, CROWD_BOX, faint=True)] if place % 5 == 1 else things


def _annotation(image: int, thing: Thing, height: int, width: int) -> dict[str, Any]:
    """A faint thing is a crowd. Boxes have decimals, as polygons of real outlines give them."""
    x0, y0, x1, y1 = thing.box
    shared = {"image_id": image, "category_id": CATEGORIES[thing.label][0], "iscrowd": int(thing.faint)}
    if thing.faint:
        mask = np.zeros((height, width), dtype=bool)
        mask[y0:y1, x0:x1] = True
        flat = mask.T.ravel()  # column by column
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        outline: Any = {"counts": counts, "size": [height, width]}
        return {**shared, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(mask.sum()), "segmentation": outline}
    left, right = x0 + 0.25, x1 - 0.25
    polygon = [left, y0, right, y0, right, y1, left, y1]
    area = (right - left) * (y1 - y0)
    return {**shared, "bbox": [left, y0, right - left, y1 - y0], "area": area, "segmentation": [polygon]}
