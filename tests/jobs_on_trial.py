"""What the tests of jobs share: a tiny training as one types it, and waiting for what jobs do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from training import tiny_config

from dinoreg.config.load import to_yaml
from dinoreg.jobs.records import read_records
from dinoreg.jobs.status import JobStatus, examine

SECONDS = 300.0  # that anything may take on two busy cores


def tiny_file(name: str, **changed: Any) -> str:
    """A YAML file of the working folder that is a tiny training, `changed` by dotted key with `__` for the dot."""
    path = Path(f"{name}.yaml")
    path.write_text(to_yaml(tiny_config(threads=1, **changed)))
    return str(path)


def labelled_folder(path: Path, classes: int = 3, images: int = 6) -> Path:
    """A folder with a subfolder of uniformly coloured pictures for each class."""
    rng = np.random.default_rng(len(path.name))
    for label in range(classes):
        (path / f"class{label}").mkdir(parents=True)
        for number in range(images):
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[..., label] = 150 + rng.integers(0, 80, (32, 32))
            Image.fromarray(pixels).save(path / f"class{label}" / f"{number}.png")
    return path


EVALUATION = ["protocols=[knn]", "knn.k=[3]", "baselines=false", "device=cpu", "examples=0", "workers=0"]


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """What `condition` gives once it is true; fails when that takes too long."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def statuses(folder: Path | str, group: str | None = None) -> list[JobStatus]:
    records = [record for record in read_records(folder) if group in (None, record.group)]
    return examine(folder, records)


def ended(folder: Path | str, seconds: float = SECONDS) -> list[JobStatus]:
    """The jobs of a folder when all of them are over."""

    def over() -> list[JobStatus]:
        jobs = statuses(folder)
        return jobs if all(job.is_over for job in jobs) else []

    try:
        return until(over, f"{folder} over", seconds)
    except AssertionError as error:
        logs = [path.read_text(errors="replace")[-1500:] for path in (Path(folder) / "launch").glob("*_log.*")]
        raise AssertionError("\n".join([str(error), *(job.line for job in statuses(folder)), *logs])) from None


def step_of(folder: Path | str) -> int:
    """The step that a training has logged last."""
    try:
        return int(json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def trains(folder: Path | str, step: int = 1) -> None:
    """Wait until a training has come to a step."""
    until(lambda: step_of(folder) >= step, f"{folder} at step {step}")


def events(folder: Path | str, kind: str) -> list[dict[str, Any]]:
    lines = [
        {**json.loads(line), "file": path.name}
        for path in (Path(folder) / "launch").glob("*_events.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted((line for line in lines if line["event"] == kind), key=lambda line: line["time"])
