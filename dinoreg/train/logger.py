"""The logs of a run: the console, train.log, metrics.jsonl, probe.jsonl, trackers, and the lists under health/.

One process writes, rank 0; the others have a silent log. The trackers, TensorBoard, Weights & Biases and MLflow, are a
class each, over its library. Addresses, keys and offline modes are those libraries' own environment variables
(WANDB_MODE, MLFLOW_TRACKING_URI …). `add` adds numbers named `kind/key`; `close` writes what is pending and ends, `ok`
where the run ended without an error. Both may raise what the library raises.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.durations import clock
from dinoreg.runtime.errors import UserError, one_line
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.printable import printable
from dinoreg.runtime.regular_files import open_to_append

IDENTITIES = "trackers.json"  # in the run folder: {tracker: its name of this run}, for a resume
PROJECT = "dinoreg"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says another


class TensorBoard:
    """Scalars in event files of the run folder."""

    name = "TensorBoard"

    def __init__(self, out: Path, first_step: int) -> None:
        """Events of `first_step` and later steps, from before a resume, are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(out), purge_step=first_step)
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_failed

    def add(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """OSError once the thread that writes has met with one and has ended."""
        for key, value in values.items():
            self.writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self, ok: bool) -> None:
        """Restores the thread exception hook, too."""
        threading.excepthook = self._excepthook
        with suppress(OSError):  # which has been reported
            self.writer.close()

    def _thread_failed(self, failure: Any) -> None:
        """Suppress the traceback of TensorBoard's thread: the next call raises the same error, reported in one line."""
        from_tensorboard = type(failure.thread).__module__.startswith("tensorboard")
        if not (from_tensorboard and isinstance(failure.exc_value, OSError)):
            self._excepthook(failure)


class WandB:
    """A run of Weights & Biases; a resumed one goes on in it."""

    name = "W&B"

    def __init__(self, out: Path, identity: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        self.identity = identity or secrets.token_hex(6)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.resolve().name,
            id=self.identity,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off"),  # train.log has the console's lines
        )
        self.run.define_metric("*", step_metric="step")  # of its own: after a resume some steps come again

    def add(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Does not wait for the network."""
        self.run.log({f"{kind}/{key}": value for key, value in values.items()} | {"step": step})

    def close(self, ok: bool) -> None:
        """Waits for what is pending."""
        self.run.finish(exit_code=0 if ok else 1)


class MLflow:
    """A run of MLflow; a resumed one goes on in it."""

    name = "MLflow"

    def __init__(self, out: Path, identity: str | None, config: Mapping[str, Any]) -> None:
        import mlflow

        self.client: Any = mlflow.MlflowClient()
        self._last: Any = None
        if identity is None:
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
            identity = str(self.client.create_run(experiment, run_name=out.resolve().name).info.run_id)
            params = [mlflow.entities.Param(key, str(value)[:500]) for key, value in config.items()]
            self.client.log_batch(identity, params=params)
        else:
            self.client.update_run(identity, status="RUNNING")
        self.identity = identity

    def add(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Does not wait for the network."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(f"{kind}/{key}", float(value), now, step) for key, value in values.items()]
        self._last = self.client.log_batch(self.identity, metrics=metrics, synchronous=False)

    def close(self, ok: bool) -> None:
        """Waits for what is pending."""
        try:
            if self._last is not None:
                self._last.wait()
        finally:
            self.client.set_terminated(self.identity, "FINISHED" if ok else "FAILED")


Remote = WandB | MLflow
Tracker = TensorBoard | Remote
REMOTE: dict[str, type[Remote]] = {"wandb": WandB, "mlflow": MLflow}  # by what is imported, as log.to= names them


def check_trackers(names: Sequence[str]) -> None:
    """UserError for a package in `log.to` that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"log.to={name}: the package is not installed: {install(name)}")


