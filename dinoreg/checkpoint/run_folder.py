"""The one reader of a run folder: every file may be missing, cut short or of another version.

`read_run` loads all that reports and model cards show; `run_of` and `newest_teacher` find a run and its weights.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinoreg.runtime.json_files import is_number, number, read_json, read_json_lines, read_text

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Probe:
    """One record of `eval/<step>/<dataset>.json`."""

    step: int
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    baselines: dict[str, tuple[float, float, float]]  # name -> value, low, high
    details: dict[str, Any]  # the whole record

    @property
    def unit(self) -> str:
        """Of the values: "share" (in [0, 1]), or what stands behind the number."""
        return str(self.details.get("unit", "share"))


@dataclass
class Run:
    """A run folder in memory; empty fields stand for missing files."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # by step
    probe: list[dict[str, Any]] = field(default_factory=list)  # in-run probe, by step
    events: list[dict[str, Any]] = field(default_factory=list)  # health diagnoses
    probes: list[Probe] = field(default_factory=list)  # by step
    skipped: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)  # name -> PNG of the newest step that has it
    parameters: int | None = None

    @property
    def name(self) -> str:
        """The folder's own."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def step(self) -> int:
        """The last step anything is known of."""
        known = [line["step"] for line in self.metrics[-1:] + self.probe[-1:]] + [self.status.get("step")]
        return max((int(number(step)) for step in known if is_number(step)), default=0)

    @property
    def num_steps(self) -> int | None:
        """Steps that the run is to make."""
        value = self.status.get("num_steps", self.config.get("steps"))
        return int(number(value)) if is_number(value) else None

    @property
    def images_seen(self) -> int | None:
        """Images of all processes up to the last line of metrics.jsonl."""
        value = self.metrics[-1].get("images") if self.metrics else None
        return int(number(value)) if is_number(value) else None

    @property
    def seconds(self) -> float | None:
        """Time spent in steps: each line's step time holds for the steps since the line before."""
        total, before = 0.0, 0
        for line in self.metrics:
            if not is_number(line.get("step_time")):
                return None
            total += line["step_time"] * (line["step"] - before)
            before = line["step"]
        return total if self.metrics else None

    def series(self, key: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The finite values of a key of metrics.jsonl or probe.jsonl, against the step (or the images)."""
        lines = [line for line in self.metrics + self.probe if key in line]
        pairs = [(number(line.get(x)), number(line[key])) for line in lines]
        finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        return [a for a, _ in finite], [b for _, b in finite]

    def last(self, key: str) -> float | None:
        """The last finite value of a key of metrics.jsonl or probe.jsonl."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def newest_probes(self) -> list[Probe]:
        """The last record of each dataset."""
        return list({probe.dataset: probe for probe in self.probes}.values())


def read_run(folder: str | Path) -> Run:
    """Everything a report shows of a run folder; unreadable pieces are left empty."""
    path = Path(folder)
    text = read_text(path / "config.yaml")
    run = Run(
        folder=path,
        config_text=text,
        config=_yaml(text),
        environment=read_json(path / "environment.json"),
        status=read_json(path / "status.json"),
        metrics=_by_step(read_json_lines(path / "metrics.jsonl")),
        probe=_by_step(read_json_lines(path / "probe.jsonl")),
        events=read_json_lines(path / "health" / "events.jsonl"),
        skipped=read_json_lines(path / "skipped.jsonl"),
        probes=_probes(path / "eval"),
        pictures=_pictures(path / "view"),
    )
    for extra in sorted((path / "health").glob("*.json")):
        content = read_json(extra)
        if "name" in content and "message" in content:
            run.events.append(content)
    teacher = newest_teacher(path)
    if teacher is not None:
        run.parameters = _parameters(teacher)
    return run


def line_at(lines: Sequence[Mapping[str, Any]], step: int | None) -> Mapping[str, Any]:
    """The last of some lines in order of the step that is not beyond a step (None: of all); {} if there is none."""
    return next((line for line in reversed(lines) if step is None or line["step"] <= step), {})


def newest_teacher(run: Path) -> Path | None:
    """The teacher file of the highest step of a run folder."""
    return max((run / "teacher").glob("step_*.safetensors"), default=None, key=lambda path: path.stem)


def teacher_step(path: Path) -> int | None:
    """The step in the name of a teacher file; None for other files."""
    match = _STEP.fullmatch(path.stem)
    return int(match[1]) if match else None


def run_of(weights: Path) -> Path | None:
    """The run folder that a weight file lies in, `RUN/teacher/FILE`; None for other files."""
    run = weights.parent.parent
    return run if weights.parent.name == "teacher" and (run / "config.yaml").is_file() else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 64}} -> {"model.dim": 64}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _yaml(text: str) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception:  # the parser's and OmegaConf's errors have no common base; a broken file shows as text
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _by_step(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """In order of the step; of several lines for one step, as after a resume, the last."""
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
    """The headline of an `eval/<step>/<dataset>.json` whose `value` is a number."""
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
    value = float(row["value"])
    low, high = (float(row[key]) if is_number(row.get(key)) else value for key in ("low", "high"))
    return value, low, high


def _pictures(folder: Path) -> dict[str, Path]:
    steps = sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    return {path.stem: path for step in steps for path in sorted(step.glob("*.png"))}


def _parameters(path: Path) -> int | None:
    """Parameters of the backbone, from the head of a teacher file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = [key for key in file.keys() if key.startswith("backbone.")]  # noqa: SIM118 - not a dict
            shapes = [file.get_slice(name).get_shape() for name in names]
    except (OSError, SafetensorError):
        return None
    return sum(math.prod(shape) for shape in shapes) or None
