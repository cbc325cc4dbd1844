"""Bicubic resampling as two matrix products, for graphs whose image size is known only when they run.

ONNX has no resize that reproduces PyTorch's bicubic kernels, with antialias or with an offset in the scale.
Both are linear and separable, so a row matrix and a column matrix say them exactly; the matrices are computed in
the graph from the target size, out of arithmetic that every runtime has.
"""

import torch
from torch import Tensor

from dinoreg.data.center_crop import ANTIALIASED_SLOPE, cubic_kernel

PLAIN_SLOPE = -0.75  # of the cubic kernel in PyTorch's resampling without antialiasing


def resampling_matrix(target: int, grid: int, antialias: bool, offset: Tensor | float = 0.0) -> Tensor:
    """The weights (target, grid), float32, of `grid` samples in each of `target` resampled ones.

    target     may be symbolic while a graph is captured
    antialias  and offset: as in `dinoreg.models.vit.resample_positions`
    """
    places = torch.arange(target, dtype=torch.float32)[:, None] + 0.5  # (target, 1)
    sources = torch.arange(grid, dtype=torch.float32)[None, :]  # (1, grid)
    # PyTorch divides in double precision and rounds once; a scale that is off by a bit moves the far samples.
    scale = (grid / (torch.full((), target, dtype=torch.float64) + offset)).float()
    if antialias:
        # The kernel widens as the target shrinks; what falls outside the grid is left out and the rest sums to one.
        distance = (sources + 0.5 - places * scale) / scale.clamp(min=1.0)
        weights = cubic_kernel(distance.abs(), ANTIALIASED_SLOPE)
        return weights / weights.sum(dim=1, keepdim=True)
    # Four taps around the sampling point; those outside the grid take the value at its border.
    point = places * scale - 0.5
    first = torch.floor(point)
    weights = torch.zeros_like(point * sources)
    for tap in (-1.0, 0.0, 1.0, 2.0):
        place = (first + tap).clamp(0, grid - 1)
        share = cubic_kernel((point - first - tap).abs(), PLAIN_SLOPE)
        weights = weights + (sources == place).to(torch.float32) * share
    return weights


def resample_in_graph(positions: Tensor, target: tuple[int, int], antialias: bool, offset: float = 0.0) -> Tensor:
    """`resample_positions` out of operations that ONNX has.

    positions  (gh, gw, D) float32
    target     (h, w), may be symbolic
    returns    (1, h * w, D) float32
    """
    grid_rows, grid_columns, dim = positions.shape
    rows, columns = target
    shifts: list[Tensor | float] = [0.0, 0.0]
    if offset:  # at the native grid positions are used as they are; with antialias, each extent on its own
        same = [torch.full((), rows) == grid_rows, torch.full((), columns) == grid_columns]
        if not antialias:
            same = [same[0] & same[1]] * 2
        none, some = (torch.full((), value, dtype=torch.float64) for value in (0.0, offset))
        shifts = [torch.where(each, none, some) for each in same]
    down = resampling_matrix(rows, grid_rows, antialias, shifts[0])  # (h, gh)
    across = resampling_matrix(columns, grid_columns, antialias, shifts[1])  # (w, gw)
    moved = (down @ positions.reshape(grid_rows, grid_columns * dim)).reshape(rows, grid_columns, dim)
    return (across @ moved).reshape(1, rows * columns, dim)
