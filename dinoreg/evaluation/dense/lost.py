"""LOST (Siméoni et al., arXiv 2109.14279), object discovery without labels: one box from similarities of patches.

Patches of an object are alike among themselves and unlike the ground, which is most of the image. So the patch that is
alike to the fewest others is taken as the seed, other rare patches that are alike to it join, and the box goes around
the connected patches that are alike to these together (paper §3). "Alike" is a positive inner product; registers'
paper (arXiv 2309.16588, §3.3) adds a bias to the products first, because some models' are almost all positive.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import reworded


class Found(NamedTuple):
    """One object.

    box      x0, y0, x1, y1 in patches, ends exclusive
    mask     (rows, columns) bool: the connected patches that the box encloses
    seed     index of the patch that it grew from
    """

    box: tuple[int, int, int, int]
    mask: np.ndarray
    seed: int


def gram(features: Tensor, normalise: bool = False) -> Tensor:
    """Inner products (N, N) of patch features (N, D); of unit features, hence cosines, with `normalise`."""
    if normalise:
        features = F.normalize(features, dim=-1)
    return features @ features.mT


def by_degree(similarity: Tensor) -> Tensor:
    """Patches (N,) from the one with the fewest positive similarities to others; among equals the earlier one first.

    similarity  (N, N); a patch's similarity to itself does not count
    """
    positive = similarity > 0
    degree = positive.sum(dim=1) - positive.diagonal().long()
    return torch.argsort(degree, stable=True)


def expand(similarity: Tensor, order: Tensor, k: int = 100) -> Tensor:
    """Patches (s,) that join the seed order[0]: those among the k of lowest degree whose product with it is positive.

    similarity  (N, N)
    order       (N,) patches by ascending degree, as `by_degree` gives them
    """
    rare = order[:k]
    return rare[similarity[order[0], rare] > 0]


def lost(similarity: Tensor, grid: tuple[int, int], k: int = 100) -> Found:
    """The object that LOST finds.

    similarity  (N, N) inner products of the patches, row by row, with any bias added already
    grid        rows and columns, N = rows x columns
    k           patches of lowest degree that may join the seed; all of them where there are fewer
    raises      UserError without scipy
    """
    rows, columns = grid
    order = by_degree(similarity)
    seed = int(order[0])
    support = similarity[expand(similarity, order, k)].sum(dim=0).reshape(rows, columns)
    mask = component(support.cpu().numpy() > 0, divmod(seed, columns))
    y, x = np.nonzero(mask)
    return Found((int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1), mask, seed)


def component(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The 4-connected part (rows, columns) bool of a mask that holds the seed, or UserError without scipy.

    It is the seed alone where that is not in the mask; there the paper's code gives up.

    mask  (rows, columns) bool
    seed  (row, column)
    """
    with reworded(f"object discovery needs scipy: {install('scipy')}", ImportError):
        from scipy import ndimage
    if not mask[seed]:
        part = np.zeros(mask.shape, dtype=bool)
        part[seed] = True
        return part
    numbers, _ = ndimage.label(mask)
    return numbers == numbers[seed]
