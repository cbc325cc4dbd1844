"""Own data as pairs of files: `images/` with `masks/` (a class for every pixel) or with `depth/` (metres).

A pair has the same path below its two folders, but for the extension. Splits are folders, either outside
(`train/images`, `train/masks`, `test/images`, …) or inside (`images/train`, `masks/train`, …), or else held out.

masks  PNG whose pixel values (of a palette: the indices) are classes, 255 is not counted; as many classes as
       `classes.txt` has lines, or as occur
depth  PNG of 16 bits in millimetres, or .npy, .tif, .tiff of floats in metres; 0 (or not finite) is unknown
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.source import PathSource
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, Listing, parts
from dinoreg.evaluation.custom.tables import read_classes
from dinoreg.evaluation.data import IGNORED, Data, DepthMaps, Segmented
from dinoreg.evaluation.features.images import default_workers, parallel
from dinoreg.evaluation.readers.pixel_maps import (
    UNREADABLE,
    read_depth_map,
    read_label_map,
    require_size,
    unreadable,
)
from dinoreg.runtime.errors import UserError

SUFFIXES = {"masks": (".png",), "depth": (".png", ".npy", ".tif", ".tiff")}


@dataclass(frozen=True)
class Pairs:
    """Images and the mask or depth map of each, all relative to `root`; each's split, or None where nothing says so."""

    root: Path
    images: list[str]
    truths: list[str]
    words: list[str] | None

    def split(self, share: float, seed: int) -> tuple[dict[str, np.ndarray], str]:
        """Rows of each split, and how they were split in words."""
        groups = np.zeros(len(self.images), dtype=np.int64)
        return parts(self.words, groups, share, seed, self.root, per_class=False)

    def source(self, rows: np.ndarray) -> PathSource:
        return PathSource(str(self.root), PathBlock.of([self.images[row] for row in rows]))

    def stamp(self, rows: np.ndarray) -> str:
        """Changes when the masks or depth maps do."""
        return PathSource(str(self.root), PathBlock.of([self.truths[row] for row in rows])).stamp()

    def paths(self, row: int) -> tuple[Path, Path]:
        """The mask or depth map, and its image."""
        return self.root / self.truths[row], self.root / self.images[row]


def kinds_of_pairs(root: Path) -> list[str]:
    """Which of "masks" and "depth" lie beside a folder of images."""
    bases = _bases(root)
    return [kind for kind in SUFFIXES if any((root / base / kind).is_dir() for base in bases)]


def find_pairs(root: Path, kind: str) -> Pairs:
    """Every image with its mask or depth map; UserError naming the first that lacks one."""
    images: list[str] = []
    truths: list[str] = []
    words: list[str | None] = []
    listing = Listing(root)
    stems: dict[str, dict[str, list[str]]] = {}
    for base in _bases(root):
        paths = index_folder(root / base / "images")
        for path in (paths[number] for number in range(len(paths))):
            folder, name = os.path.split(path)
            stem = os.path.splitext(name)[0]
            place = os.path.join(base, kind, folder)
            if place not in stems:
                stems[place] = _by_stem(sorted(listing.names(place)), SUFFIXES[kind])
            matches = stems[place].get(stem, [])
            image = os.path.join(base, "images", path)
            if len(matches) != 1:
                what = f"has no {' or '.join(SUFFIXES[kind])}" if not matches else f"has {len(matches)} files"
                raise UserError(f"{root / image} {what} of the same name in {root / place}")
            images.append(image)
            truths.append(os.path.join(place, matches[0]))
            words.append(SPLIT_WORDS.get((base or folder.split(os.sep)[0]).lower()))
    repeated = [truth for truth, count in Counter(truths).items() if count > 1]
    if repeated:
        raise UserError(f"{root / repeated[0]}: belongs to two images of the same name")
    known = [word for word in words if word is not None]
    if "train" in known and None in words:
        raise UserError(f"{root / images[words.index(None)]}: lies in no split, though others lie in train")
    return Pairs(root, images, truths, known if len(known) == len(words) else None)


def segmented(pairs: Pairs, share: float, seed: int) -> Data:
    """The pairs as masks; without a classes.txt every mask is read once to count the classes."""
    names = read_classes(pairs.root / "classes.txt")
    if names is not None:
        num_classes = len(names)
    else:
        every = range(len(pairs.images))
        largest = parallel(lambda row: _largest(read_classes_of_pixels(*pairs.paths(row))), every, default_workers())
        num_classes = max(largest) + 1
    if not 2 <= num_classes <= IGNORED:
        raise UserError(f"{pairs.root}: masks have {num_classes} class(es), expected 2 to {IGNORED}")

    def mask(rows: np.ndarray, index: int) -> np.ndarray:
        path, image = pairs.paths(rows[index])
        classes = read_classes_of_pixels(path, image)
        if (largest := _largest(classes)) >= num_classes:
            raise UserError(f"{path}: label {largest} is out of range, expected 0..{num_classes - 1} or {IGNORED}")
        return classes

    rows, variant = pairs.split(share, seed)
    splits = {
        name: Segmented(pairs.source(part), partial(mask, part), num_classes, pairs.stamp(part))
        for name, part in rows.items()
    }
    return Data(splits, class_names=names or (), variant=variant)


def depths(pairs: Pairs, share: float, seed: int) -> Data:
    """The pairs as depth maps."""

    def depth(rows: np.ndarray, index: int) -> np.ndarray:
        return read_metres(*pairs.paths(rows[index]))

    rows, variant = pairs.split(share, seed)
    splits = {
        name: DepthMaps(pairs.source(part), partial(depth, part), pairs.stamp(part)) for name, part in rows.items()
    }
    return Data(splits, variant=variant)


def read_classes_of_pixels(path: Path, image: Path) -> np.ndarray:
    """A mask (H, W) uint8 of its image's size; UserError for colours, more than 8 bits in use, or another size."""
    values = read_label_map(path, image)
    if values.min() < 0 or values.max() > IGNORED:
        worst = int(values.max() if values.max() > IGNORED else values.min())
        raise UserError(f"{path}: label {worst} is out of range, expected 0..{IGNORED - 1} or {IGNORED}")
    return values.astype(np.uint8)


def read_metres(path: Path, image: Path) -> np.ndarray:
    """A depth map (H, W) float32 metres of its image's size, 0 where unknown; UserError for anything else."""
    metres = read_depth_map(path) if path.suffix.lower() == ".png" else _read_floats(path)
    if metres.min(initial=0) < 0:
        raise UserError(f"{path}: holds a depth of {metres.min():g} m, expected 0 (unknown) or more")
    require_size(f"{path}:", metres, image)
    return metres


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
    return [name for name in below if name.lower() in SPLIT_WORDS and (root / name / "images").is_dir()]


def _by_stem(names: Sequence[str], suffixes: Sequence[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not name.startswith("."):
            stems.setdefault(stem, []).append(name)
    return stems
