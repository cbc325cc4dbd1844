"""The figures of the register report: norms per block, positions of outliers, maps of norms and attention."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from dinoreg.reports.plots import COLOURS, short
from dinoreg.visualize.attention import colour_map, token_names
from dinoreg.visualize.contact_sheet import sheet, tile

INK, GRID = "#808690", "#80869040"  # grey that reads on white and on black
TILE = 104  # pixels, height of a map


@dataclass(frozen=True)
class Seen:
    """One model: its record and what its pictures are drawn from.

    norms      (k, h, w) of the patches of the images shown, last block, before the final norm
    outliers   (k, h, w) bool
    attention  (k, 1 + R, h, w) of class token and registers in the last block
    """

    record: dict[str, Any]
    norms: np.ndarray
    outliers: np.ndarray
    attention: np.ndarray


def norm_figure(records: Sequence[dict[str, Any]]) -> Image.Image:
    """Histograms of patch norms: per block, and of the last block, one row a model."""
    with rc_context({"font.size": 8, "font.family": "sans-serif", "text.parse_math": False}):
        figure = Figure(figsize=(8.4, 0.3 + 2.1 * len(records)), dpi=110)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=0.065, right=0.985, wspace=0.16, hspace=0.55, bottom=0.4 / (0.3 + 2.1 * len(records)),
            top=1 - 0.25 / (0.3 + 2.1 * len(records)),
        )  # fmt: skip
        for row, record in enumerate(records):
            left, right = (figure.add_subplot(len(records), 2, 2 * row + 1 + side) for side in range(2))
            _draw_blocks(left, record)
            _draw_last(right, record)
            left.set_title(record["name"][:60], loc="left", color=INK, fontsize=8.5)
        return _as_image(figure)


def _draw_blocks(axes: Any, record: dict[str, Any]) -> None:
    edges, shares = np.array(record["histogram"]["edges"]), np.array(record["histogram"]["shares"])
    blocks = np.arange(len(shares) + 1) + 0.5
    axes.pcolormesh(blocks, edges, np.where(shares > 0, shares, np.nan).T, cmap="Blues", norm=LogNorm(1e-5, 0.5))
    centres = np.arange(1, len(shares) + 1)
    axes.plot(centres, [layer["cls"] for layer in record["layers"]], color=COLOURS[1], linestyle="--", linewidth=1.2)
    for number in range(record["num_registers"]):
        norms = [layer["registers"][number] for layer in record["layers"]]
        axes.plot(centres, norms, color=COLOURS[2], linewidth=0.8, marker="o", markersize=1.6)
    axes.set_yscale("log")
    _plain_log(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlabel("block", color=INK)
    _style(axes)


def _draw_last(axes: Any, record: dict[str, Any]) -> None:
    edges, shares = np.array(record["histogram"]["edges"]), np.array(record["histogram"]["shares"][-1])
    axes.stairs(np.maximum(shares, 1e-7), edges, fill=True, color=COLOURS[0], alpha=0.75)
    limits = [(record["limit"]["value"], "limit"), (record["limit"]["paper"], "150")]
    kept = shares > 0
    low, high = edges[:-1][kept].min(), edges[1:][kept].max()
    high = max(high, record["limit"]["value"] * 1.1)
    for value, name in limits:
        if low < value <= high * 1.3:
            axes.axvline(value, color=INK, linewidth=0.9, linestyle=(0, (1.5, 2.5)))
            axes.annotate(
                name, (value, 0.98), xycoords=("data", "axes fraction"), xytext=(2, 0), textcoords="offset points",
                va="top", color=INK,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-5, 1)
    axes.set_xlim(low * 0.95, high * 1.25)  # room for the names of the limits
    _plain_log(axes.xaxis)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("norm of a patch, last block", color=INK)
    _style(axes)


def position_figure(records: Sequence[dict[str, Any]]) -> Image.Image:
    """Maps of how often each position holds an outlier, one a model."""
    columns = min(len(records), 4)
    rows = -(-len(records) // columns)
    with rc_context({"font.size": 8, "font.family": "sans-serif", "text.parse_math": False}):
        figure = Figure(figsize=(2.5 * columns, 2.3 * rows), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for number, record in enumerate(records):
            axes = figure.add_subplot(rows, columns, number + 1)
            places = np.array(record["where"]["positions"])
            drawn = axes.imshow(places, cmap="magma", vmin=0, vmax=max(float(places.max()), 1e-6))
            bar = figure.colorbar(drawn, ax=axes, shrink=0.8, format=FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
            bar.ax.tick_params(colors=INK, length=0)
            bar.outline.set_visible(False)  # type: ignore[operator]
            axes.set_title(record["name"][:32], color=INK, fontsize=8)
            axes.set_axis_off()
        return _as_image(figure)


def map_sheet(seen: Seen, images: np.ndarray) -> Image.Image:
    """One row an image: the picture, its norms, and the attention of CLS and of each register."""
    count, rows, columns = seen.norms.shape
    norms = colour_map(seen.norms.reshape(-1, columns)).reshape(count, rows, columns, 3)
    lines = []
    for picture, norm, attention in zip(images, norms, seen.attention):
        first = tile(picture, TILE)
        maps = [norm, *(colour_map(each) for each in attention)]
        lines.append([first, *(tile(each, TILE, first.width, smooth=False) for each in maps)])
    names = [name.replace("register", "reg") for name in token_names(seen.attention.shape[1] - 1)]
    return sheet(lines, ["image", "norms", *names])


def _style(axes: Any) -> None:
    axes.tick_params(which="both", colors=INK, length=0)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.6)
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _plain_log(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def _as_image(figure: Figure) -> Image.Image:
    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    buffer.seek(0)
    with Image.open(buffer) as image:
        return image.convert("RGBA")