def begin_trackers(out: Path, resumes: bool, names: Sequence[str], config: Any) -> dict[str, Remote]:
    """The trackers of a run but for TensorBoard, begun, by name; nothing is written to `out`.

    resumes  whether the run in `out` goes on
    names    of REMOTE
    config   flat, {key: value}
    raises   UserError for one that cannot be begun, as without a key for its server
    """
    known, begun = read_json(out / IDENTITIES) if resumes else {}, {}
    for name in names:
        try:
            begun[name] = REMOTE[name](out, known.get(name), config)
        except Exception as error:  # each library has errors of its own
            raise UserError(f"log.to={name}: it cannot be begun: {one_line(error)}") from error
    return begun


def open_trackers(out: Path, step: int, begun: Mapping[str, Remote], tensorboard: bool) -> list[Tracker]:
    """All trackers of a run, whose folder now remembers those that `begin_trackers` has begun.

    step  that the run starts or resumes at
    """
    if begun:
        write_atomic(out / IDENTITIES, json.dumps({name: tracker.identity for name, tracker in begun.items()}) + "\n")
    return [*([TensorBoard(out, step + 1)] if tensorboard else []), *begun.values()]


# ------------------------------------------------------------------------------------------------------------
# The log


logger = logging.getLogger("dinoreg")

# Shown on the console line: what is optimised, and its terms.
_CONSOLE = {
    "loss": "loss {:.3f}",
    "dino_global_crops_loss": "dino {:.3f}",
    "dino_local_crops_loss": "local {:.3f}",
    "ibot_loss": "ibot {:.3f}",
    "koleo_loss": "koleo {:.3f}",
    "lr": "lr {:.2e}",
    "images_per_second": "{:.1f} img/s",
}
_APART = 15.0, 600.0  # seconds between lines where there is no bar: a hundredth of the running time, within these

# Files of JSON lines, each with its step.
LINES = ("metrics.jsonl", "probe.jsonl", "health/events.jsonl", "health/nonfinite.jsonl")


class SilentLog:
    """The log of a process that is not rank 0: it accepts everything and writes nothing."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Log a message; `level` is one of the logging module."""

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Log the metrics of a step, by name; "step" is among them."""

    def progress(self, step: int) -> None:
        """Show on a terminal that `step` has been taken."""

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a JSON line to the file `name`, one of `LINES`; it has the key "step"."""

    def flush(self) -> None:
        """Flush all lines to the disk, before a checkpoint that relies on them; OSError when that fails."""


