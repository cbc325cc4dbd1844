"""Masks and depth maps of pictures that their EXIF orientation turns: each truth must lie over the upright picture.

A truth may have been drawn on the picture as a viewer shows it, or on its pixels as the file has them. Where turning
changes the size, the size says which; of square pictures and half turns a tag of the truth's own does, or else the
other pictures of the set.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from dinoreg.data.decode import EncodedImage, orient
from dinoreg.data.source import PathSource
from dinoreg.data.value_range import BadImage
from dinoreg.evaluation.readers.pixel_maps import PixelFile
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.progress import show_progress

Pairs = dict[str, tuple[PathSource, PathSource]]  # {split: (its images, the mask or depth map of each)}
T = TypeVar("T")
CERTAIN, AS_SHOWN, AS_STORED, EITHER = range(4)  # how a truth lies to its picture


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
