"""Own data as pairs of files: `images/` with `masks/` (a class for every pixel) or with `depth/` (metres).

A pair has the same path below its two folders, but for the extension. Splits are folders, either outside
(`train/images`, `train/masks`, `test/images`, …) or inside (`images/train`, `masks/train`, …), or else held out.

masks  PNG whose pixel values (of a palette: the indices) are classes, 255 is not counted; as many classes as
       `classes.txt` has lines, or as occur
depth  PNG of 16 bits in millimetres, or .npy, .tif, .tiff of floats in metres; 0 (or not finite) is unknown
"""

import os
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.labelled import read_classes
from dinoreg.data.source import PathSource
from dinoreg.data.split_names import split_of
from dinoreg.evaluation.custom.splits import parts
from dinoreg.evaluation.data import IGNORED, Data, DepthMaps, Segmented
from dinoreg.evaluation.features.images import default_workers, parallel
from dinoreg.evaluation.readers.files import paired
from dinoreg.evaluation.readers.pixel_maps import (
    UNREADABLE,
    read_depth_map,
    read_mask,
    require_size,
    turned_with,
    unreadable,
)
from dinoreg.runtime.errors import UserError

SUFFIXES = {"masks": (".png",), "depth": (".png", ".npy", ".tif", ".tiff")}


Pairs = dict[str, tuple[PathSource, PathSource]]  # {split: (its images, the mask or depth map of each)}


def kinds_of_pairs(root: Path) -> list[str]:
    """Which of "masks" and "depth" lie beside a folder of images; UserError for a folder that cannot be read."""
    bases = _bases(root)
    return [kind for kind in SUFFIXES if any((root / base / kind).is_dir() for base in bases)]


def find_pairs(root: Path, kind: str, share: float, seed: int) -> tuple[Pairs, str]:
    """Every image with its mask or depth map, by split, and in words how they were split.

    kind         "masks" or "depth"
    share, seed  share in (0, 1) and seed of the held-out images where the folders name no test split

    Raises UserError naming the first image that lacks its file, has several, or lies in no split beside a training
    split.
    """
    images: list[str] = []
    truths: list[str] = []
    words: list[str | None] = []

    @cache
    def names_by_stem(place: str) -> dict[str, list[str]]:
        found = defaultdict(list)
        for name in sorted(os.listdir(root / place)) if (root / place).is_dir() else ():
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES[kind] and name[0] != ".":
                found[stem].append(name)
        return found

    for base in _bases(root):
        paths = index_folder(root / base / "images")
        for path in (paths[number] for number in range(len(paths))):
            folder, name = os.path.split(path)
            place, image = os.path.join(base, kind, folder), os.path.join(base, "images", path)
            matches = names_by_stem(place).get(os.path.splitext(name)[0], [])
            if len(matches) != 1:
                what = f"has no {' or '.join(SUFFIXES[kind])}" if not matches else f"has {len(matches)} files"
                raise UserError(f"{root / image} {what} of the same name in {root / place}")
            images.append(image)
            truths.append(os.path.join(place, matches[0]))
            words.append(split_of(base or folder.split(os.sep)[0]))
    repeated = [truth for truth, count in Counter(truths).items() if count > 1]
    if repeated:
        raise UserError(f"{root / repeated[0]}: belongs to two images of the same name")
    known = [word for word in words if word is not None]
    if "train" in known and None in words:
        raise UserError(f"{root / images[words.index(None)]}: lies in no split, though others lie in train")
    given = known if len(known) == len(words) else None
    rows, variant = parts(given, np.zeros(len(images)), share, seed, root, per_class=False)

    def source(paths: list[str], chosen: np.ndarray) -> PathSource:
        found = PathSource(str(root), PathBlock.of([paths[row] for row in chosen]))
        found.as_trained = True
        return found

    return {split: (source(images, chosen), source(truths, chosen)) for split, chosen in rows.items()}, variant


def segmented(root: Path, pairs: Pairs, variant: str) -> Data:
    """The pairs as images with masks; without a classes.txt every mask is read once to count the classes.

    variant  how they were split, in words
    raises   UserError for a number of classes outside 2..255, and for a mask that cannot be read
    """
    names = read_classes(root) or []
    num_classes = len(names) or max(_largest_class(*sources) for sources in pairs.values()) + 1
    if not 2 <= num_classes <= IGNORED:
        raise UserError(f"{root}: masks have {num_classes} class(es), expected 2 to {IGNORED}")

    def read(path: Path, image: Path) -> np.ndarray:
        return turned_with(read_mask(path, image, range(num_classes)), image)

    splits = {split: paired(Segmented, *sources, read, num_classes) for split, sources in pairs.items()}
    return Data(splits, names, variant)


def _largest_class(images: PathSource, masks: PathSource) -> int:
    """The largest class of some masks; -1 where every pixel is ignored."""

    def largest(index: int) -> int:
        mask = read_mask(Path(masks.name(index)), Path(images.name(index)), range(IGNORED))
        return max(np.setdiff1d(mask, IGNORED).tolist(), default=-1)

    return max(parallel(largest, range(len(masks)), default_workers()))


def depths(_root: Path, pairs: Pairs, variant: str) -> Data:
    """The pairs as images with depth maps in metres, read on access; `variant` says in words how they were split."""
    splits = {split: paired(DepthMaps, *sources, read_metres) for split, sources in pairs.items()}
    return Data(splits, variant=variant)


def read_metres(path: Path, image: Path) -> np.ndarray:
    """A depth map (H, W) float32 metres of its image's size, 0 where unknown.

    path   PNG of 16 bits in millimetres, or .npy or TIFF of floats in metres
    raises UserError naming a file that is missing, unreadable, of another type or size, or negative somewhere
    """
    metres = read_depth_map(path) if path.suffix.lower() == ".png" else _read_floats(path)
    if metres.min(initial=0) < 0:
        raise UserError(f"{path}: holds a depth of {metres.min():g} m, expected 0 (unknown) or more")
    require_size(f"{path}:", metres, image)
    return turned_with(metres, image)


def _read_floats(path: Path) -> np.ndarray:
    """Metres from a .npy or TIFF file of floats, 0 where they are not finite."""
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as opened:
                values = np.asarray(opened)
    except UNREADABLE as error:
        raise unreadable(f"{path}:", "a depth map", error) from None
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2 or values.dtype.kind != "f":
        raise UserError(f"{path}: holds {values.dtype} {values.shape}, expected (height, width) of floats in metres")
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


def _largest(mask: np.ndarray) -> int:
    """The largest class of a mask; -1 where every pixel is ignored."""
    used = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED])
    return int(used[-1]) if len(used) else -1


def _bases(root: Path) -> list[str]:
    """Folders that hold `images`: the root itself, or folders below it that are called like a split."""
    if (root / "images").is_dir():
        return [""]
    try:
        below = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror})") from None
    return [name for name in below if split_of(name) and (root / name / "images").is_dir()]
