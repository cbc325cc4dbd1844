"""`report.html`: a run as one self-contained page, from whatever its folder holds at the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.reports import html
from dinoreg.reports.compare import compare_report, comparison_table
from dinoreg.reports.plots import (
    health_charts,
    loss_charts,
    other_charts,
    probe_charts,
    schedule_charts,
    speed_charts,
)
from dinoreg.reports.run_folder import Probe, Run, flatten, is_number, number, read_run
from dinoreg.reports.verdict import score, verdict

__all__ = ["compare_report", "comparison_table", "write_report"]

MAX_LISTED = 200  # skipped images shown by name
DETAILS = {
    "num_classes": "{:,} classes",
    "n_train": "{:,} training images",
    "n_test": "{:,} test images",
    "num_features": "{:,} features",
    "C": "C {:.3g}",
    "seconds": "{:.0f} s",
}

PICTURES = {
    "pca": (
        "PCA of patches",
        "The three leading principal components of the patch tokens as red, green and blue, one basis for "
        "all images. Parts that mean the same should share a colour.",
    ),
    "attention": (
        "Attention of CLS and each register",
        "Where each token looks in the last block, averaged over heads; every map is scaled to its brightest patch.",
    ),
    "crops": (
        "Training crops",
        "The first images as the networks get them. The teacher sees whole global crops, the student sees "
        "them with the grey patches hidden, and the local crops.",
    ),
}


def write_report(run: str | Path, problem: str = "") -> Path:
    """Write `report.html` into a run folder, from what is there, and return its path.

    problem  why its pictures could not be drawn, in a sentence (`visualize.run_pictures.draw_missing`)
    """
    folder = Path(run)
    content = read_run(folder)
    write_atomic(folder / "report.html", render_report(content, problem))
    return folder / "report.html"


def render_report(run: Run, problem: str = "") -> str:
    """The page of a run; `problem` says why pictures are missing. Sections without content are left out."""
    sections: list[tuple[str, str, str]] = []  # anchor, title, HTML

    def add(anchor: str, title: str, *parts: str) -> None:
        kept = [part for part in parts if part]
        if kept:
            sections.append((anchor, title, html.section(anchor, title, *kept)))

    def charts(build: Callable[[Run], list[Any]]) -> str:
        built = build(run)
        return html.charts(built) if built else ""

    add("probe", "Linear probe", *map(probe_table, run.newest_probes()))
    add("curve", "Probe during training", charts(probe_charts))
    add("losses", "Losses", charts(loss_charts))
    add("health", "Health", diagnoses(run), charts(health_charts))
    for name in [*PICTURES, *sorted(set(run.pictures) - set(PICTURES))]:
        if name in run.pictures:
            title, note = PICTURES.get(name, (name.replace("_", " "), ""))
            step = run.pictures[name].parent.name.lstrip("0") or "0"
            add(name, title, html.picture(run.pictures[name], title, f"{note} Step {step}.".strip()))
    if problem:
        add("pictures", "Pictures", f'<p class="card">{html.escape(problem)}</p>')
    add("schedules", "Schedules", charts(schedule_charts))
    add("speed", "Speed and memory", charts(speed_charts))
    add("other", "Other measurements", charts(other_charts))
    add("skipped", "Skipped images", skipped(run))
    add("config", "Config", _folded("every key, as resolved", _preformatted(run.config_text)))
    environment = [(key, _plain(value)) for key, value in flatten(run.environment).items()]
    if environment:
        add(
            "environment",
            "Environment",
            _folded("versions and machine", html.table(("what", "value"), environment)),
        )
    navigation = html.navigation([(anchor, title) for anchor, title, _ in sections]) if sections else ""
    body = [head(run), navigation, *(content for _, _, content in sections)]
    body.append(f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} by dinoreg. This page needs no network.</footer>")
    return html.page(f"{run.name} · dinoreg", body)


def head(run: Run) -> str:
    """Title, verdict and the figures of the run."""
    words = verdict(run)
    sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in words.sentences)
    phase = str(run.status.get("phase", ""))
    total = f" of {run.num_steps:,}" if run.num_steps else ""
    state = f"{phase}, step {run.step:,}{total}" if phase else f"step {run.step:,}{total}"
    return (
        f"<h1>{html.escape(run.name)}</h1>\n"
        f'<p class="soft">register ViT pretraining · {html.escape(state)}</p>\n'
        f'<div class="card verdict {words.tone}"><p>{html.escape(words.headline)}</p>{sentences}</div>\n'
        + html.facts(figures(run))
    )


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, small print) of the run; without a value a tile is not shown."""
    config = flatten(run.config)
    model = str(config.get("model.name") or "")
    parameters = f"{run.parameters / 1e6:.2f} M parameters" if run.parameters else ""
    source = config.get("data.source")
    data = ", ".join(map(str, source)) if isinstance(source, list) else str(source or "")
    kind, _, options = data.partition(":")
    short = kind if kind == "scenes" else Path(data).name or data
    rates = run.series("images_per_second")[1]
    speed = f"{statistics.median(rates):,.0f} img/s" if rates else ""
    waits, steps = run.series("data_time")[1], run.series("step_time")[1]
    waiting = f"{sum(waits) / sum(steps):.0%} waiting for images" if waits and steps and sum(steps) > 0 else ""
    batch = config.get("batch_size")
    total = run.num_steps
    crops, prototypes = config.get("crops.global_size"), config.get("head.prototypes")
    return [
        ("model", model, parameters),
        ("data", short, options if kind == "scenes" else data if short != data else ""),
        (
            "steps",
            f"{run.step:,}" if run.step else "",
            f"of {total:,}" if total and total != run.step else "",
        ),
        ("images seen", f"{run.images_seen:,}" if run.images_seen else "", f"batch {batch}" if batch else ""),
        ("training time", duration(run.seconds), ""),
        ("speed", speed, waiting),
        ("hardware", *hardware(run)),
        (
            "crops",
            f"{crops} px" if crops else "",
            f"{prototypes:,} prototypes" if is_number(prototypes) else "",
        ),
    ]


