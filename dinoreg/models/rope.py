"""Rotary positions of the patches along two axes (RoPE), as in DINOv3 (arXiv 2508.10104).

Queries and keys of a patch are turned before attention: pairs of channels by angles that grow with its row, as many by
angles that grow with its column. Places are those of the patches' centres in an image whose sides reach from -1 to 1,
so that another grid samples the same range and nothing is resampled. The class token and the registers are not turned.
Nothing is learned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dinoreg.models.attention import pack, unpack
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.packed_attention import Shapes

Grid = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Rope:
    """The periods of the angles, and how places are distorted in training.

    base     periods go from 1 to nearly this, in units in which an image is 2 wide, by equal factors
    shift    >= 0: places are moved by up to this, uniformly, each axis on its own
    jitter   >= 1: then each axis is stretched by a factor between 1 / jitter and jitter, uniform in its logarithm
    rescale  >= 1: the same with one factor for both axes; DINOv3 has 2 and no other distortion
    raises   UserError for a value out of its range
    """

    base: float
    shift: float = 0.0
    jitter: float = 1.0
    rescale: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("base", 1), ("shift", 0), ("jitter", 1), ("rescale", 1)):
            if not low <= getattr(self, name) < math.inf:
                raise UserError(f"rope_{name}={getattr(self, name)} is out of range; expected a number from {low} on")

    def tables(self, grids: Sequence[Grid], first: int, head_dim: int, x: Tensor, training: bool) -> list[Tensor]:
        """What `turn_groups` turns groups of crops by: of each (2, T, 1, 1, head_dim) float32, T = first + patches.

        grids     of the groups
        first     number of tokens before the patches, which are not turned
        x         on whose device
        training  distort: all images of a group alike, by numbers of the device's global generator, which a training
                  step seeds for every micro-batch. They are drawn once a pass, not for every block as DINOv3 does
        """
        if training and (self.shift, self.jitter, self.rescale) != (0, 1, 1):
            return [self._distorted(grid, first, head_dim, x.device) for grid in grids]
        kept = [_kept(grid, first, head_dim, self.base, x.device) for grid in grids]
        if isinstance(x, FakeTensor):  # a tensor without values belongs to one trace
            return [x.fake_mode.from_tensor(table) for table in kept]
        return kept

    def _distorted(self, grid: Grid, first: int, head_dim: int, device: torch.device) -> Tensor:
        drawn = 2 * torch.rand(5, device=device) - 1
        factors = (drawn[2:4] * math.log(self.jitter) + drawn[4] * math.log(self.rescale)).exp()
        moved = zip(_places(grid, device), drawn[:2] * self.shift, factors, strict=True)
        return _table([(places + shift) * factor for places, shift, factor in moved], first, head_dim, self.base)


def _places(grid: Grid, device: torch.device) -> list[Tensor]:
    """The rows' and the columns' centres in [-1, 1]."""
    return [(torch.arange(count, device=device) + 0.5) / count * 2 - 1 for count in grid]


@lru_cache(maxsize=256)
def _kept(grid: Grid, first: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    # What is kept may be needed for a gradient later, and is no part of what is traced or counted meanwhile.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        return _table(_places(grid, device), first, head_dim, base)


def _table(places: Sequence[Tensor], first: int, head_dim: int, base: float) -> Tensor:
    """Cosines and signed sines, (2, T, 1, 1, head_dim): channel i turns with channel i + head_dim / 2."""
    periods = base ** (4 * torch.arange(head_dim // 4, device=places[0].device) / head_dim)
    by_row, by_column = (2 * math.pi * centres[:, None] / periods for centres in places)
    pairs = torch.broadcast_tensors(by_row[:, None], by_column)  # (h, w, head_dim / 4) each
    angles = F.pad(torch.cat(pairs, dim=-1).flatten(0, 1), (0, 0, first, 0))  # (T, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])[:, :, None, None]


def turn(tokens: Tensor, table: Tensor) -> Tensor:
    """Queries or keys turned by their places, at least in the precision of the table.

    tokens  (..., T, n, heads, head_dim)   n: queries, keys or both
    table   one of `Rope.tables`
    returns as tokens
    """
    cos, sin = table
    other = tokens.roll(tokens.shape[-1] // 2, dims=-1)  # the other channel of each pair
    return torch.addcmul(tokens * cos, other, sin).to(tokens.dtype)


def turn_groups(qkv: Tensor, shapes: Shapes, tables: Sequence[Tensor]) -> Tensor:
    """Packed queries, keys and values, of which queries and keys are turned.

    qkv     (S, 3, heads, head_dim)   and `shapes` as for `attend_groups`
    tables  one of `Rope.tables` a group
    returns (S, 3, heads, head_dim)
    """
    groups = zip(unpack(qkv, shapes), tables, strict=True)
    return pack([torch.cat([turn(group[:, :, :2], table), group[:, :, 2:]], dim=2) for group, table in groups])
