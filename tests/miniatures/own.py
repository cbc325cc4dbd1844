"""Own data in miniature, one of each kind: folders of classes, of splits, a table of one or several labels, pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures.pictures import COLOURS, arrange, labels_for, pattern, save, scene

CLASSES = ("amber", "birch", "cedar")
# All 256 colours: with fewer, Pillow packs the indices into fewer bits and loses 255.
PALETTE = np.concatenate([np.zeros((1, 3)), COLOURS, np.full((249, 3), 224)]).astype(int).ravel().tolist()


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/own_folder/<class>/<number>.jpg`, with a PNG under `.jpg`, a text file and a hidden picture."""
    folder = root / "own_folder"
    shown, told = labels_for(2 * per_class * len(CLASSES), len(CLASSES), shuffled, seed)
    for index in range(len(told)):
        path = folder / CLASSES[told[index]] / f"{index:03d}.jpg"
        save(pattern(int(shown[index]), seed * 1000 + index), path, "PNG" if index == 4 else "JPEG")
    (folder / "notes.txt").write_text("not an image\n")
    save(pattern(1, 0), folder / CLASSES[0] / ".hidden.jpg")
    return folder


def write_splits(
    root: Path,
    *,
    per_class: int = 6,
    shuffled: bool = False,
    seed: int = 0,
    splits: tuple[str, ...] = ("train", "test"),
) -> Path:
    """`root/own_splits/{train,test,…}/<class>/<number>.png`, `per_class` of each in each."""
    folder = root / "own_splits"
    for number, split in enumerate(splits):
        shown, told = labels_for(per_class * len(CLASSES), len(CLASSES), shuffled, seed + number)
        for index in range(len(told)):
            path = folder / split / CLASSES[told[index]] / f"{index:03d}.png"
            save(pattern(int(shown[index]), (seed + number) * 1000 + index), path, "PNG")
    return folder


def write_csv(
    root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, split: bool = True, several: bool = False
) -> Path:
    """`root/own_table/labels.csv` beside `pictures/`; with `several`, labels such as `amber|warm`."""
    folder = root / "own_table"
    shown, told = labels_for(2 * per_class * len(CLASSES), len(CLASSES), shuffled, seed)
    rows = ["path,label,split" if split else "path,label"]
    for index in range(len(told)):
        path = f"pictures/{index:03d}.jpg"
        save(pattern(int(shown[index]), seed * 1000 + index), folder / path)
        label = CLASSES[told[index]] + ("|warm" if several and told[index] != 1 else "")
        rows.append(f"{path},{label}" + (f",{'train' if index < len(told) // 2 else 'test'}" if split else ""))
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "labels.csv"


def write_masks(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/own_masks/{images,masks}`: scenes of 70 x 84 pixels, three objects' classes and ground, edges ignored.

    Even masks have a palette, odd ones are grey. Shuffled masks belong to other images.
    """
    folder = root / "own_masks"
    count = 2 * per_class * len(CLASSES)
    things = [
        arrange([index % 3, (index + 1) % 3] if index % 2 else [index % 3], seed + index) for index in range(count)
    ]
    order = np.random.default_rng([seed, 99]).permutation(count) if shuffled else np.arange(count)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        save(scene(things[index], seed + index), folder / "images" / f"{index:03d}.jpg")
        mask = np.zeros((70, 84), dtype=np.uint8)
        for label, (x0, y0, x1, y1), _ in things[int(order[index])]:
            mask[y0:y1, x0:x1] = 255
            mask[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = label + 1
        picture = Image.fromarray(mask)
        if index % 2 == 0:
            picture.putpalette(PALETTE)
        picture.save(folder / "masks" / f"{index:03d}.png")
    return folder


def write_depth(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/own_depth/{images,depth}`: 56 x 70 pixels, near is bright; maps of millimetres as PNG, .npy, .tiff in turn.

    The left column is unknown. Shuffled maps belong to other images.
    """
    folder = root / "own_depth"
    (folder / "depth").mkdir(parents=True, exist_ok=True)
    count = 2 * per_class * len(CLASSES)
    maps = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        metres = np.full((56, 70), rng.uniform(3, 5))
        x, y = int(rng.integers(0, 3)) * 14, int(rng.integers(0, 2)) * 14
        metres[y : y + 28, x : x + 28] = rng.uniform(1, 2)
        maps.append(metres)
        image = (250 - 45 * metres)[..., None] + rng.normal(scale=3, size=(56, 70, 3))
        save(Image.fromarray(np.uint8(np.clip(image, 0, 255))), folder / "images" / f"{index:03d}.png", "PNG")
    order = np.random.default_rng([seed, 99]).permutation(count) if shuffled else np.arange(count)
    for index in range(count):
        metres = maps[int(order[index])].astype(np.float32)
        metres[:, 0] = np.nan if index % 3 == 1 else 0
        path = folder / "depth" / f"{index:03d}"
        if index % 3 == 0:
            Image.fromarray(np.uint16(np.rint(metres * 1000))).save(path.with_suffix(".png"))
        elif index % 3 == 1:
            np.save(path.with_suffix(".npy"), 1000 * metres)
        else:
            Image.fromarray(1000 * metres).save(path.with_suffix(".tiff"))
    return folder
