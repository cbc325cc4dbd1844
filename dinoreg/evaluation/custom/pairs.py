"""Own data as pairs of files: `images/` with `masks/` (a class for every pixel) or with `depth/` (metres).

A pair has the same path below its two folders, but for the extension. Splits are folders, either outside
(`train/images`, `train/masks`, `test/images`, …) or inside (`images/train`, `masks/train`, …), or else held out.

masks  PNG whose pixel values (of a palette: the indices) are classes, 255 is not counted; as many classes as
       `classes.txt` has lines, or as occur
depth  PNG of 16 bits in millimetres, or .npy, .tif, .tiff of floats in metres; 0 (or not finite) is unknown
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.sources import PathSource
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, parts
from dinoreg.evaluation.custom.tables import read_classes
from dinoreg.evaluation.data import IGNORED, Data, DepthMaps, Segmented, Split
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
    """Images and the mask or depth map of each, all relative to `root`; rows of each split, and how it was split."""

    root: Path
    images: list[str]
    truths: list[str]
    rows: dict[str, np.ndarray]
    variant: str

    def files(self, row: int) -> tuple[Path, Path]:
        """The mask or depth map, and its image."""
        return self.root / self.truths[row], self.root / self.images[row]

    def data(
        self,
        kind: Callable[..., Split],
        read: Callable[[Path, Path], np.ndarray],
        *extra: int,
        names: Sequence[str] = (),
    ) -> Data:
        """Each split as a `kind` of images with what `read` gives of the files of one; `extra` goes between."""

        def truth(rows: np.ndarray, index: int) -> np.ndarray:
            return read(*self.files(rows[index]))

        splits = {}
        for split, rows in self.rows.items():
            images, truths = (
                PathSource(str(self.root), PathBlock.of([paths[row] for row in rows]))
                for paths in (self.images, self.truths)
            )
            splits[split] = kind(images, partial(truth, rows), *extra, truths.stamp())
        return Data(splits, names, self.variant)


def kinds_of_pairs(root: Path) -> list[str]:
    """Which of "masks" and "depth" lie beside a folder of images."""
    bases = _bases(root)
    return [kind for kind in SUFFIXES if any((root / base / kind).is_dir() for base in bases)]


def find_pairs(root: Path, kind: str, share: float, seed: int) -> Pairs:
    """Every image with its mask or depth map; UserError naming the first that lacks one.

    share, seed  of the images that are held out where folders do not say what is tested
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
            words.append(SPLIT_WORDS.get((base or folder.split(os.sep)[0]).lower()))
    repeated = [truth for truth, count in Counter(truths).items() if count > 1]
    if repeated:
        raise UserError(f"{root / repeated[0]}: belongs to two images of the same name")
    known = [word for word in words if word is not None]
    if "train" in known and None in words:
        raise UserError(f"{root / images[words.index(None)]}: lies in no split, though others lie in train")
    split_of = known if len(known) == len(words) else None
    return Pairs(root, images, truths, *parts(split_of, np.zeros(len(images)), share, seed, root, per_class=False))


def segmented(pairs: Pairs) -> Data:
    """The pairs as masks; without a classes.txt every mask is read once to count the classes."""
    names = read_classes(pairs.root / "classes.txt") or []
    num_classes = len(names)
    if not names:

        def largest(row: int) -> int:
            mask = read_mask(*pairs.files(row))
            return max(np.setdiff1d(mask, IGNORED).tolist(), default=-1)

        num_classes = max(parallel(largest, range(len(pairs.images)), default_workers())) + 1
    if not 2 <= num_classes <= IGNORED:
        raise UserError(f"{pairs.root}: masks have {num_classes} class(es), expected 2 to {IGNORED}")
    return pairs.data(Segmented, partial(read_mask, num_classes=num_classes), num_classes, names=names)


def depths(pairs: Pairs) -> Data:
    """The pairs as depth maps."""
    return pairs.data(DepthMaps, read_metres)


def read_mask(path: Path, image: Path, num_classes: int = IGNORED) -> np.ndarray:
    """A mask (H, W) uint8 of its image's size; UserError for colours, a class out of range, or another size."""
    values = read_label_map(path, image)
    wrong = values[(values < 0) | ((values >= num_classes) & (values != IGNORED))]
    if wrong.size:
        raise UserError(f"{path}: label {wrong.max()} is out of range, expected 0..{num_classes - 1} or {IGNORED}")
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
