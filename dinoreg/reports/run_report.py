"""`report.html`: a run as one self-contained page, from the files that its folder holds so far."""

import statistics
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.run_folder import Run
from dinoreg.checkpoint.steps import which_steps
from dinoreg.reports import html
from dinoreg.reports.plots import run_charts
from dinoreg.reports.verdict import verdict
from dinoreg.runtime.durations import duration
from dinoreg.runtime.json_files import flatten

MAX_LISTED = 200  # skipped images shown by name
PICTURES = ("pca", "attention", "crops")  # those of every run, in the order of the page


def write_report(folder: str | Path, problem: str = "") -> Path:
    """Write `report.html` into a run folder and return its path; parts whose files do not exist are left out.

    problem  why its pictures could not be drawn, in a sentence (`visualize.run_pictures.draw_missing`)
    """
    run = Run(folder)
    total = f" of {run.num_steps:,}" if run.num_steps else ""
    names = [*PICTURES, *sorted(set(run.pictures) - set(PICTURES))]
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
        pictures=[(name, html.picture(run.pictures[name], name)) for name in names if name in run.pictures],
        problem=problem,
        skipped=[(line.get("name", ""), line.get("reason", "")) for line in run.skipped[:MAX_LISTED]],
        environment=[(key, _plain(value)) for key, value in flatten(run.environment).items()],
    )
    write_atomic(run.folder / "report.html", content)
    return run.folder / "report.html"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
