"""The arithmetic of optical flow by matching: where each patch went, and how far off.

Every patch of a frame is compared with every patch of the next; a softmax over the cosines and its expected position
give the displacement. A flow is (..., 2) with (u, v) = (right, down).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCK = 1 << 23  # similarities held at once: 32 MiB in float32, whatever the number of patches
RATES = (1, 3, 5)  # pixels
LOWEST_TEMPERATURE = 1e-3  # that a projection may learn; below, the softmax has no gradient left


@dataclass(frozen=True)
class Geometry:
    """A frame and the grid of patches that it is cut into once resized.

    size        (height, width) of the frame in pixels
    patch_size  pixels
    upscale     the sides are multiplied by this, then rounded to a whole number of patches
    """

    size: tuple[int, int]
    patch_size: int
    upscale: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; 1024 x 436 pixels are 31 x 73 patches of 14."""
        height, width = (max(round(side * self.upscale / self.patch_size), 1) for side in self.size)
        return height, width

    @property
    def working(self) -> tuple[int, int]:
        """(height, width) in pixels that the frame is resized to."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def to_pixels(self, flow: Tensor) -> Tensor:
        """Flow of the patches as flow of the frame's pixels, bilinear.

        flow     (N, 2) in patches, row by row over the grid
        returns  (H, W, 2) in pixels of the frame
        """
        rows, columns = self.grid
        per_patch = flow.new_tensor([self.size[1] / columns, self.size[0] / rows])
        field = (flow * per_patch).view(1, rows, columns, 2).permute(0, 3, 1, 2)
        return F.interpolate(field, size=self.size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def match(first: Tensor, second: Tensor, grid: tuple[int, int], temperature: float | Tensor, window: int = 0) -> Tensor:
    """Displacement of every patch of one frame to its match in the next, by soft-argmax over all pairs.

    first, second  (N, D) unit vectors, row by row over the grid
    grid           rows and columns, N = rows x columns
    temperature    above 0; the cosines are divided by it before the softmax
    window         patches to each side of the best match that the softmax runs over; 0: the whole frame
    returns        (N, 2) in patches; differentiable in both and in the temperature. Similarities are computed in blocks
                   of rows, in the backward pass again, so that memory does not grow with N²
    """
    y, x = torch.meshgrid(*(torch.arange(side, device=first.device) for side in grid), indexing="ij")
    positions = torch.stack([x, y], dim=-1).view(-1, 2).to(first.dtype)  # (N, 2): column and row of every patch
    rows = max(BLOCK // len(second), 1)
    again = torch.is_grad_enabled() and rows < len(first)
    matches = []
    for block in first.split(rows):
        arguments = (block, second, positions, grid, temperature, window)
        matches.append(checkpoint(_expected, *arguments, use_reentrant=False) if again else _expected(*arguments))
    return torch.cat(matches) - positions


def _expected(
    first: Tensor, second: Tensor, positions: Tensor, grid: tuple[int, int], temperature: float | Tensor, window: int
) -> Tensor:
    """Expected position (n, 2) of the match of n patches."""
    logits = first / temperature @ second.mT  # (n, N); dividing afterwards would keep a second array of this size
    if not window:
        return logits.softmax(dim=-1) @ positions
    best = logits.detach().argmax(dim=-1)[:, None]
    around = torch.arange(-window, window + 1, device=first.device)
    y, x = best // grid[1] + around, best % grid[1] + around  # (n, 2 window + 1)
    inside = ((y >= 0) & (y < grid[0]))[:, :, None] & ((x >= 0) & (x < grid[1]))[:, None, :]
    place = (y.clamp(0, grid[0] - 1)[:, :, None] * grid[1] + x.clamp(0, grid[1] - 1)[:, None, :]).flatten(1)
    weights = logits.gather(1, place).masked_fill(~inside.flatten(1), -torch.inf).softmax(dim=-1)
    return (weights[..., None] * positions[place]).sum(dim=1)


class Projection(nn.Module):
    """The linear probe: one matrix before the cosines, and the temperature after them.

    dim          D of the tokens
    out_dim      width of the projection
    temperature  initial value of the learned one, above 0
    seed         of the matrix

    The matrix starts (semi-)orthogonal, so that the first flow is that of the tokens themselves or close to it. It has
    no bias: with unit tokens going in, the direction of the projected token is that of the unscaled one.
    """

    def __init__(self, dim: int, out_dim: int, temperature: float, seed: int = 0) -> None:
        super().__init__()
        weight = torch.empty(out_dim, dim)
        nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())

    @property
    def temperature(self) -> Tensor:
        """() the learned temperature, at least LOWEST_TEMPERATURE."""
        return self.log_temperature.exp().clamp(min=LOWEST_TEMPERATURE)

    def forward(self, first: Tensor, second: Tensor, grid: tuple[int, int]) -> Tensor:
        """Unit tokens (N, D) of two frames -> displacements (N, 2) in patches, matched over the whole frame.

        grid  rows and columns, N = rows x columns
        """
        start, end = (F.normalize(tokens @ self.weight.mT, dim=-1) for tokens in (first, second))
        return match(start, end, grid, self.temperature)


class Truth(NamedTuple):
    """The ground truth of a pair: flow (H, W, 2) in pixels, valid (H, W) bool, occluded (H, W) bool."""

    flow: Tensor
    valid: Tensor
    occluded: Tensor


# The figures kept of a pair: numbers of pixels, sums of their end-point errors, numbers of pixels within a rate.
TALLY = ("count", "sum", "count matched", "sum matched", "count unmatched", "sum unmatched", *map(str, RATES))


def tally(predicted: Tensor, truth: Truth) -> Tensor:
    """The sums of one pair, (len(TALLY),) float64 on the CPU, that pooled figures are made of; only valid pixels count.

    predicted  (H, W, 2) in pixels, or (2,) for the same flow everywhere
    """
    errors = (predicted.expand_as(truth.flow)[truth.valid] - truth.flow[truth.valid]).double().norm(dim=-1)
    hidden = truth.occluded[truth.valid]
    parts = (errors, errors[~hidden], errors[hidden])
    figures = [value for part in parts for value in (part.new_tensor(len(part)), part.sum())]
    return torch.stack([*figures, *((errors <= rate).sum().double() for rate in RATES)]).cpu()


def figures(tallies: Tensor) -> dict[str, float]:
    """Figures pooled over the pixels of pairs: end-point errors in pixels, rates as shares in [0, 1].

    all, matched and unmatched are means over the valid pixels, those visible in the second frame and those occluded in
    it; NaN where there is none.

    tallies  (n, len(TALLY)) of the pairs
    returns  {"all", "matched", "unmatched", "within 1 px", "within 3 px", "within 5 px"}
    """
    total = dict(zip(TALLY, tallies.sum(dim=0).tolist()))

    def ratio(part: str, whole: str) -> float:
        return total[part] / total[whole] if total[whole] else float("nan")

    return {
        "all": ratio("sum", "count"),
        "matched": ratio("sum matched", "count matched"),
        "unmatched": ratio("sum unmatched", "count unmatched"),
        **{f"within {rate} px": ratio(str(rate), "count") for rate in RATES},
    }
