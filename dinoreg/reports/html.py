"""One HTML file that needs nothing else: charts and pictures inside, no script, fit for phones, in light and dark.

The pages are templates (`templates/*.html.j2`); this module makes what is drawn in them: line charts as SVG of
metrics.jsonl and probe.jsonl, grouped by the question they answer, pictures, and scales.
"""

import base64
import html
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from dinoreg.checkpoint.run_folder import Probe, Run
from dinoreg.runtime.json_files import is_number, number
from dinoreg.runtime.regular_files import read_regular
from dinoreg.runtime.templates import PACKAGE, render

WEBP_SIDE = 16_383  # pixels, the longest that WebP knows
MAX_POINTS = 400  # of one line; more are averaged in groups
INK, GRID = "#3b4252", "#e3e6ec"  # of text and of lines, on a light background
DARK = {INK: "#b6bdc9", GRID: "#2e333d"}  # what they become on a dark one
DOTTED = (0, (1.5, 2.5))
SETTINGS: dict[Any, Any] = {"font.family": "sans-serif", "text.parse_math": False}
# Distinct for all common kinds of colour vision, on white and on black.
COLOURS = ("#3b7dd8", "#e08214", "#1b9e77", "#c2549d", "#8c6bb1", "#a6761d", "#d6453d", "#6b7684")


