"""The register report as a page: verdict in words, models side by side, norms per block, where outliers sit, maps.

It shows what `measure.py` has measured and measures nothing itself; its words and its table, models in columns, are
templates. A picture never says more than its caption: maps of attention that look clean are no proof that features are
(Lappe and Giese, arXiv 2505.05892).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from rich.table import Table

from dinoreg.registers.measure import BESIDE_OUTLIERS, Measured
from dinoreg.reports.html import COLOURS, DOTTED, SETTINGS, Scale, percent_tick, set_log_ticks
from dinoreg.reports.verdict import Verdict, in_words
from dinoreg.runtime.printable import in_markup
from dinoreg.runtime.templates import DASH, percent, render, score
from dinoreg.visualize.attention import token_names
from dinoreg.visualize.gallery import INK, Gallery, colour_map, figure_image, map_row, sheet, tile
from dinoreg.visualize.norms import draw_blocks, set_grid

VIEW = "registers"
TILE = 104  # pixels, height of a map
# Columns of tables: {key of a row: how its value is written}.
Columns = dict[str, Callable[[Any], str]]
TRIALS: Columns = {"neurons": str, "share": percent, "patch_cosine": "{:.3f}".format, "cls_cosine": "{:.3f}".format}
CONTROLS: Columns = {"what": str, "kind": str, "images": str, "cls_accuracy": score, "patch_accuracy": score}
CONTROLS |= {"cls_cosine": "{:.3f}".format, "patch_cosine": "{:.3f}".format}
DISCOVERY: Columns = {"name": str, "plain": score, "best": str, "bias": "{:g}".format, "chosen_on_other_half": score}
DISCOVERY |= {"whole_image_box": score}


def write_registers(
    measured: Sequence[Measured], images: np.ndarray, out: Path, skipped: Sequence[tuple[str, str]], channels: str
) -> Path:
    """Write `OUT/registers.html`, and its pictures and `view.json` in `OUT/registers/`; returns the page's path.

    images   (k, H, W, 3) uint8: those whose maps are shown
    skipped  (name, reason) of images that could not be read
    channels in words, which of the models' channels are shown
    raises   UserError where OUT cannot be a folder, RunError where it cannot be written
    """
    records = [each.record for each in measured]
    names = [record["name"] for record in records]
    gallery = Gallery(VIEW, out, {"measured": [[each["identity"], each["source"]] for each in records]})
    with_outliers = [record for record in records if record["outliers"]["patches"]]
    positions = position_sheet(with_outliers) if with_outliers else None
    return gallery.write_page(
        "Register report",
        {"models": records},
        folder="registers",
        channels=channels,
        records=records,
        lead=", ".join(names),
        judged=[(record, judge(record)) for record in records],
        compared_head=["", *names],
        compared=[[name, *cells] for name, cells in comparison(records)],
        norms=gallery.picture("norms", norm_figure(records), "norms of patches per block"),
        positions=positions and gallery.picture("positions", positions, "how often each position holds an outlier"),
        maps=[
            gallery.picture(f"maps_{number}", map_sheet(each, images), f"maps of {name}", f"{name}: ")
            for number, (each, name) in enumerate(zip(measured, names))
        ],
        probed=[(record, Scale([*map(_on_scale, record["probes"])])) for record in records if record["probes"]],
        controlled=[(record["name"], _rows(record["controls"], CONTROLS)) for record in records],
        fitted=[(each, _rows(each["test_time"]["trials"], TRIALS)) for each in records if each["test_time"]],
        discovery=_rows([_discovery(record) for record in records if record["discovery"]], DISCOVERY),
        skipped=skipped,
    )


def _rows(rows: Sequence[dict[str, Any]], columns: Columns) -> list[list[str]]:
    cells = ([(row[key], written) for key, written in columns.items()] for row in rows)
    return [[DASH if value is None else written(value) for value, written in each] for each in cells]


def _discovery(record: dict[str, Any]) -> dict[str, Any]:
    found = record["discovery"]
    best, low, high = (score(found[key]) for key in ("CorLoc", "low", "high"))
    return found | {"name": record["name"], "best": f"{best} ({low} to {high})"}


def _on_scale(probe: dict[str, Any]) -> tuple[str, float, float, float, bool]:
    return probe["token"], probe["accuracy"], probe["low"], probe["high"], probe["token"].startswith("register")


# ------------------------------------------------------------------------------------------------------------
# Figures


def norm_figure(records: Sequence[dict[str, Any]]) -> Image.Image:
    """Histograms of patch norms: of every block, and of the last block alone; one row a model.

    records  of `Measured`
    """
    height = 0.3 + 2.1 * len(records)
    with rc_context(SETTINGS | {"font.size": 8}):
        figure = Figure(figsize=(8.4, height), dpi=110)
        between: dict[str, Any] = {"wspace": 0.16, "hspace": 0.55}
        figure.subplots_adjust(left=0.065, right=0.985, bottom=0.4 / height, top=1 - 0.25 / height, **between)
        for (left, right), record in zip(figure.subplots(len(records), 2, squeeze=False), records):
            layers = record["layers"]
            special = [layer["cls"] for layer in layers], zip(*(layer["registers"] for layer in layers))
            draw_blocks(left, record["histogram"], *special)
            _draw_last(right, record)
            left.set_title(record["name"][:60], loc="left", color=INK, fontsize=8.5)
        return figure_image(figure)


def _draw_last(axes: Axes, record: dict[str, Any]) -> None:
    edges, shares = np.array(record["histogram"]["edges"]), np.array(record["histogram"]["shares"][-1])
    axes.stairs(np.maximum(shares, 1e-7), edges, fill=True, color=COLOURS[0], alpha=0.75)
    limit, paper = record["limit"]["value"], record["limit"]["paper"]
    low, high = edges[:-1][shares > 0].min(), max(edges[1:][shares > 0].max(), limit * 1.1)
    for value, name in ((limit, "limit"), (paper, "150")):
        if low < value <= high * 1.3:
            axes.axvline(value, color=INK, linewidth=0.9, linestyle=DOTTED)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(name, (value, 0.98), xytext=(2, 0), va="top", color=INK, **place)
    axes.set(xscale="log", yscale="log", ylim=(1e-5, 1), xlim=(low * 0.95, high * 1.25))  # room for the limits' names
    set_log_ticks(axes.xaxis, 8)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(percent_tick)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("norm of a patch, last block", color=INK)
    set_grid(axes)


def position_sheet(records: Sequence[dict[str, Any]]) -> Image.Image:
    """Maps of the share of images that have an outlier at each position, one a model, black where none has.

    records  of `Measured`
    """
    places = [np.array(record["where"]["positions"]) for record in records]
    names = [f"{record['name'][:20]}: up to {percent(each.max())}" for record, each in zip(records, places)]
    return sheet([[tile(colour_map(each), 2 * TILE, smooth=False) for each in places]], names)


def map_sheet(measured: Measured, images: np.ndarray) -> Image.Image:
    """One row an image: the picture, its norms, and the attention of CLS and of each register.

    images  (k, H, W, 3) uint8, the first k of those that were measured
    """
    count, tokens, *grid = measured.attention.shape
    norms = measured.norms[-1, :count].unflatten(1, grid).numpy()
    lines = []
    for picture, norm, attention in zip(images, norms, measured.attention.numpy()):
        lines.append(map_row(picture, [colour_map(norm, float(norms.max())), *map(colour_map, attention)], TILE))
    return sheet(lines, ["image", "norms", *[name.replace("register", "reg") for name in token_names(tokens - 1)]])


# ------------------------------------------------------------------------------------------------------------
# In words, and as a table


TONES = {"none": "good", "tail": "warn", "group": "bad"}


def judge(record: dict[str, Any]) -> Verdict:
    """One model's figures in words: the finding as headline, then what follows from it and what does not.

    record  of `Measured`
    """
    outlier_probe = _probe(record, "outlier patch")
    against = (outlier_probe or {}).get("against")
    # Registers whose mean cosine is higher have not come apart.
    kind, copies = record["outliers"]["kind"], (record["registers_alike"] or 0.0) > 0.98
    text = render(
        "registers/templates/verdict.txt.j2",
        **record,
        copies=copies,
        outlier_probe=outlier_probe,
        against=against,
        difference=against and in_words(against, "share", (outlier_probe or {})["n_test"]),
        patch_probe=_probe(record, BESIDE_OUTLIERS) or _probe(record, "normal patch"),
    )
    headline, *sentences = (" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())
    return Verdict("plain" if kind == "none" and copies else TONES[kind], headline, tuple(sentences))


def _probe(record: dict[str, Any], token: str) -> dict[str, Any] | None:
    return next((probe for probe in record["probes"] if probe["token"] == token), None)


def console_table(records: Sequence[dict[str, Any]]) -> Table:
    """Models in columns, figures in rows, for the terminal."""
    table = Table("", title="registers")
    for record in records:
        table.add_column(in_markup(record["name"]), justify="right", overflow="fold")
    for name, cells in comparison(records):
        table.add_row(name, *cells)
    return table


def comparison(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of (name of the figure, a cell for each model); rows that no model has are left out."""
    lines = zip(*(_figures(record).splitlines() for record in records))
    parted = [[line.partition("|") for line in each] for each in lines]
    rows = [(each[0][0], [cell for _, _, cell in each]) for each in parted]
    return [(name, cells) for name, cells in rows if set(cells) != {DASH}]


def _figures(record: dict[str, Any]) -> str:
    accuracies = {probe["token"]: probe["accuracy"] for probe in record["probes"]}
    best = max((each for token, each in accuracies.items() if token.startswith("register")), default=None)
    found = {"dash": DASH, "accuracies": accuracies, "best_register": best}
    return render("registers/templates/comparison.txt.j2", **record, **found)
