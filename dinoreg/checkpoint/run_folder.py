"""The one reader of a run folder: every file may be missing, cut short or of another version.

`Run` has all data that reports and model cards show; `run_of` finds the run of some weights;
`RunState` says how it stands: finished, running, stopped, failed, or ended without a word.
"""

import math
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dinoreg.runtime.durations import about
from dinoreg.runtime.environment import is_alive
from dinoreg.runtime.json_files import is_number, newest_teacher, number, read_json, read_json_lines, read_text, step_in

# That dinov2 does not have.
OWN_LOSSES = ("diet_loss", "anchor_loss", "gram_loss", "paka_loss", "distill_cls_loss", "distill_patch_loss")


def logged_losses(optimised: Mapping[str, Any], dino_weight: float, ibot_weight: float) -> dict[str, float]:
    """Losses as metrics.jsonl has them: `loss` is what is optimised, dinov2's names have the values that dinov2 logs.

    dinov2 logs the class token's two terms without their weight, half of the patches' term without its weight, half of
    KoLeo's with it, and as total_loss the sum of what it logs. What only dinoreg has is as optimised.

    optimised  weighted terms under these names, and their sum as "total_loss"; terms with a weight of 0 are not there
    """
    divisors = {"dino_global_crops_loss": dino_weight, "dino_local_crops_loss": dino_weight}
    divisors |= {"ibot_loss": 2 * ibot_weight, "koleo_loss": 2.0, **dict.fromkeys(OWN_LOSSES, 1.0)}
    terms = {name: number(optimised[name]) / by for name, by in divisors.items() if name in optimised and by}
    return {"loss": number(optimised["total_loss"]), "total_loss": sum(terms.values()), **terms}


@dataclass(frozen=True)
class Probe:
    """One evaluation result, of `eval/<step>/<dataset>.json`.

    value, low, high  the headline metric and its confidence interval, in `unit`
    baselines         {name: (value, low, high)}, as the headline
    details           the file's content
    """

    step: int
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    baselines: dict[str, tuple[float, float, float]]  # name -> value, low, high
    details: dict[str, Any]  # the complete record

    @property
    def unit(self) -> str:
        """The unit of the values: "share" (0 to 1), or the text to print after the number."""
        return str(self.details.get("unit", "share"))


class Run:
    """Everything that a report shows of a run folder, read into memory; missing or unreadable files give empty values.

    metrics, probe  lines of metrics.jsonl and probe.jsonl (the probe within the run), by step
    events          health diagnoses
    probes          evaluations, by step
    pictures        {name: PNG of the newest step that has it}
    parameters      of the backbone; None where there is no teacher file
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = path = Path(folder)
        self.config_text = read_text(path / "config.yaml")
        self.config = _yaml(self.config_text)
        self.environment = read_json(path / "environment.json")
        self.status = read_json(path / "status.json")
        self.metrics = by_step(read_json_lines(path / "metrics.jsonl"))
        self.probe = by_step(read_json_lines(path / "probe.jsonl"))
        self.events = read_json_lines(path / "health" / "events.jsonl")
        self.skipped = read_json_lines(path / "skipped.jsonl")
        self.probes = _probes(path / "eval")
        self.pictures = _pictures(path / "view")
        teacher = newest_teacher(path)
        self.parameters = None if teacher is None else _parameters(teacher)

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl, probe.jsonl and status.json; 0 without any."""
        known = [line["step"] for line in self.metrics[-1:] + self.probe[-1:]] + [self.status.get("step")]
        return max(whole(step) or 0 for step in known)

    @property
    def num_steps(self) -> int | None:
        """Steps that the run is configured for; None where unknown."""
        return whole(self.status.get("num_steps", self.config.get("steps")))

    @property
    def images_seen(self) -> int | None:
        """Images that all processes have trained on up to the last line of metrics.jsonl; None where unknown."""
        return whole(self.metrics[-1].get("images")) if self.metrics else None

    @property
    def seconds(self) -> float | None:
        """Seconds spent in steps: each line's step time times the steps since the line before; None where unknown."""
        steps = np.diff([line["step"] for line in self.metrics], prepend=0)
        seconds = float(np.dot(steps, [number(line.get("step_time")) for line in self.metrics]))
        return seconds if self.metrics and math.isfinite(seconds) else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """The steps and values of a key in the lines of metrics.jsonl, then probe.jsonl; of keys joined by "+" the sum.

        Lines where a value is missing or not finite are left out.
        """
        keys = key.split("+")
        lines = [line for line in self.metrics + self.probe if all(is_number(line.get(each)) for each in keys)]
        return [float(line["step"]) for line in lines], [math.fsum(line[each] for each in keys) for line in lines]

    def last(self, key: str) -> float | None:
        """The last finite value of a key of metrics.jsonl or probe.jsonl; None without one."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def newest_probes(self) -> list[Probe]:
        """The last record of each dataset."""
        return list({probe.dataset: probe for probe in self.probes}.values())


def line_at(lines: Sequence[Mapping[str, Any]], step: int | None) -> Mapping[str, Any]:
    """The last of `lines`, which are in order of their steps, at or before `step` (None: the last); {} without one."""
    return next((line for line in reversed(lines) if step is None or line["step"] <= step), {})


def run_of(weights: str | Path) -> Path | None:
    """The run folder of `weights`, a run folder or one of its teacher files; None for anything else."""
    path = Path(weights)
    is_teacher = path.parent.name == "teacher" and step_in(path.stem) is not None
    run = path.parent.parent if is_teacher else path
    return run if (run / "config.yaml").is_file() else None


def whole(value: Any) -> int | None:
    """A JSON value as an int; None where it is not a number."""
    return int(value) if is_number(value) else None


def _yaml(text: str) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception:  # the parser's and OmegaConf's errors have no common base; a broken file shows as text
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def by_step(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a file in order of the step; of several lines for one step, as after a resume, the last."""
    last = {line["step"]: line for line in lines if is_number(line.get("step"))}
    return [last[step] for step in sorted(last)]


