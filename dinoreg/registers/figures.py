"""The figures of the register report: norms per block, positions of outliers, maps of norms and attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from dinoreg.registers.measure import Measured
from dinoreg.reports.plots import COLOURS, DOTTED, SETTINGS, percent_tick, short
from dinoreg.visualize.attention import token_names
from dinoreg.visualize.contact_sheet import colour_map, figure_image, map_row, sheet

INK, GRID = "#808690", "#80869040"  # grey that reads on white and on black
TILE = 104  # pixels, height of a map


def norm_figure(records: Sequence[dict[str, Any]]) -> Image.Image:
    """Histograms of patch norms: per block, and of the last block, one row a model."""
    with rc_context(SETTINGS | {"font.size": 8}):
        figure = Figure(figsize=(8.4, 0.3 + 2.1 * len(records)), dpi=110)
        figure.subplots_adjust(
            left=0.065, right=0.985, wspace=0.16, hspace=0.55, bottom=0.4 / (0.3 + 2.1 * len(records)),
            top=1 - 0.25 / (0.3 + 2.1 * len(records)),
        )  # fmt: skip
        for row, record in enumerate(records):
            left, right = (figure.add_subplot(len(records), 2, 2 * row + 1 + side) for side in range(2))
            _draw_blocks(left, record)
            _draw_last(right, record)
            left.set_title(record["name"][:60], loc="left", color=INK, fontsize=8.5)
        return figure_image(figure)


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
    filled = shares > 0
    low, high = edges[:-1][filled].min(), edges[1:][filled].max()
    high = max(high, record["limit"]["value"] * 1.1)
    for value, name in limits:
        if low < value <= high * 1.3:
            axes.axvline(value, color=INK, linewidth=0.9, linestyle=DOTTED)
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
    axes.yaxis.set_major_formatter(percent_tick)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("norm of a patch, last block", color=INK)
    _style(axes)


def position_figure(records: Sequence[dict[str, Any]]) -> Image.Image:
    """Maps of how often each position holds an outlier, one a model."""
    columns = min(len(records), 4)
    rows = -(-len(records) // columns)
    with rc_context(SETTINGS | {"font.size": 8}):
        figure = Figure(figsize=(2.5 * columns, 2.3 * rows), dpi=110, layout="constrained")
        for number, record in enumerate(records):
            axes = figure.add_subplot(rows, columns, number + 1)
            places = np.array(record["where"]["positions"])
            drawn = axes.imshow(places, cmap="magma", vmin=0, vmax=max(float(places.max()), 1e-6))
            bar = figure.colorbar(drawn, ax=axes, shrink=0.8, format=FuncFormatter(percent_tick))
            bar.ax.tick_params(colors=INK, length=0)
            bar.outline.set_visible(False)  # type: ignore[operator]
            axes.set_title(record["name"][:32], color=INK, fontsize=8)
            axes.set_axis_off()
        return figure_image(figure)


def map_sheet(measured: Measured, images: np.ndarray) -> Image.Image:
    """One row an image (k, H, W, 3) uint8: the picture, its norms, and the attention of CLS and of each register."""
    count, tokens, rows, columns = measured.attention.shape
    norms = measured.norms[-1, :count].reshape(count, rows, columns).numpy()
    lines = []
    for picture, norm, attention in zip(images, norms, measured.attention.numpy()):
        maps = [colour_map(norm, float(norms.max())), *map(colour_map, attention)]
        lines.append(map_row(picture, maps, TILE))
    names = [name.replace("register", "reg") for name in token_names(tokens - 1)]
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
    axis.set_major_formatter(short)
    axis.set_minor_formatter(NullFormatter())