class Line(NamedTuple):
    """One curve: values y (n,) over x (n,)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Band(NamedTuple):
    """Where a curve of other runs lay: between `low` and `high` (n,) in the n parts of x between n + 1 `edges`."""

    edges: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def share_within(self, line: Line) -> float:
        """The share, 0 to 1, of the values of a line that lie in the band."""
        part = np.searchsorted(self.edges, np.asarray(line.x), side="left").clip(1, len(self.low)) - 1
        y = np.asarray(line.y)
        return float(((y >= self.low[part]) & (y <= self.high[part])).mean())


@dataclass(frozen=True)
class Chart:
    """Curves over the same axis, with dotted levels to compare them with; no curve means nothing to show.

    note       the unit of the values, and what good ones look like
    levels     {name: value}
    band       of healthy runs, behind the curves
    smooth     draw the moving average of each curve over a faint trace of its values
    marker     draw a dot at every value
    log        logarithmic axis of values; else `from_zero` begins it at 0
    log_x      logarithmic axis of what they are values over
    percent    the values are shares in [0, 1], shown in percent
    """

    title: str
    note: str = ""
    lines: list[Line] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)
    band: Band | None = None
    smooth: bool = False
    marker: bool = False
    log: bool = False
    percent: bool = False
    from_zero: bool = False
    x_label: str = "step"
    log_x: bool = False

    @property
    def in_words(self) -> str:
        """The chart for those who cannot see it: where each curve begins and ends."""
        ends = (f"{line.name} from {short(line.y[0])} to {short(line.y[-1])}" for line in self.lines)
        return f"{self.title}: {'; '.join(ends)}"


# {"run": {section: charts}, "compared": charts, "notes": {title of any other chart: its note}, "not_shown": keys}.
# A chart is its title, {key of metrics.jsonl or probe.jsonl: name in the legend} (of keys joined by "+" the sum is
# drawn), options of Chart, and a note: the unit of the values, and what good ones look like.
CHARTS = json.loads((PACKAGE / "reports/templates/charts.json").read_text())
# {signal: [least values, greatest values] of each of equal parts of a run, "runs": number}, by `benchmarks/healthy.py`.
HEALTHY = json.loads((PACKAGE / "reports/templates/healthy.json").read_text())
UNITS = {"max_memory": 2**30}  # of values that are not shown as they are


def run_charts(run: Run, most: int = 12) -> dict[str, list[Chart]]:
    """{section: charts} of a run's report; charts without a curve are left out.

    most  of the section "other", for all measurements that no other section shows
    """
    measured = {key for line in run.metrics + run.probe for key, value in line.items() if is_number(value)}
    start = "grad_norm_"
    gradients = {key: key[len(start) :].replace("_", " ") for key in sorted(measured) if key.startswith(start)}
    sections = {
        name: [_chart(run, c["title"], c["keys"] or gradients, c["note"], **c["options"]) for c in charts]
        for name, charts in CHARTS["run"].items()
    }
    keys = (each["keys"] for charts in CHARTS["run"].values() for each in charts)
    shown = set(CHARTS["not_shown"]).union(gradients, *keys)
    # Intervals, and what an accuracy is compared with.
    shown |= {key for key in measured if "knn_top1_" in key or key.startswith(("dense_", "dse")) or key == "probe_time"}
    other = [(key, key.replace("_", " ")) for key in sorted(measured - shown)[:most]]
    sections["other"] = [_chart(run, title, {key: key}, CHARTS["notes"].get(title, "")) for key, title in other]
    _add_evaluations(run, sections["probe"][0])
    return {name: [chart for chart in charts if chart.lines] for name, charts in sections.items()}


def _add_evaluations(run: Run, accuracy: Chart) -> None:
    """Evaluations beside the in-run probe, and the levels of their baselines where they measure the same."""
    for dataset in dict.fromkeys(probe.dataset for probe in run.probes if accuracy.lines):
        probes = [probe for probe in run.probes if probe.dataset == dataset]
        steps, values = [probe.step for probe in probes], [probe.value for probe in probes]
        accuracy.lines.append(Line(f"linear, {dataset}", steps, values))
    for name in ("chance", "majority"):
        if accuracy.lines and (level := run.last(f"knn_top1_{name}")) is not None:
            accuracy.levels[f"{name} {100 * level:.3g} %"] = level
    chances = [probe.details["chance"] for probe in run.newest_probes() if is_number(probe.details.get("chance"))]
    accuracy.levels.update({f"chance {100 * each:.3g} %": float(each) for each in chances})


def _chart(
    run: Run, title: str, names: Mapping[str, str], note: str, *, ln_k: bool = False, healthy: str = "", **options: Any
) -> Chart:
    """A chart of what a run has measured.

    ln_k     draw the level of a uniform guess, which a note may speak of; the values are in nats
    healthy  the signal of `HEALTHY` that the first curve shows, whose band is drawn behind it; "": none
    """
    lines = []
    for key, name in names.items():
        steps, values = run.series(key)
        if steps:
            lines.append(Line(name, steps, [value / UNITS.get(key, 1) for value in values]))
    level = run.last("teacher_entropy_max")
    if level is None:
        return Chart(title, "" if "ln K" in note else note, lines, **options)
    if healthy and lines and run.num_steps:
        low, high = (np.array(values) * (level if ln_k else 1.0) for values in HEALTHY[healthy])
        band = options["band"] = Band(np.linspace(0, run.num_steps, len(low) + 1), low, high)
        curve = "The curve" if len(lines) == 1 else f"The curve of {lines[0].name}"
        note += f" {curve} is in the grey band of {HEALTHY['runs']} healthy runs of small networks for "
        note += f"{band.share_within(lines[0]):.0%} of the run."
    return Chart(title, note, lines, {"ln K": level} if ln_k else {}, **options)


def draw_chart(chart: Chart, width: float = 3.7, height: float = 2.1) -> bytes:
    """The chart as SVG in the light theme; the title and the note are left to the page.

    width, height  inches; the legend's height is added
    """
    longest = max((len(_label(line.name)) for line in chart.lines), default=0)
    columns = 3 if longest <= 16 else 2 if longest <= 26 else 1
    legend = 0.17 * math.ceil(len(chart.lines) / columns) if len(chart.lines) > 1 else 0.0
    height += legend
    with rc_context(SETTINGS | {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "dinoreg"}):
        figure = Figure(figsize=(width, height))
        # Fixed margins: fitting them to the labels would take longer than everything else.
        figure.subplots_adjust(left=0.14, right=0.97, bottom=0.36 / height, top=1 - (0.08 + legend) / height)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        if chart.band is not None:
            until = max(line.x[-1] for line in chart.lines)
            parts = max(1, int(np.searchsorted(chart.band.edges, until)))
            edges, low, high = chart.band.edges[: parts + 1], chart.band.low[:parts], chart.band.high[:parts]
            axes.stairs(high, edges.clip(max=until), baseline=low, fill=True, color=GRID)
        for number, line in enumerate(chart.lines):
            _draw(axes, line, chart, COLOURS[number % len(COLOURS)])
        _draw_levels(axes, chart.levels)
        _set_scales(axes, chart)
        set_style(axes, INK, GRID)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        if legend:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=INK,
                handlelength=1.2, borderaxespad=0.2, columnspacing=1.2, labelspacing=0.2,
            )  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    for place, (name, level) in enumerate(levels.items()):  # in turn at the right and the left, as they may be near
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=DOTTED)
        axes.annotate(
            name, (1 - place % 2, level), xycoords=("axes fraction", "data"), textcoords="offset points",
            xytext=(2 if place % 2 else -2, 2), ha="left" if place % 2 else "right", va="bottom", color=INK,
        )  # fmt: skip


def _set_scales(axes: Axes, chart: Chart) -> None:
    if chart.log:
        axes.set_yscale("log")
        set_log_ticks(axes.yaxis, 7)
    elif chart.from_zero:
        axes.update_datalim([(float(axes.dataLim.x0), 0.0)])
        axes.margins(y=0.08)  # of all that is drawn; set before the lower limit, which would move otherwise
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(percent_tick if chart.percent else short)
    if chart.log_x:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis, 7)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(short)
    axes.set_xlabel(chart.x_label, color=INK)


def set_log_ticks(axis: Axis, count: int) -> None:
    """At most `count` ticks at powers of ten, and at 2 and 5 times these where there is room, written short."""
    low, high = axis.get_view_interval()
    wide = not 0 < low < high < 1000 * low  # where ticks between the powers would be one over the other
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=count))
    axis.set_major_formatter(short)
    axis.set_minor_formatter(NullFormatter())


def set_style(axes: Axes, ink: str, line: str, spines: Sequence[str] = ("bottom",), tick_length: int = 0) -> None:
    """No background, labels in the colour `ink`, and of the frame only some spines, in the colour `line`.

    tick_length  points
    """
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink, length=tick_length)
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(line)


def darkened(svg: bytes) -> bytes:
    """A drawn chart in the dark theme: the same drawing with other colours for text and grid."""
    for light, dark in DARK.items():
        svg = svg.replace(light.encode(), dark.encode())
    return svg


def _label(name: str) -> str:
    """A name as a legend can show it: printable, not too long, not hidden by a leading underscore."""
    shown = "".join(character for character in name if character.isprintable())[:40]
    return "\u200a" + shown if shown.startswith("_") else shown


def short(value: float, _position: object = None) -> str:
    """A number, or a tick's label, in at most six digits: 12500 -> 12.5k"""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.6g}"


