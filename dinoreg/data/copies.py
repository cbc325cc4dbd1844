"""Which images of a set are copies of one another: equal files, and pictures that were only saved anew or resized.

A copy on both sides of a split is a test question that was in the book (Barz & Denzler 2020, "Do we train on test
data?", arXiv 1902.00423).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dinoreg.data.decode import EncodedImage, alone_if_large
from dinoreg.data.source import Source
from dinoreg.data.value_range import BadImage, missing_values
from dinoreg.runtime.digest import content_digest
from dinoreg.runtime.environment import usable_cores
from dinoreg.runtime.parallel import parallel

THUMBNAIL = 16  # pixels a side of what near-equal pictures are compared by
MOST_COMPARED = 20_000  # pictures up to which an evaluation looks for copies
SAME = 1.5  # levels of 255 by which the thumbnails of one picture may differ on average
LEAST_CONTRAST = 8.0  # levels; flatter pictures are alike without being copies
_FLAT = 0.25  # levels of contrast below which a picture shows nothing but its rounding
_AT_ONCE = 512


class Copies(NamedTuple):
    """Contents of images, and who is whose copy.

    digests  (n, 32) uint8, SHA-256 of each file; zeros for one that cannot be read
    groups   (n,) int64, the same number for copies: the place of the first of them
    looks    (n,) float64, a number of what a picture shows, which other bits, brightness or contrast leave where it is;
             0 for a flat one. None: of all
    """

    digests: np.ndarray
    groups: np.ndarray
    looks: np.ndarray | None = None

    def order(self) -> np.ndarray:
        """The images by what they show, (n,) int64: the same for a folder and a table, for sixteen bits and eight."""
        return np.lexsort(self.digests.T if self.looks is None else (*self.digests.T, self.looks))

    def shuffled(self, seed: int) -> np.ndarray:
        """The place of each image, (n,) int64, when what `order` gives is shuffled by a seed, copies with the first."""
        first = np.full(len(self.groups), len(self.groups))
        np.minimum.at(first, self.groups[self.order()], np.arange(len(self.groups)))
        places = np.random.default_rng([seed, 1729]).permutation(len(self.groups))
        return places[first[self.groups]]


def find_copies(source: Source) -> Copies:
    """The contents of the images of a source; every file is read once.

    Two pictures are one when their files are equal, or when their thumbnails are: 16 x 16 pixels that differ by at most
    1.5 levels of 255 on average, of pictures that are not flat.
    """

    def look(index: int) -> tuple[bytes, torch.Tensor | None]:
        try:
            data = source.read(index)
        except (BadImage, OSError):
            return bytes(32), None
        try:
            with alone_if_large(data):
                return content_digest(data), _thumbnail(EncodedImage(data, min_side=1))
        except BadImage:
            return content_digest(data), None

    found = list(parallel(look, range(len(source)), usable_cores()))
    digests = np.frombuffer(b"".join(digest for digest, _ in found), dtype=np.uint8).reshape(-1, 32)
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    groups = first[inverse.ravel()].astype(np.int64)
    readable = digests.any(axis=1)
    groups[~readable] = np.flatnonzero(~readable)
    thumbnails = [thumbnail for _, thumbnail in found]
    _join_near(groups, [None if each is None or each.std() < LEAST_CONTRAST else each.numpy() for each in thumbnails])
    direction = torch.randn(THUMBNAIL**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Copies(digests, groups, np.array([0.0 if each is None else _look(each, direction) for each in thumbnails]))


def _look(thumbnail: torch.Tensor, direction: torch.Tensor) -> float:
    """Where a thumbnail (C * 16 * 16,) lies along a direction (16 * 16,), its mean and its contrast taken out."""
    grey = thumbnail.view(-1, THUMBNAIL**2).double().mean(dim=0)
    contrast = grey.std()
    return float((grey - grey.mean()) @ direction / contrast) if contrast > _FLAT else 0.0


def _thumbnail(image: EncodedImage) -> torch.Tensor:
    """(C * 16 * 16,) float32 in 0..255 of all channels that the file has."""
    raw = image.raw
    if raw is None or (raw.values.dtype == np.uint8 and raw.values.shape[2] in (1, 3)):
        pixels = image.pixels().float()
    else:  # no model and no range is known here: from the picture's least value to its greatest
        values = np.where(missing_values(raw.values, raw.nodata), np.nan, raw.values.astype(np.float32))
        low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0, 0)
        scaled = np.nan_to_num((values - low) * np.float32(255 / max(high - low, 1e-12)))
        pixels = image.oriented(torch.from_numpy(scaled).permute(2, 0, 1))
    return F.interpolate(pixels[None], (THUMBNAIL, THUMBNAIL), mode="area").flatten()


def _join_near(groups: np.ndarray, thumbnails: Sequence[np.ndarray | None]) -> None:
    """Give near-equal pictures, of equally many channels, the group of the first of them, in place."""
    lengths = np.array([0 if each is None else len(each) for each in thumbnails])
    for length in np.unique(lengths[lengths > 0]):
        places = np.flatnonzero(lengths == length)
        values = torch.from_numpy(np.stack([each for each in thumbnails if each is not None and len(each) == length]))
        for start in range(0, len(places), _AT_ONCE):
            distances = torch.cdist(values[start : start + _AT_ONCE], values, p=1.0) / values.shape[1]
            for row, column in (distances <= SAME).nonzero().tolist():
                one, other = sorted((groups[places[start + row]], groups[places[column]]))
                if one != other:
                    groups[groups == other] = one