def _probes(folder: Path) -> list[Probe]:
    probes = []
    for path in sorted(folder.glob("*/*.json")):
        content = read_json(path)
        if path.parent.name.isdigit() and is_number(content.get("value")):
            probes.append(read_probe(content, path))
    return sorted(probes, key=lambda probe: (probe.step, probe.dataset))


def read_probe(content: Mapping[str, Any], path: Path) -> Probe:
    """The result in `content`, read from `path`, an `eval/<step>/<dataset>.json`; NaN where its value is no number."""
    baselines = content.get("baselines")
    return Probe(
        step=int(path.parent.name) if path.parent.name.isdigit() else 0,
        dataset=str(content.get("dataset", path.stem)),
        metric=str(content.get("metric", "score")),
        **dict(zip(("value", "low", "high"), _interval(content))),
        baselines={
            str(name): _interval(row)
            for name, row in (baselines.items() if isinstance(baselines, dict) else ())
            if isinstance(row, dict) and is_number(row.get("value"))
        },
        details=dict(content),
    )


def _interval(row: Mapping[str, Any]) -> tuple[float, float, float]:
    value = number(row.get("value"))
    low, high = (float(row[key]) if is_number(row.get(key)) else value for key in ("low", "high"))
    return value, low, high


def _pictures(folder: Path) -> dict[str, Path]:
    steps = sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    return {path.stem: path for step in steps for path in sorted(step.glob("*.png"))}


def _parameters(path: Path) -> int | None:
    """Number of parameters of the backbone, from the header of a teacher file; None where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = [key for key in file.keys() if key.startswith("backbone.")]  # noqa: SIM118 - not a dict
            shapes = [file.get_slice(name).get_shape() for name in names]
    except (OSError, SafetensorError):
        return None
    return sum(math.prod(shape) for shape in shapes) or None


# ------------------------------------------------------------------------------------------------------------
# How a run stands


# Phases, and how much each is a problem.
MARKS = {"finished": "ok", "running": "running", "unseen": "running", "stopped": "open", "failed": "problem"}
MARKS |= {"lost": "problem"}
SPOKEN = {"unseen": "not seen to end", "lost": "ended without a word"}


class RunState:
    """How a run stands.

    phase      one of MARKS; "unseen": on another machine, not seen to end; "lost": ended without a word
    reason     why it ended early ("SIGTERM", an error), or where it runs; "" where nothing is to be said
    reached    the last step that is known of
    saved      the step of the last checkpoint; 0: nothing was saved
    num_steps  of the whole run; None: unknown
    updated    when its files were last written, in seconds since 1970; 0: unknown
    """

    def __init__(self, run: Run) -> None:
        status = run.status
        self.phase, self.reason = str(status.get("phase")), str(status.get("reason", ""))
        if self.phase not in ("finished", "stopped", "failed"):
            self.phase, self.reason = _alive(run.folder)
        reached, self.saved = (whole(status.get(key)) or 0 for key in ("reached", "step"))
        self.reached, self.num_steps = max(run.step, reached), run.num_steps
        files = (run.folder / name for name in ("metrics.jsonl", "status.json"))
        self.updated = max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)

    @property
    def age(self) -> str:
        """How long ago its files were last written, in words."""
        return about(max(0.0, time.time() - self.updated)) if self.updated else ""

    @property
    def in_words(self) -> str:
        """As "stopped by SIGTERM", "failed by an error, OSError: …" or "ended without a word (…)"."""
        if self.phase in ("stopped", "failed"):
            return f"{self.phase} by {'an error, ' if self.phase == 'failed' else ''}{self.reason or '?'}"
        said = SPOKEN.get(self.phase, self.phase)
        return f"{said} ({self.reason})" if self.reason else said


def _alive(run: Path) -> tuple[str, str]:
    """Phase and reason of a run that has not said that it ended."""
    from dinoreg.checkpoint.async_writer import owner_of  # which needs torch, as the runs that have ended do not

    owner = owner_of(run)
    if owner is None:
        return "unseen", ""
    if owner.host != socket.gethostname():
        return "unseen", str(owner)
    if Path("/proc").is_dir() and not is_alive(owner.pid, owner.started):
        return "lost", f"process {owner.pid} is gone; killed, or out of memory?"
    return "running", str(owner)
