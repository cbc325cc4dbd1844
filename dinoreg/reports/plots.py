"""Line charts of a run as SVG: metrics.jsonl and probe.jsonl, grouped by the question they answer."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dinoreg.checkpoint.run_folder import Run
from dinoreg.runtime.json_files import is_number

MAX_POINTS = 400  # of one line; more are averaged in groups
INK, GRID = "#3b4252", "#e3e6ec"  # of text and of lines, on a light ground
DARK = {INK: "#b6bdc9", GRID: "#2e333d"}  # what they become on a dark one
DOTTED = (0, (1.5, 2.5))
SETTINGS: dict[Any, Any] = {"font.family": "sans-serif", "text.parse_math": False}
# Told apart by all common kinds of colour vision, on white and on black.
COLOURS = ("#3b7dd8", "#e08214", "#1b9e77", "#c2549d", "#8c6bb1", "#a6761d", "#d6453d", "#6b7684")


@dataclass(frozen=True)
class Line:
    """One curve; `smooth` draws its moving average over a faint trace of the values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    marker: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the same axis, with dotted levels to compare them with; no curve means nothing to show."""

    title: str
    note: str = ""
    lines: list[Line] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)
    log: bool = False
    percent: bool = False
    from_zero: bool = False
    x_label: str = "step"


# Rows of (title, note, {key of metrics.jsonl or probe.jsonl: name in the legend}, options of the chart).
Rows = Sequence[tuple[str, str, Mapping[str, str], Mapping[str, Any]]]
ZERO = {"from_zero": True}
SHARE = {"from_zero": True, "percent": True}
LOG = {"log": True}
LOSSES = {
    "total_loss": "total",
    "dino_global_crops_loss": "global",
    "dino_local_crops_loss": "local",
    "ibot_loss": "iBOT",
    "koleo_loss": "KoLeo",
}
SCHEDULES: Rows = (
    ("Learning rate", "", {"lr": "all", "last_layer_lr": "prototypes"}, ZERO),
    ("Weight decay", "", {"wd": "weight decay"}, {}),
    ("Teacher momentum", "", {"mom": "momentum"}, {}),
    ("Teacher temperature", "", {"teacher_temp": "temperature"}, {}),
)
TARGETS = "One target should be far below ln K (it says something), their average near it (they differ)."
EVEN = "Share that gets at least a tenth of an even share."
RANK = "RankMe on training crops; near 1 means collapse."
SPREAD = "Standard deviation over the batch; near 0 means collapse."
MOTION = "Change in one step, and distance of student and teacher, relative to the weights."
HEALTH: Rows = (
    ("Prototypes in use", EVEN, {"prototype_usage": "used"}, SHARE),
    ("Effective rank of class tokens", RANK, {"feature_rank": "rank"}, ZERO),
    ("Spread of features", SPREAD, {"feature_std": "spread"}, ZERO),
)
SPEED: Rows = (
    (
        "Seconds per step",
        "Waiting for images should be a small part.",
        {"step_time": "step", "data_time": "of it, waiting for images"},
        ZERO,
    ),
)
_KNOWN = {
    *("step", "images", "total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss"),
    *("koleo_loss", "lr", "wd", "mom", "teacher_temp", "last_layer_lr", "current_batch_size"),
    *("global_batch_size", "step_time", "data_time", "images_per_second", "max_memory", "teacher_entropy"),
    *("teacher_entropy_max", "target_marginal_entropy", "prototype_usage", "feature_std", "feature_rank"),
    *("update_ratio", "teacher_distance", "knn_top1", "rankme", "probe_time"),
}


def loss_charts(run: Run) -> list[Chart]:
    """The losses, smoothed, beside those of a uniform guess where the number of prototypes K is known."""
    levels = _ln_k(run)
    guess = "Starts at ln K, a uniform guess over the prototypes; it has to leave that level." if levels else ""
    masked = "A uniform guess gives ln K times the share of masked crops." if levels else ""
    lines = {key: _lines(run, {key: name}, smooth=True) for key, name in LOSSES.items()}
    parts = ("dino_global_crops_loss", "dino_local_crops_loss")
    steps, sums = _sum_of(run, *parts)
    both = [Line("global + local", steps, sums, smooth=True)] if steps else []
    return _shown(
        Chart("Total loss", "What the optimizer minimises.", lines["total_loss"]),
        Chart("Class token (DINO)", guess, both + lines[parts[0]] + lines[parts[1]], levels),
        Chart("Masked patches (iBOT)", masked, lines["ibot_loss"]),
        Chart("Spread of class tokens (KoLeo)", "Lower is more evenly spread.", lines["koleo_loss"]),
    )


def schedule_charts(run: Run) -> list[Chart]:
    """What is set over the course of the run."""
    return _charts(run, SCHEDULES)


def health_charts(run: Run) -> list[Chart]:
    """Signs of collapse and of divergence."""
    entropies = _lines(run, {"teacher_entropy": "one target", "target_marginal_entropy": "average target"})
    norms = sorted({key for line in run.metrics for key in line if key.startswith("grad_norm_")})
    gradients = {key: key.removeprefix("grad_norm_").replace("_", " ") for key in norms}
    motion = {"update_ratio": "update", "teacher_distance": "student to teacher"}
    return [
        *_shown(Chart("Entropy of the teacher's targets", TARGETS, entropies, _ln_k(run), from_zero=True)),
        *_charts(run, HEALTH),
        *_charts(
            run, [("Gradient norms", "Before clipping.", gradients, LOG), ("Weights in motion", MOTION, motion, LOG)]
        ),
    ]


def speed_charts(run: Run) -> list[Chart]:
    """Images per second, seconds per step and of waiting for images, peak memory in GiB."""
    steps, memory = run.series("max_memory")
    gib = [Line("peak", steps, [value / 2**30 for value in memory])] if steps else []
    return [
        *_shown(
            Chart("Images per second", "", _lines(run, {"images_per_second": "rate"}, smooth=True), from_zero=True)
        ),
        *_charts(run, SPEED),
        *_shown(Chart("Memory in GiB", "", gib, from_zero=True)),
    ]


def probe_charts(run: Run) -> list[Chart]:
    """The in-run probe, with the levels of the final evaluation's baselines where they measure the same."""
    chances = {probe.details.get("chance") for probe in run.newest_probes()}
    chance = {f"chance {100 * each:.3g} %": float(each) for each in chances if each is not None and is_number(each)}
    curves = _lines(run, {"knn_top1": "k-NN"}, marker=True)
    for dataset in dict.fromkeys(probe.dataset for probe in run.probes if curves):
        probes = [probe for probe in run.probes if probe.dataset == dataset]
        steps, values = [probe.step for probe in probes], [probe.value for probe in probes]
        curves.append(Line(f"linear, {dataset}", steps, values, marker=True))
    ranks = _lines(run, {"rankme": "rank"}, marker=True)
    rankme = "RankMe: needs no labels; higher is usually better."
    return _shown(
        Chart("Accuracy of the probe", "Frozen features of the teacher.", curves, chance, percent=True, from_zero=True),
        Chart("Effective rank of the probe's features", rankme, ranks, from_zero=True),
    )