class RunLog(SilentLog):
    """The files and the console of one run; a context manager.

    out        the run folder
    step       that the run starts or resumes at: lines of later steps, which it will write again, are removed first
    num_steps  of the run, to its end
    trackers   that get the numbers, too; one that fails is reported once and left

    The console has a bar on a terminal and in Jupyter (with ipywidgets), else a line from time to time. A file that
    cannot be written, for example on a full disk, is reported once and does not end the run; a failed checkpoint may.
    """

    def __init__(self, out: Path, *, step: int, num_steps: int, trackers: Sequence[Tracker] = ()) -> None:
        self.out = out
        self.num_steps = num_steps
        (out / "health").mkdir(parents=True, exist_ok=True)
        for name in LINES:
            _truncate(out / name, step if step > 0 else -1)  # a run that starts from scratch writes step 0 again
        self._lines = {name: LineFile(out / name) for name in LINES}
        self._failing: set[str] = set()
        self.trackers = list(trackers)
        self._handler = _LogFile(out / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
        self._level = logger.level
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        self.console = console = Console(stderr=True)
        self._began, self._next = time.monotonic(), 0.0
        self.bar: Progress | None = None
        if console.is_terminal or (console.is_jupyter and find_spec("ipywidgets")):
            self.bar = Progress(
                TextColumn("[bold]pretrain"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=console,
            )
            self.task = self.bar.add_task("pretrain", total=num_steps, completed=step, losses="")

    def __enter__(self) -> RunLog:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *ended: object) -> None:
        if self.bar:
            self.bar.stop()
        for name, lines in self._lines.items():
            lost = lines.close()
            if lost:
                self.say(f"{self.out / name}: its last lines could not be written: {lost}", logging.WARNING)
        for tracker in self.trackers:
            try:
                tracker.close(ended[0] is None)
            except Exception as error:  # each library has errors of its own
                self.say(f"{tracker.name}: its last numbers may be lost: {one_line(error)}", logging.WARNING)
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        with suppress(OSError):
            self._handler.close()

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Log a message to the console and train.log; `level` is one of the logging module."""
        message = printable(message, keep="\n")
        logger.log(level, "%s", message)
        style = {logging.WARNING: "yellow", logging.ERROR: "bold red"}.get(level)
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Write the metrics of a step, by name, to metrics.jsonl, trackers, train.log and the console."""
        self._add("metrics.jsonl", values)
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        self._add_scalars("train", numbers, values["step"])
        line = "  ".join(form.format(values[key]) for key, form in _CONSOLE.items() if key in values)
        waits = values.get("data_time", 0.0) / max(values["step_time"], 1e-9)
        line += f"  {waits:.0%} waiting for images" if waits > 0.1 else ""
        logger.info("step %d/%d  %s", values["step"], self.num_steps, line)
        self._show(values, line)

    def _show(self, values: Mapping[str, Any], line: str) -> None:
        """Show the metrics of a step on the console: in a bar, else now and then `line`. step_time is in seconds."""
        step = values["step"]
        if self.bar:
            losses = f"loss {values['loss']:.3f}  {values['images_per_second']:.0f} img/s"
            losses += "  waiting for images" * (values.get("data_time", 0.0) > 0.5 * values["step_time"])
            self.bar.update(self.task, completed=step, losses=losses)
            return
        now = time.monotonic()
        if now >= self._next or step == self.num_steps:
            self._next = now + min(max((now - self._began) / 100, _APART[0]), _APART[1])
            left = clock((self.num_steps - step) * values["step_time"])
            self.console.print(f"step {step}/{self.num_steps}  {line}  {left} left", highlight=False, soft_wrap=True)

    def progress(self, step: int) -> None:
        """Move the bar, if any, so that it knows the time left long before the first line of metrics."""
        if self.bar:
            self.bar.update(self.task, completed=step)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a JSON line to the file `name`, one of `LINES`; the numbers of probe.jsonl go to trackers, too."""
        self._add(name, line)
        if name == "probe.jsonl":
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            self._add_scalars("probe", numbers, line["step"])

    def flush(self) -> None:
        """Flush all lines to the disk; OSError when that fails."""
        for lines in self._lines.values():
            lines.flush()

    def _add(self, name: str, line: Mapping[str, Any]) -> None:
        error = self._lines[name].add(line)
        if error is None:
            self._failing.discard(name)
        elif name not in self._failing:
            self._failing.add(name)
            reason = f"cannot be written ({error.strerror}); its lines are kept until it can be"
            self.say(f"{self.out / name}: {reason}", logging.WARNING)

    def _add_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            try:
                tracker.add(kind, values, step)
            except Exception as error:  # each library has errors of its own
                self.trackers.remove(tracker)
                self.say(f"{tracker.name}: its numbers end at step {step}: {one_line(error)}", logging.WARNING)
                with suppress(Exception):
                    tracker.close(False)


class LineFile:
    """JSON lines appended to a file, unbuffered.

    Lines that cannot be written are held back and written before the next ones. The file stays open: when another start
    of the run has taken over and replaced the file, this process still writes to the old one, which nobody reads.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        self._buffer = b""

    def add(self, line: Mapping[str, Any]) -> OSError | None:
        """Write a line; returns the error when it could not be written yet, else None. NaN and ±inf become strings."""
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._buffer += json.dumps(plain).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            return error
        return None

    def flush(self) -> None:
        """Write all lines and flush the file to the disk; OSError when that fails."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> int:
        """Close the file; returns the number of lines that could not be written."""
        with suppress(OSError):
            self._write()
        self._file.close()
        return self._buffer.count(b"\n")

    def _write(self) -> None:
        while self._buffer:  # a disk that is about to be full takes a part
            self._buffer = self._buffer[self._file.write(self._buffer) :]


class _LogFile(logging.FileHandler):
    """train.log. A line that a full disk refuses is dropped silently, since it is on the console as well."""

    def _open(self) -> Any:
        return open_to_append(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _truncate(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a kill cut short. The file is replaced by another."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomic(path, "".join(f"{line}\n" for line in lines))