def percent_tick(value: float, _position: object = None) -> str:
    """A tick's label: 0.5 -> 50 %"""
    return f"{100 * value:.4g} %"


def _draw(axes: Axes, line: Line, chart: Chart, colour: str) -> None:
    x, y = _thin(np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float))
    if chart.log:
        x, y = x[y > 0], y[y > 0]
    if chart.smooth and len(x) >= 30:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
        axes.plot(x, _moving_average(y, max(3, len(y) // 25)), color=colour, linewidth=1.7, label=_label(line.name))
    else:
        marker = "o" if chart.marker or len(x) == 1 else None
        axes.plot(x, y, color=colour, linewidth=1.5, label=_label(line.name), marker=marker, markersize=3.5)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: averages of neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    x, y = (np.array([group.mean() for group in np.array_split(each, MAX_POINTS)]) for each in (x, y))
    return x, y


def _moving_average(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of up to `width` values on either side, fewer where the curve ends."""
    window = np.ones(2 * width + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


# ------------------------------------------------------------------------------------------------------------
# Pages


class Picture(NamedTuple):
    """A picture as a `data:` address; `width` in pixels, `description` for those who cannot see it, `note` below it."""

    source: str
    width: int
    description: str
    note: str = ""


@dataclass(frozen=True, repr=False)
class WithPage:
    """A result that has a page, the path of an HTML file by which it is shown in a notebook."""

    page: Path

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.page}>"

    def _repr_html_(self) -> str:
        shown = html.escape(self.page.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{shown}" style="width: 100%; height: 40em; border: 0; resize: vertical"></iframe>'


class Scale(NamedTuple):
    """Values with their 95 % intervals on one axis.

    rows       (name, value, low, high, whether it is the model that the page is about)
    low, high  the ends of the axis
    unit       of the values, as for `score`
    chance     a level to compare with, or None
    level      what that is
    """

    rows: Sequence[tuple[str, float, float, float, bool]]
    low: float = 0.0
    high: float = 1.0
    unit: str = "share"
    chance: float | None = None
    level: str = "chance"


def probe_scale(name: str, probe: Probe) -> Scale:
    """A probe, called `name`, and its baselines: shares from 0 to 1, others up to the largest."""
    rows = [(name, probe.value, probe.low, probe.high, True)]
    rows += [(baseline, *numbers, False) for baseline, numbers in probe.baselines.items()]
    ends = [end for _, _, low, high, _ in rows for end in (low, high)]
    shares = probe.unit == "share" and min(ends) >= 0.0 and max(ends) <= 1.0
    low, high = (0.0, 1.0) if shares else (min(0.0, *ends), max(ends) or 1.0)
    levels = {"always naming the largest class": "majority", "chance": "chance"}
    known = [(number(probe.details[key]), name) for name, key in levels.items() if is_number(probe.details.get(key))]
    return Scale(rows, low, high, probe.unit, *(known[0] if known else ()))


def page(template: str, title: str, **values: Any) -> str:
    """The HTML of a page that extends `reports/templates/page.html.j2`.

    title   of the window; the heading as well, over the line `lead`, unless the template has a head of its own
    values  further variables of the template
    """
    return render(template, title=title, now=time.strftime("%Y-%m-%d %H:%M"), **values)


def charts(items: Iterable[Chart]) -> list[tuple[Chart, str, str]]:
    """Each chart with two `data:` addresses of its drawing, for a light and for a dark page."""
    drawn = [(chart, draw_chart(chart)) for chart in items]
    return [(chart, _data("image/svg+xml", svg), _data("image/svg+xml", darkened(svg))) for chart, svg in drawn]


def picture(path: Path, description: str, note: str = "") -> Picture | None:
    """A picture file, as WebP, or as PNG where it is too long for that; None when it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(read_regular(path))) as image:
            kind = "webp" if max(image.size) <= WEBP_SIDE else "png"
            image.save(buffer, format=kind, quality=88, method=4)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return Picture(_data(f"image/{kind}", buffer.getvalue()), image.width, description, note)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