def other_charts(run: Run, most: int = 12) -> list[Chart]:
    """Whatever else a run has measured."""
    measured = {key for line in run.metrics + run.probe for key, value in line.items() if is_number(value)}
    keys = sorted(key for key in measured - _KNOWN if not key.startswith("grad_norm_"))
    return _charts(run, [(key.replace("_", " "), "", {key: key}, {}) for key in keys[:most]])


def _charts(run: Run, rows: Rows) -> list[Chart]:
    return _shown(*(Chart(title, note, _lines(run, names), **options) for title, note, names, options in rows))


def _ln_k(run: Run) -> dict[str, float]:
    ln_k = run.last("teacher_entropy_max")
    return {} if ln_k is None else {"ln K": ln_k}


def draw_chart(chart: Chart, width: float = 3.7, height: float = 2.1) -> bytes:
    """The chart as SVG in the light theme, in inches; the title and the note are left to the page."""
    longest = max((len(_label(line.name)) for line in chart.lines), default=0)
    columns = 3 if longest <= 16 else 2 if longest <= 26 else 1
    legend = 0.17 * math.ceil(len(chart.lines) / columns) if len(chart.lines) > 1 else 0.0
    height += legend
    with rc_context(SETTINGS | {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "dinoreg"}):
        figure = Figure(figsize=(width, height))
        # Fixed margins: fitting them to the labels would take longer than everything else.
        figure.subplots_adjust(left=0.14, right=0.985, bottom=0.36 / height, top=1 - (0.08 + legend) / height)
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        for number, line in enumerate(chart.lines):
            _draw(axes.plot, line, COLOURS[number % len(COLOURS)], chart.log)
        _draw_levels(axes, chart.levels)
        _set_scales(axes, chart)
        _set_style(axes)
        if legend:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=INK,
                handlelength=1.2, borderaxespad=0.2, columnspacing=1.2, labelspacing=0.2,
            )  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    for name, level in levels.items():
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=DOTTED)
        axes.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", color=INK,
        )  # fmt: skip


