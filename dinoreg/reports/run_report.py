"""`report.html`: a run as one self-contained page, from the files that its folder holds so far."""

import statistics
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.run_folder import Probe, Run
from dinoreg.checkpoint.steps import which_steps
from dinoreg.reports import html
from dinoreg.reports.plots import run_charts
from dinoreg.reports.verdict import verdict
from dinoreg.runtime.durations import duration
from dinoreg.runtime.json_files import flatten, is_number

MAX_LISTED = 200  # skipped images shown by name
DETAILS = {
    "num_classes": "{:,} classes",
    "n_train": "{:,} training images",
    "n_test": "{:,} test images",
    "num_features": "{:,} features",
    "C": "C {:.3g}",
    "seconds": "{:.0f} s",
}
PICTURES = ("pca", "attention", "crops")  # those of every run, in the order of the page


def write_report(folder: str | Path, problem: str = "") -> Path:
    """Write `report.html` into a run folder and return its path; parts whose files do not exist are left out.

    problem  why its pictures could not be drawn, in a sentence (`visualize.run_pictures.draw_missing`)
    """
    run = Run(folder)
    total = f" of {run.num_steps:,}" if run.num_steps else ""
    names = [*PICTURES, *sorted(set(run.pictures) - set(PICTURES))]
    content = html.page(
        "reports/templates/run.html.j2",
        run.name,
        run=run,
        state=", ".join(filter(None, [str(run.status.get("phase", "")), f"step {run.step:,}{total}"])),
        steps=which_steps(run.folder),
        words=verdict(run),
        figures=figures(run),
        probes=[(probe, html.probe_scale("this run", probe), _details(probe)) for probe in run.newest_probes()],
        charts={name: html.charts(each) for name, each in run_charts(run).items()},
        pictures=[(name, html.picture(run.pictures[name], name)) for name in names if name in run.pictures],
        problem=problem,
        skipped=[(line.get("name", ""), line.get("reason", "")) for line in run.skipped[:MAX_LISTED]],
        environment=[(key, _plain(value)) for key, value in flatten(run.environment).items()],
    )
    write_atomic(run.folder / "report.html", content)
    return run.folder / "report.html"


def _details(probe: Probe) -> list[str]:
    known = probe.details
    return [words.format(known[key]) for key, words in DETAILS.items() if is_number(known.get(key))]


def figures(run: Run) -> list[tuple[str, Any, str]]:
    """(name, value, small print) of the run's tiles; a tile without a value is not shown."""
    config, total = flatten(run.config), run.num_steps
    source = config.get("data.source")
    data = ", ".join(map(str, source)) if isinstance(source, list) else str(source or "")
    kind, _, options = data.partition(":")
    short = kind if kind == "scenes" else Path(data).name or data
    rates, waits, steps = (run.series(key)[1] for key in ("images_per_second", "data_time", "step_time"))
    waiting = f"{sum(waits) / sum(steps):.0%} waiting for images" if waits and steps and sum(steps) > 0 else ""
    batch, crops, stages = map(config.get, ("batch_size", "crops.global_size", "crops.stages"))
    images, skipped = run.status.get("num_images"), len(run.skipped)
    seen = f"{images:,} images" if is_number(images) else ""
    if is_number(images) and images and run.images_seen:
        seen += f", {run.images_seen / images:,.1f} passes"
    seen += f", {skipped:,} skipped" if skipped else ""
    prototypes = config.get("head.prototypes")
    small = [f"{prototypes:,} prototypes"] if is_number(prototypes) else []
    small += [f"before: {', '.join(map(str, stages))}"] if isinstance(stages, list) and stages else []
    return [
        ("model", config.get("model.name"), f"{run.parameters / 1e6:.2f} M parameters" if run.parameters else ""),
        (
            "data",
            short,
            "; ".join(filter(None, [options if kind == "scenes" else data if short != data else "", seen])),
        ),
        ("steps", f"{run.step:,}" if run.step else "", f"of {total:,}" if total and total != run.step else ""),
        ("images seen", f"{run.images_seen:,}" if run.images_seen else "", f"batch {batch}" if batch else ""),
        ("training time", "" if run.seconds is None else duration(run.seconds), ""),
        ("speed", f"{statistics.median(rates):,.0f} img/s" if rates else "", waiting),
        ("hardware", *hardware(run)),
        ("crops", f"{crops} px" if crops else "", "; ".join(small)),
    ]


def hardware(run: Run) -> tuple[str, str]:
    """The device of the run, and the processor beside it where the device is a GPU."""
    devices = run.environment.get("cuda")
    names = [str(device.get("name")) for device in devices or [] if isinstance(device, dict)]
    device = str(run.config.get("device") or "auto")
    cores = run.environment.get("cores")
    processor = str(run.environment.get("cpu") or "")
    if names and device != "cpu":
        return (names[0] if len(names) == 1 else f"{len(names)} · {names[0]}"), processor
    return (f"{cores} CPU cores" if cores else processor), processor if cores else ""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
