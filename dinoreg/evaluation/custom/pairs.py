"""Own data as pairs of files: `images/` with `masks/` (a class for every pixel) or with `depth/`.

A pair has the same path below its two folders, but for the extension and a tail of the truth's name such as `_mask`.
Splits are folders, either outside (`train/images`, `train/masks`, `test/images`, …) or inside (`images/train`,
`masks/train`, …), or else held out. What the files hold, `maps` says.

Where a picture's EXIF orientation turns it, its truth must lie over the upright picture. It may have been drawn on the
picture as a viewer shows it, or on its pixels as the file has them. Where turning changes the size, the size says
which; of square pictures and half turns a tag of the truth's own does, or else the other pictures of the set.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from dinoreg.data.copies import MOST_COMPARED, find_copies
from dinoreg.data.decode import EncodedImage, orient
from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.source import PathSource
from dinoreg.data.split_names import split_of
from dinoreg.data.value_range import BadImage
from dinoreg.evaluation.custom.splits import copies_across, parts
from dinoreg.evaluation.readers.pixel_maps import PixelFile
from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.parallel import parallel, show_progress

# JPEGs among masks are found, so that they are refused by name.
SUFFIXES = {
    "masks": (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg"),
    "depth": (".png", ".npy", ".tif", ".tiff"),
}
PASSES, FEWEST_STEPS = 100, 200  # over the training images, that heads on own data are trained for
CERTAIN, AS_SHOWN, AS_STORED, EITHER = range(4)  # how a truth lies to its picture
Pairs = dict[str, tuple[PathSource, PathSource]]  # {split: (its images, the mask or depth map of each)}
T = TypeVar("T")
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
    rows, variant = parts(given, np.zeros(len(images)), share, seed, root, copies)
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


class Survey(NamedTuple):
    """What one look at every pair has found, by split.

    found     {split: what was asked for of each truth}
    turns     {split: (n,) the orientation that each truth is turned by}
    sides     (n,) short side of every upright picture in pixels
    warnings  on truths that could lie either way
    """

    found: dict[str, list]
    turns: dict[str, np.ndarray]
    sides: np.ndarray
    warnings: list[str]


def survey(pairs: Pairs, read: Callable[[Path], PixelFile], ask: Callable[[Path, PixelFile], T], what: str) -> Survey:
    """Read every truth once, beside the header of its picture.

    read, ask  file of a truth -> its numbers; (file, numbers) -> what is to be known of it
    what       the truths, in messages: "masks"
    raises     UserError naming a picture that cannot be read, or a truth of another size than its picture
    """
    found: dict[str, list] = {}
    lies: dict[str, list[tuple[int, int]]] = {}
    sides = []
    for split, (images, truths) in pairs.items():

        def one(index: int, images: PathSource = images, truths: PathSource = truths) -> tuple:
            path, name = Path(truths.name(index)), images.name(index)
            with reworded(f"{name}: cannot be read as an image", BadImage):
                image = images.image(index)
            pixels = read(path)
            return ask(path, pixels), _lie(image, pixels, path, name), min(image.height, image.width)

        looked = parallel(one, range(len(images)))
        rows = list(show_progress(looked, len(images), f"looking at the {what} of {split}"))
        found[split], lies[split] = [row[0] for row in rows], [row[1] for row in rows]
        sides += [row[2] for row in rows]
    kinds = [kind for each in lies.values() for _, kind in each]
    stored = AS_STORED in kinds and AS_SHOWN not in kinds
    turns = {
        split: np.array([1 if kind == AS_SHOWN or (kind == EITHER and not stored) else turn for turn, kind in each])
        for split, each in lies.items()
    }
    how = "turned with them, as those of the others are" if stored else "taken to lie upright"
    unclear = (
        f"turned pictures: {kinds.count(EITHER):,} are turned by EXIF, which keeps their size: their {what} were {how}"
    )
    return Survey(found, turns, np.array(sides), [unclear] * (EITHER in kinds))


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """A map (H, W), turned by an EXIF orientation."""
    return orient(torch.from_numpy(np.ascontiguousarray(values))[None], orientation)[0].numpy()


def _lie(image: EncodedImage, pixels: PixelFile, path: Path, name: str) -> tuple[int, int]:
    """(orientation, how the truth lies): it is turned by the orientation if it lies as its picture is stored."""
    upright, shape = (image.height, image.width), pixels.values.shape[:2]
    stored = upright[::-1] if image.orientation >= 5 else upright
    if pixels.turn != 1 and (shape[::-1] if pixels.turn >= 5 else shape) == upright:
        return pixels.turn, CERTAIN
    if shape not in (upright, stored):
        by_exif = ", turned upright" if stored != upright else ""
        sizes = f"{shape[1]} x {shape[0]} pixels, its image {Path(name).name} is {upright[1]} x {upright[0]}{by_exif}"
        raise UserError(f"{path}: is {sizes}")
    if image.orientation == 1:
        return 1, CERTAIN
    kind = EITHER if upright == stored else AS_SHOWN if shape == upright else AS_STORED
    return image.orientation, kind
