"""L2 norms of tokens, block by block, before the final norm: where artifacts show (arXiv 2309.16588, figures 3 and 4).

An artifact is a patch token whose norm is many times that of the others. The final norm hides it, so the norms
are those of the residual stream after each block.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from PIL import Image
from torch import Tensor

from dinoreg.models.vit import RegisterViT
from dinoreg.reports import html
from dinoreg.reports.plots import COLOURS, SETTINGS, Chart, Line, set_style, short
from dinoreg.visualize.gallery import INK, ModelGallery, colour_map, figure_image, map_row, sheet

TILE = 92  # pixels, the height of a map
_BLOCKS_A_SHEET = 12
_BINS = 60


class TokenNorms(NamedTuple):
    """L2 norms of tokens after each block, before the final norm; row l is block l."""

    cls: Tensor  # (L, B)
    registers: Tensor  # (L, B, R)
    patches: Tensor  # (L, B, N)


@torch.no_grad()
def token_norms(model: RegisterViT, images: Tensor) -> TokenNorms:
    """The norms of all tokens of images (B, C, H, W), normalised: float32 on the CPU. One image runs at a time."""
    norms: list[list[Tensor]] = [[], [], []]
    for image in images:
        layers = model.intermediate_tokens(image[None], range(model.depth), norm=False)
        for kind, parts in enumerate(zip(*layers)):
            norms[kind].append(torch.stack([part.float().norm(dim=-1).cpu() for part in parts]))
    return TokenNorms(*(torch.cat(each, dim=1) for each in norms))


def view_norms(**request: Any) -> Path:
    """Draw maps and histograms of the tokens' norms after each block; returns the page's path.

    request  weights, images and the other arguments of `ModelGallery`
    raises   UserError, before anything is written, for a size, image or model that does not exist or fit
    """
    gallery = ModelGallery("norms", **request)
    norms = token_norms(gallery.model, gallery.pictures.images)
    maps = [
        gallery.picture(f"maps{ending}", drawn, f"norms of patch tokens{ending}")
        for ending, drawn in _map_sheets(gallery.pixels, norms, gallery.grid)
    ]
    histograms = gallery.picture("histograms", histogram_sheet(norms), "histograms of norms, one for each block")
    rows = summary(norms)
    charts = html.charts([norm_chart(rows)])
    return gallery.finish("Token norms", {"blocks": rows}, charts=charts, histograms=histograms, maps=maps, rows=rows)


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


def norm_chart(rows: Sequence[dict[str, Any]]) -> Chart:
    """The norms over the blocks, drawn from their summary."""
    names = {"median": "median patch", "p99": "99th percentile", "max": "largest patch", "cls": "CLS"}
    if rows[0]["registers"] is not None:
        names["registers"] = "registers"
    lines = [Line(name, range(len(rows)), [row[key] for row in rows]) for key, name in names.items()]
    values = [value for line in lines for value in line.y if value > 0]
    wide = bool(values) and max(values) > 30 * min(values)
    note = "L2 norm, without a unit. Healthy: the largest patch stays within a few times the median."
    return Chart("Norm after each block", note, lines, marker=True, log=wide, from_zero=not wide, x_label="block")


def _map_sheets(pixels: np.ndarray, norms: TokenNorms, grid: tuple[int, int]) -> Iterator[tuple[str, Image.Image]]:
    """Rows of images, columns of blocks; deep models on several sheets. (ending of the file's name, sheet)."""
    depth = len(norms.patches)
    for first in range(0, depth, _BLOCKS_A_SHEET):
        blocks = range(first, min(first + _BLOCKS_A_SHEET, depth))
        rows = []
        for number, image in enumerate(pixels):
            values = ((norms.patches[b, number].reshape(grid).numpy(), float(norms.patches[b].max())) for b in blocks)
            rows.append(map_row(image, (colour_map(each, top, "viridis") for each, top in values), TILE))
        ending = f"-blocks{blocks[0]}-{blocks[-1]}" if depth > _BLOCKS_A_SHEET else ""
        yield ending, sheet(rows, ["image", *(f"block {block}" for block in blocks)])


def histogram_sheet(norms: TokenNorms) -> Image.Image:
    """A histogram of patch norms for each block, with CLS and registers as lines, on a transparent background."""
    depth = len(norms.patches)
    columns = min(4, depth)
    rows = -(-depth // columns)
    width, height = 2.5 * columns, 1.55 * rows + 0.35  # inches
    with rc_context(SETTINGS | {"font.size": 7}):
        figure = Figure(figsize=(width, height), dpi=120)
        # Fixed margins: fitting them to the labels would take longer than drawing.
        figure.subplots_adjust(left=0.4 / width, right=1 - 0.1 / width, bottom=0.25 / height, top=1 - 0.5 / height)
        figure.subplots_adjust(wspace=0.18, hspace=0.32)
        for block in range(depth):
            _draw_histogram(figure.add_subplot(rows, columns, block + 1), norms, block)
        kinds = ["patches", "CLS", "registers"] if norms.registers.shape[2] else ["patches", "CLS"]
        handles = [Patch(color=colour) for colour, _ in zip(COLOURS, kinds)]
        figure.legend(handles, kinds, loc="upper left", ncols=3, frameon=False, labelcolor=INK)
        return figure_image(figure)


def _draw_histogram(axes: Axes, norms: TokenNorms, block: int) -> None:
    counts, edges = np.histogram(norms.patches[block].numpy(), bins=_BINS)
    # As steps: a bar for each bin would take most of the time. Half a patch is the floor of the log scale.
    axes.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=COLOURS[0])
    axes.set_yscale("log")
    for value in norms.cls[block].tolist():
        axes.axvline(value, color=COLOURS[1], linewidth=0.9)
    for value in norms.registers[block].flatten().tolist():
        axes.axvline(value, color=COLOURS[2], linewidth=0.9, alpha=0.6)
    axes.set_title(f"block {block}", color=INK, fontsize=8, pad=2)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(short)
    axes.yaxis.set_minor_formatter(NullFormatter())
    set_style(axes, INK, INK, tick_length=2)
