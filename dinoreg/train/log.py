"""What a run leaves to read: the console, train.log, metrics.jsonl, TensorBoard, and the lists under health/.

One process writes, rank 0; the others have a log that keeps silent.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dinoreg.checkpoint import write_atomic

logger = logging.getLogger("dinoreg")

# Shown on the console line, under dinov2's names.
_CONSOLE = (
    ("total_loss", "{:.4f}"),
    ("dino_global_crops_loss", "{:.4f}"),
    ("dino_local_crops_loss", "{:.4f}"),
    ("ibot_loss", "{:.4f}"),
    ("koleo_loss", "{:.4f}"),
    ("lr", "{:.2e}"),
    ("images_per_second", "{:.1f}"),
)


class RunLog:
    """The files and the console of one run; a context manager.

    On resume, lines that the unbroken run will write again (of later steps) are removed first.
    """

    def __init__(self, out: Path, *, step: int, num_steps: int, tensorboard: bool) -> None:
        self.out = out
        self.num_steps = num_steps
        self._fortieth = -1
        (out / "health").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "probe.jsonl", "health/events.jsonl", "health/nonfinite.jsonl"):
            _keep_until(out / name, step if step > 0 else -1)  # a run that starts anew writes step 0 again
        self._metrics = open(out / "metrics.jsonl", "a")  # noqa: SIM115 - closed by __exit__
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out), purge_step=step + 1)
        self._handler = logging.FileHandler(out / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
        self._level = logger.level
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]pretrain"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=self.console,
            )
            self._task = self._progress.add_task("pretrain", total=num_steps, completed=step, losses="")

    def __enter__(self) -> RunLog:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        self._metrics.close()
        if self._writer:
            self._writer.close()
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        self._handler.close()

    def say(self, message: str, level: int = logging.INFO) -> None:
        """One line for people: on the console and in train.log."""
        logger.log(level, "%s", message)
        style = {logging.WARNING: "yellow", logging.ERROR: "bold red"}.get(level)
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, TensorBoard scalars, and the console line."""
        self._metrics.write(json.dumps({key: _plain(value) for key, value in values.items()}) + "\n")
        self._metrics.flush()
        if self._writer:
            for key, value in values.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._writer.add_scalar(f"train/{key}", value, values["step"])
        line = "  ".join(f"{key}: {form.format(values[key])}" for key, form in _CONSOLE if key in values)
        logger.info("step %d/%d  %s", values["step"], self.num_steps, line)
        if self._progress:
            short = f"loss {values['total_loss']:.3f}  {values['images_per_second']:.0f} img/s"
            self._progress.update(self._task, completed=values["step"], losses=short)
        elif self._due(values["step"]):
            left = (self.num_steps - values["step"]) * values["step_time"]
            self.console.print(
                f"step {values['step']}/{self.num_steps}  {line}  left: {_clock(left)}",
                highlight=False,
                soft_wrap=True,
            )

    def _due(self, step: int) -> bool:
        """Without a terminal, about forty lines a run."""
        fortieth = step * 40 // self.num_steps
        due, self._fortieth = fortieth != self._fortieth, fortieth
        return due

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """One JSON line at the end of a file of the run folder."""
        with open(self.out / name, "a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in line.items()}) + "\n")
        if self._writer and name == "probe.jsonl":
            for key, value in line.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"probe/{key}", value, line["step"])

    def flush(self) -> None:
        """Have everything on the disk: called before a checkpoint that vouches for it."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())


class SilentLog(RunLog):
    """The log of a process that is not rank 0: it takes everything and writes nothing."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, message: str, level: int = logging.INFO) -> None:
        pass

    def metrics(self, values: Mapping[str, Any]) -> None:
        pass

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