def hardware(run: Run) -> tuple[str, str]:
    devices = run.environment.get("cuda")
    names = [str(device.get("name")) for device in devices or [] if isinstance(device, dict)]
    device = str(run.config.get("device") or "auto")
    cores = run.environment.get("cores")
    processor = str(run.environment.get("cpu") or "")
    if names and device != "cpu":
        return (names[0] if len(names) == 1 else f"{len(names)} · {names[0]}"), processor
    return (f"{cores} CPU cores" if cores else processor), processor if cores else ""


def probe_table(probe: Probe) -> str:
    """A probe and its baselines on one scale, with chance as a dotted line."""
    rows = [("this run", probe.value, probe.low, probe.high, True)]
    rows += [(name, *numbers, False) for name, numbers in probe.baselines.items()]
    chance = number(probe.details["chance"]) if is_number(probe.details.get("chance")) else None
    ends = [end for _, _, low, high, _ in rows for end in (low, high)]
    unit = str(probe.details.get("unit", "share"))
    shares = unit == "share" and min(ends) >= 0.0 and max(ends) <= 1.0
    scale = (0.0, 1.0) if shares else (min(0.0, *ends), max(ends))
    details = [words.format(probe.details[key]) for key, words in DETAILS.items() if is_number(probe.details.get(key))]
    dotted = f" Dotted: chance, {score(chance)}." if chance is not None else ""
    body = html.interval_rows(rows, lambda value: score(value, unit), chance, *scale)
    axis = "The scale runs from 0 to 100 %." if shares else ""
    return (
        f'<div class="card"><h3>{html.escape(probe.dataset)}</h3><p class="note">'
        f"{html.escape(probe.metric)} with its 95 % bootstrap interval, step {probe.step:,}. "
        f"{html.escape(axis)}{html.escape(dotted)}</p>"
        f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'
        f'<p class="note">{html.escape(" · ".join(details))}</p></div>'
    )


def diagnoses(run: Run) -> str:
    """Everything the monitor named, each with its remedy."""
    if not run.events:
        return '<p class="card">No problem was named.</p>' if run.metrics else ""
    items = []
    for event in run.events:
        message, remedy = str(event.get("message", "")), str(event.get("remedy", ""))
        items.append(
            f'<p><span class="mark">{html.escape(event.get("name", "unnamed"))}</span> '
            f'<span class="soft">step {html.escape(event.get("step", "?"))}</span><br>{html.escape(message)}.'
            + (f" <b>{html.escape(remedy)}</b>" if remedy else "")
            + "</p>"
        )
    return f'<div class="card">{"".join(items)}</div>'


def skipped(run: Run) -> str:
    if not run.skipped:
        return ""
    rows = [(line.get("name", ""), line.get("reason", "")) for line in run.skipped[:MAX_LISTED]]
    count = len(run.skipped)
    more = f'<p class="note">and {count - MAX_LISTED} more in skipped.jsonl</p>' if count > MAX_LISTED else ""
    images = "1 image was" if count == 1 else f"{count} images were"
    body = f"<p>{images} left out of training.</p>{html.table(('image', 'reason'), rows)}{more}"
    return f'<div class="card">{body}</div>'


def duration(seconds: float | None) -> str:
    """75 -> 1 min 15 s"""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _folded(summary: str, content: str) -> str:
    return f'<details class="card"><summary>{html.escape(summary)}</summary>{content}</details>' if content else ""


def _preformatted(text: str) -> str:
    return f"<pre>{html.escape(text.strip())}</pre>" if text.strip() else ""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
