"""Artifact tokens: patches whose norm is out of proportion to the others' (Registers, arXiv 2309.16588, §2.1 and §2.2).
Large models keep global information about the image in a few patches that hold little local information. Such a token
is recognised by its L2 norm, before the final norm (which would level it). The paper's limit, 150, was picked by hand
for DINOv2-g; scales differ between models, so the limit here is each model's own, and a second measure says whether
the tokens beyond it are a group of their own or only the end of a tail. Everything here is a function of tensors.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_LIMIT = 150.0  # a norm; for DINOv2-g only
LEAST_RATIO = 2.0  # no norm below this many medians is an outlier, however narrow the bulk
LEAST_SHARE, LEAST_COUNT = 5e-4, 5  # a smaller share or number of outliers is taken for chance
LOW_INFORMATION = 0.25  # the share of patches, those most like their neighbours, that count as of low information


class Limit(NamedTuple):
    """The norm at which outliers begin.

    value      a patch with a larger norm is an outlier
    median     of the norms
    deviation  of the natural logarithm of the norms, robust: 1.4826 MAD
    """

    value: float
    median: float
    deviation: float


class Outliers(NamedTuple):
    """What a set of norms shows.

    kind     "none", "tail" (large norms that follow on from the rest), or "group" (apart from the rest)
    patches  number above the limit
    share    of all patches, in [0, 1]
    ratio    median norm of the outliers over the median of all; 0 without outliers
    largest  the largest norm over the median
    valley   density of tokens in the emptiest place between bulk and outliers, over that among the outliers; below
             0.5 the outliers are a group, in a falling tail it is about 1 or more; infinite without outliers
    """

    kind: str
    patches: int
    share: float
    ratio: float
    largest: float
    valley: float


def robust_limit(norms: Tensor) -> Limit:
    """The limit of one model and layer: median x max(2, exp(4 deviations of the log norms)).

    norms   any shape, finite, above 0

    Logarithms, because norms spread by factors; median and MAD, because the outliers themselves must not move the
    limit; the factor 2, because a bulk of almost equal norms would otherwise put it next to the median.
    """
    norms = norms.detach().flatten().double()
    logs = norms.clamp(min=1e-12).log()
    middle = logs.median()
    deviation = float(1.4826 * (logs - middle).abs().median())  # that of a normal distribution, by its MAD
    median = float(middle.exp())
    # Beyond 4 deviations lie 3 in 100,000 of a log-normal bulk.
    return Limit(median * max(LEAST_RATIO, math.exp(4 * deviation)), median, deviation)


def find_outliers(norms: Tensor, limit: Limit) -> Outliers:
    """What the norms of one layer, in any shape and at least one, show against a limit."""
    norms = norms.detach().flatten().double()
    above = norms[norms > limit.value]
    count, share = len(above), len(above) / len(norms)
    largest = float(norms.max()) / limit.median
    if not count:
        return Outliers("none", 0, 0.0, 0.0, largest, math.inf)
    valley = _valley(norms.clamp(min=1e-12).log(), math.log(limit.median), float(above.log().median()))
    enough = count >= LEAST_COUNT and share >= LEAST_SHARE
    kind = "none" if not enough else "group" if valley < 0.5 else "tail"
    return Outliers(kind, count, share, float(above.median()) / limit.median, largest, valley)


class Found(NamedTuple):
    """What the norms after every block show: the last block's limit, and the patches (B, N) bool beyond it.

    onset  the block from which they stand out, see `onset`; None where `kind` is "none"
    """

    limit: Limit
    outliers: Outliers
    mask: Tensor
    onset: int | None


def find(norms: Tensor) -> Found:
    """The outliers by norms (L, B, N) of the patches after each block, before the final norm."""
    limit = robust_limit(norms[-1])
    outliers, mask = find_outliers(norms[-1], limit), norms[-1] > limit.value
    return Found(limit, outliers, mask, onset(norms, mask) if outliers.kind != "none" else None)


def _valley(logs: Tensor, bulk: float, outliers: float) -> float:
    """Tokens in the emptiest window between two places on the axis of log norms, over those around the second."""
    width = (outliers - bulk) / 4
    ordered = logs.sort().values

    def inside(centres: Tensor) -> Tensor:
        low, high = (torch.searchsorted(ordered, centres + sign * width / 2) for sign in (-1, 1))
        return (high - low).double()

    between = torch.linspace(bulk, outliers, 33, dtype=torch.float64)
    return float(inside(between).min() / inside(between[-1:]).clamp(min=1)[0])


def neighbour_cosine(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much every patch resembles the up to four beside it: their mean cosine (Registers, figure 5a).

    patches  (B, N, D), row by row: as in the paper those of the patch embedding, before positions are added
    grid     rows and columns, N = rows x columns
    returns  (B, N) float32 in [-1, 1]; 1 where a grid has a single patch
    """
    unit = F.normalize(patches.float(), dim=-1).unflatten(1, grid)  # (B, h, w, D)
    down, right = (unit[:, 1:] * unit[:, :-1]).sum(-1), (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    total, count = _of_both_sides(down, right), _of_both_sides(torch.ones_like(down), torch.ones_like(right))
    return torch.where(count > 0, total / count.clamp(min=1), torch.ones_like(total)).flatten(1)


def _of_both_sides(down: Tensor, right: Tensor) -> Tensor:
    """Values of pairs of neighbours, (B, h - 1, w) and (B, h, w - 1), summed up at both of a pair: (B, h, w)."""
    vertical = F.pad(down, (0, 0, 1, 0)) + F.pad(down, (0, 0, 0, 1))
    return vertical + F.pad(right, (1, 0)) + F.pad(right, (0, 1))


def low_information(cosine: Tensor, share: float = LOW_INFORMATION) -> Tensor:
    """The patches that repeat their surroundings: the `share` of all with the highest neighbour cosine.

    cosine   (B, N)
    share    in [0, 1], over all images together, so that a plain image may have more of them
    returns  (B, N) bool on the CPU
    """
    count = max(round(share * cosine.numel()), 1)
    chosen = torch.zeros(cosine.numel(), dtype=torch.bool)
    chosen[cosine.flatten().argsort(descending=True, stable=True)[:count].cpu()] = True
    return chosen.view(cosine.shape)


def border(grid: tuple[int, int]) -> Tensor:
    """(N,) bool: the patches at the edge of an image of `grid` (rows, columns) patches."""
    edge = torch.ones(grid, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def onset(norms: Tensor, outliers: Tensor) -> int | None:
    """The block after which outliers first stand out: their median norm is at least twice that of the others.

    norms     (L, B, N) after each block
    outliers  (B, N) bool, by the norms after the last block
    returns   a block's number from 0, the last one where no block qualifies; None without outliers
    """
    if not outliers.any():
        return None
    for block, layer in enumerate(norms):
        if float(layer[outliers].median()) >= LEAST_RATIO * float(layer[~outliers].median()):
            return block
    return len(norms) - 1


def pick_patches(candidates: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One patch of every image, at random among its candidates.

    candidates  (B, N) bool
    returns     (index (B,) int64, present (B,) bool), on the CPU: where an image has no candidate, present is false
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates.cpu(), -1.0)
    return draw.argmax(dim=1), candidates.cpu().any(dim=1)


def mean_cosine(tokens: Tensor) -> float:
    """How alike the tokens of an image are: the cosine of every pair, averaged over pairs and images.

    tokens   (B, S, D), S at least 2
    returns  in [-1, 1]; 1 means copies of one another
    """
    unit = F.normalize(tokens.double(), dim=-1)
    count = unit.shape[1]
    pairs = (unit.sum(dim=1).square().sum(dim=-1) - count) / (count * (count - 1))  # (B,)
    return float(pairs.mean())
