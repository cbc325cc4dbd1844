"""Runs as one self-contained page, from the files that their folders hold so far: `report.html` of one, and several
side by side, as a table, what differs in their configs, and their curves over one another.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.run_folder import Run, RunState
from dinoreg.checkpoint.steps import which_steps
from dinoreg.config.load import COMMAND_ONLY
from dinoreg.reports import html
from dinoreg.reports.html import CHARTS, Chart, Line, run_charts
from dinoreg.reports.run_list import probed
from dinoreg.reports.verdict import PAIRED, paired_rows, verdict
from dinoreg.runtime.durations import duration
from dinoreg.runtime.json_files import flatten
from dinoreg.runtime.templates import DASH, score

MAX_LISTED = 200  # skipped images shown by name


def write_report(folder: str | Path, problem: str = "") -> Path:
    """Write `report.html` into a run folder and return its path; parts whose files do not exist are left out.

    problem  why its pictures could not be drawn, in a sentence (`visualize.run_pictures.draw_missing`)
    """
    run = Run(folder)
    total = f" of {run.num_steps:,}" if run.num_steps else ""
    rates, waits, steps = (run.series(key)[1] for key in ("images_per_second", "data_time", "step_time"))
    content = html.page(
        "reports/templates/run.html.j2",
        run.name,
        run=run,
        state=", ".join(filter(None, [str(run.status.get("phase", "")), f"step {run.step:,}{total}"])),
        steps=which_steps(run.folder),
        words=verdict(run),
        keys=flatten(run.config),
        rate=statistics.median(rates) if rates else None,
        waiting=sum(waits) / sum(steps) if waits and sum(steps) > 0 else None,
        time="" if run.seconds is None else duration(run.seconds),
        probes=[(probe, html.probe_scale("this run", probe)) for probe in run.newest_probes()],
        charts={name: html.charts(each) for name, each in run_charts(run).items()},
        pictures=[(name, html.picture(path, name)) for name, path in sorted(run.pictures.items(), reverse=True)],
        problem=problem,
        skipped=[(line.get("name", ""), line.get("reason", "")) for line in run.skipped[:MAX_LISTED]],
        environment=[(key, _text(value)) for key, value in flatten(run.environment).items()],
    )
    write_atomic(run.folder / "report.html", content)
    return run.folder / "report.html"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------------
# Several runs


# Options that do not affect training.
NOT_COMPARED = ("out", *COMMAND_ONLY, "data.index_dir")
# Of those that do: what losses are of, so that they are on one scale only where these are equal.
OF_LOSSES = ("batch_size", "head.", "crops.", "mask.", "loss.", "distill", "schedule.teacher_temp")


def compare_report(runs: Sequence[Run], out: Path | None = None, paired: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write one page on several runs; returns its path.

    out     a file or an existing folder; None: `report.html` in the current one
    paired  their results against one another on the same images, as `comparison.between` gives them
    """
    names = run_names(runs)
    path = Path(out or "report.html")
    path = path / "report.html" if path.is_dir() else path
    columns, rows = comparison(runs, names)
    unlike, reports = differences(runs), [run.folder / "report.html" for run in runs]
    content = html.page(
        "reports/templates/compare.html.j2",
        f"{len(runs)} runs compared",
        lead=", ".join(names),
        names=names,
        columns=columns,
        rows=rows,
        links=[os.path.relpath(each, path.parent) if each.is_file() and each != path else "" for each in reports],
        apart=[key for key in unlike if key.startswith(OF_LOSSES)],
        paired_columns=PAIRED,
        paired=paired_rows(paired),
        differences=[(key, *(value or DASH for value in values)) for key, values in unlike.items()],
        charts=html.charts(overlaid(runs, names)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return path


def comparison(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Column headings and one row of text per run, with a dash for what is not known; empty columns are left out."""
    rows = []
    for run, name in zip(runs, names):
        rates, (last, best) = run.series("images_per_second")[1], probed(run)
        row = {
            "run": name,
            "state": RunState(run).in_words,
            "model": str(flatten(run.config).get("model.name") or ""),
            "step": f"{run.step:,}",
            "images": f"{run.images_seen:,}" if run.images_seen else "",
            "img/s": f"{statistics.median(rates):.0f}" if rates else "",
            "total loss": _number(run.last("loss")),
            "probe, last (95 %)": str(last or ""),
            "probe, best (95 %)": str(best or ""),
            "RankMe": _number(run.last("rankme")),
            "problems": ", ".join(dict.fromkeys(str(event.get("name", "")) for event in run.events)),
        }
        for probe in run.newest_probes():
            value, low, high = (score(each, probe.unit) for each in (probe.value, probe.low, probe.high))
            row[f"{probe.dataset} (95 %)"] = f"{value} ({low} to {high})"
        rows.append(row)
    columns = [column for column in dict.fromkeys(chain(*rows)) if any(row.get(column) for row in rows)]
    return columns, [[row.get(column) or DASH for column in columns] for row in rows]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{key: its value in each run, as text} for every config key on which the runs disagree."""
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_COMPARED)
    values = {key: [_text(config[key]) if key in config else "" for config in configs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def overlaid(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """One chart per measurement with a line per run; over images, not steps, where batch sizes differ and are known."""
    by_images = all(run.images_seen for run in runs) and len({run.config.get("batch_size") for run in runs}) > 1
    charts = []
    for each in CHARTS["compared"]:
        (key,) = each["keys"]
        chart = Chart(each["title"], each["note"], x_label="images" if by_images else "step", **each["options"])
        for run, name in zip(runs, names):
            x, y = run.series(key)
            if by_images and run.images_seen and run.step:
                x = [step * run.images_seen / run.metrics[-1]["step"] for step in x]
            if x:
                chart.lines.append(Line(name, x, y))
        charts.append(chart)
    return [chart for chart in charts if chart.lines]


def run_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, with as much of the path as makes them distinct."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number + 1})" for number, run in enumerate(runs)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