def _set_scales(axes: Axes, chart: Chart) -> None:
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif chart.from_zero:
        axes.update_datalim([(float(axes.dataLim.x0), 0.0)])
        axes.margins(y=0.08)  # of all that is shown, and before a limit is set, which then stays as it is
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(percent_tick if chart.percent else short_tick)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(short_tick)
    axes.set_xlabel(chart.x_label, color=INK)


def _set_style(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def darkened(svg: bytes) -> bytes:
    """A drawn chart in the dark theme: the same drawing with other colours for text and grid."""
    for light, dark in DARK.items():
        svg = svg.replace(light.encode(), dark.encode())
    return svg


def _label(name: str) -> str:
    """A name as a legend can show it: printable, not too long, not hidden by a leading underscore."""
    shown = "".join(character for character in name if character.isprintable())[:40]
    return "\u200a" + shown if shown.startswith("_") else shown


def short(value: float) -> str:
    """12500 -> 12.5k"""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.6g}"


def short_tick(value: float, _position: object = None) -> str:
    """A tick's label: 12500 -> 12.5k"""
    return short(value)


def percent_tick(value: float, _position: object = None) -> str:
    """A tick's label: 0.5 -> 50 %"""
    return f"{100 * value:.4g} %"


def _draw(plot: Callable[..., object], line: Line, colour: str, log: bool) -> None:
    x, y = _thin(np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float))
    if log:
        x, y = x[y > 0], y[y > 0]
    marker = {"marker": "o", "markersize": 3.5} if line.marker or len(x) == 1 else {}
    if line.smooth and len(x) >= 30:
        plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
        plot(x, _moving_average(y, max(3, len(y) // 25)), color=colour, linewidth=1.7, label=_label(line.name))
    else:
        plot(x, y, color=colour, linewidth=1.5, label=_label(line.name), **marker)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: averages of neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[each].mean() for each in groups]), np.array([y[each].mean() for each in groups])


def _moving_average(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of up to `width` values on either side, fewer where the curve ends."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    first, last = np.maximum(index - width, 0), np.minimum(index + width + 1, len(y))
    return (total[last] - total[first]) / (last - first)


def _lines(run: Run, names: Mapping[str, str], smooth: bool = False, marker: bool = False) -> list[Line]:
    drawn = ((name, run.series(key)) for key, name in names.items())
    return [Line(name, x, y, smooth, marker) for name, (x, y) in drawn if x]


def _sum_of(run: Run, *keys: str) -> tuple[list[float], list[float]]:
    lines = [line for line in run.metrics if all(is_number(line.get(key)) for key in keys)]
    return [line["step"] for line in lines], [math.fsum(line[key] for key in keys) for line in lines]


def _shown(*charts: Chart) -> list[Chart]:
    return [chart for chart in charts if chart.lines]
