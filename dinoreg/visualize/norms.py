"""L2 norms of tokens, block by block, before the final norm: where artifacts show (arXiv 2309.16588, figures 3 and 4).

An artifact is a patch token whose norm is many times that of the others. The final norm hides it, so the norms
are those of the residual stream after each block.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from dinoreg.models.vit import RegisterViT
from dinoreg.reports.html import COLOURS, SETTINGS, set_log_ticks, set_style
from dinoreg.visualize.gallery import INK, ModelGallery, colour_map, figure_image, map_row, sheet

TILE = 92  # pixels, the height of a map
GRID = "#80869040"  # a faint INK


class TokenNorms(NamedTuple):
    """L2 norms of tokens after each block, before the final norm; row l is block l."""

    cls: Tensor  # (L, B)
    registers: Tensor  # (L, B, R)
    patches: Tensor  # (L, B, N)


@torch.no_grad()
def token_norms(model: RegisterViT, images: Tensor) -> TokenNorms:
    """The norms of all tokens of images (B, C, H, W), normalised: float32 on the CPU."""
    layers = model.intermediate_tokens(images, range(model.depth), norm=False)
    return TokenNorms(*(torch.stack([part.float().norm(dim=-1).cpu() for part in parts]) for parts in zip(*layers)))


def joined(parts: Iterable[TokenNorms]) -> TokenNorms:
    """The norms of several batches as those of one."""
    return TokenNorms(*(torch.cat(each, dim=1) for each in zip(*parts)))


def view_norms(**request: Any) -> Path:
    """Draw maps and histograms of the tokens' norms after each block; returns the page's path.

    request  weights, images and the other arguments of `ModelGallery`
    raises   UserError, before anything is written, for a size, image or model that does not exist or fit
    """
    gallery = ModelGallery("norms", **request)
    norms = joined(token_norms(gallery.model, image[None]) for image in gallery.pictures.images)
    maps = gallery.picture("maps", _map_sheet(gallery.pixels, norms, gallery.grid), "norms of patch tokens")
    histograms = gallery.picture("histograms", _histogram_sheet(norms), "histograms of norms, one for each block")
    rows = summary(norms)
    return gallery.finish("Token norms", {"blocks": rows}, histograms=histograms, maps=maps, rows=rows)


def summary(norms: TokenNorms) -> list[dict[str, Any]]:
    """For each block {"median", "p99", "max"} of the norms of patches, and the means of "cls" and "registers".

    "p99" is the 99th percentile; "registers" is None where there are none.
    """
    rows = []
    for cls, registers, patches in zip(*norms):
        median, p99 = np.median(patches.numpy()), np.percentile(patches.numpy(), 99)
        row = {"median": float(median), "p99": float(p99), "max": float(patches.max()), "cls": float(cls.mean())}
        rows.append({**row, "registers": float(registers.mean()) if registers.numel() else None})
    return rows


def _map_sheet(pixels: np.ndarray, norms: TokenNorms, grid: tuple[int, int]) -> Image.Image:
    """The images side by side, below them their maps after each block, which share a scale."""
    blocks = norms.patches.unflatten(-1, grid).numpy()  # (L, B, h, w)
    tops = blocks.max(axis=(1, 2, 3))
    columns = [
        map_row(image, (colour_map(each, top, "viridis") for each, top in zip(maps, tops)), TILE)
        for image, maps in zip(pixels, blocks.swapaxes(0, 1))
    ]
    return sheet([*zip(*columns)], names=["image", *(f"block {block}" for block in range(len(blocks)))])


def log_histogram(norms: Tensor, edges: Tensor) -> Tensor:
    """Shares of the norms of every layer in bins; norms beyond the edges count in the first and the last bin.

    norms    (L, ...)
    edges    (k + 1,) ascending
    returns  (L, k) float64, rows sum to one
    """
    inside = norms.flatten(1).clamp(edges[0], edges[-1])
    return torch.stack([torch.histogram(row, edges).hist for row in inside]).double() / inside.shape[1]


def histogram(norms: Tensor) -> dict[str, list[Any]]:
    """The shares of norms (L, ...) in bins of equal ratio, for each block, and the edges of the bins."""
    low, high = (max(float(each), 1e-6) for each in norms.aminmax())
    edges = torch.logspace(np.log10(low * 0.98), np.log10(high * 1.02), 81)  # of 80 bins
    return {"edges": edges.tolist(), "shares": log_histogram(norms, edges).tolist()}


def draw_blocks(axes: Axes, found: Mapping[str, Any], cls: Sequence[float], registers: Iterable[Any]) -> None:
    """Draw the histogram of patches after every block, a column each, with the class token and each register as lines.

    found  as `histogram` gives it
    """
    edges, shares = np.array(found["edges"]), np.array(found["shares"])
    blocks = np.arange(len(shares) + 1) - 0.5
    axes.pcolormesh(blocks, edges, np.where(shares > 0, shares, np.nan).T, cmap="Blues", norm=LogNorm(1e-5, 0.5))
    axes.plot(blocks[1:] - 0.5, cls, color=COLOURS[1], linestyle="--", linewidth=1.2)
    for norms in registers:
        axes.plot(blocks[1:] - 0.5, norms, color=COLOURS[2], linewidth=0.8, marker="o", markersize=1.6)
    axes.set_yscale("log")
    set_log_ticks(axes.yaxis, 8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlabel("block", color=INK)
    set_grid(axes)


def set_grid(axes: Axes) -> None:
    """A frame and a faint grid, for light and dark pages."""
    set_style(axes, INK, GRID, spines=("left", "right", "bottom", "top"))
    axes.grid(color=GRID, linewidth=0.6)


def _histogram_sheet(norms: TokenNorms) -> Image.Image:
    with rc_context(SETTINGS | {"font.size": 8}):
        figure = Figure(figsize=(8.4, 3), dpi=110, layout="constrained")
        cls, registers = norms.cls.median(dim=1).values, norms.registers.median(dim=1).values.T
        draw_blocks(figure.add_subplot(), histogram(norms.patches), cls.tolist(), registers.tolist())
        return figure_image(figure)
