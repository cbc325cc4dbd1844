"""Own data as pairs of files: `images/` with `masks/` (a class for every pixel) or with `depth/`.

A pair has the same path below its two folders, but for the extension and a tail of the truth's name such as `_mask`.
Splits are folders, either outside (`train/images`, `train/masks`, `test/images`, …) or inside (`images/train`,
`masks/train`, …), or else held out. What the files hold, `masks` and `depth_maps` say.
"""

import os
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from dinoreg.data.copies import MOST_COMPARED, find_copies
from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.source import PathSource
from dinoreg.data.split_names import split_of
from dinoreg.evaluation.custom.splits import copies_across, parts
from dinoreg.evaluation.custom.upright import Pairs
from dinoreg.runtime.errors import UserError, readable

# JPEGs among masks are found, so that they are refused by name.
SUFFIXES = {
    "masks": (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg"),
    "depth": (".png", ".npy", ".tif", ".tiff"),
}
PASSES, FEWEST_STEPS = 100, 200  # over the training images, that heads on own data are trained for
_TAIL = re.compile(r"[-_. ](?:masks?|seg(?:mentation)?|labels?|gt|depth)$", re.IGNORECASE)


def kinds_of_pairs(root: Path) -> list[str]:
    """Which of "masks" and "depth" lie beside a folder of images; UserError for a folder that cannot be read."""
    bases = _bases(root)
    return [kind for kind in SUFFIXES if any((root / base / kind).is_dir() for base in bases)]


def find_pairs(root: Path, kind: str, share: float, seed: int) -> tuple[Pairs, str, list[str]]:
    """Every image with its mask or depth map, by split, how they were split in words, and warnings of copies.

    Copies of a picture are held out together; across given splits they are a warning.

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
        for stem in [*found]:
            found.setdefault(_TAIL.sub("", stem), found[stem])
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
    everything = PathSource(str(root), PathBlock.of(images))
    copies = find_copies(everything) if len(images) <= MOST_COMPARED else None
    rows, variant = parts(given, np.zeros(len(images)), share, seed, root, per_class=False, copies=copies)
    warnings = copies_across(rows, copies) if copies is not None else []

    def source(paths: list[str], chosen: np.ndarray) -> PathSource:
        chosen_paths = PathSource(str(root), PathBlock.of([paths[row] for row in chosen]))
        chosen_paths.as_trained = True
        return chosen_paths

    pairs = {split: (source(images, chosen), source(truths, chosen)) for split, chosen in rows.items()}
    return pairs, variant, warnings


def training_length(images: int, steps: int, batch_size: int) -> dict[str, int]:
    """Options of a head that is trained on so many images: PASSES over them, of FEWEST_STEPS to `steps` steps.

    steps, batch_size  published, for a benchmark of tens of thousands of images
    """
    batch_size = min(batch_size, images)
    wanted = max(-(-PASSES * images // batch_size), FEWEST_STEPS)
    return {"steps": min(wanted, steps), "batch_size": batch_size}


def _bases(root: Path) -> list[str]:
    """Folders that hold `images`: the root itself, or folders below it that are called like a split."""
    if (root / "images").is_dir():
        return [""]
    with readable(f"{root}:"):
        below = sorted(os.listdir(root))
    return [name for name in below if split_of(name) and (root / name / "images").is_dir()]
