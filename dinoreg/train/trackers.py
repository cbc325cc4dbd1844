"""Where a run's numbers go besides its folder: TensorBoard, Weights & Biases, MLflow; a class each, over its library.

Addresses, keys and offline modes are those libraries' own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI …).
`add` adds numbers named `kind/key`; `close` writes what is pending and ends, `ok` where the run ended without an error.
Both may raise what the library raises.
"""

import importlib.util
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError, one_line
from dinoreg.runtime.json_files import read_json

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
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = mlflow.set_experiment(name).experiment_id
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
        if importlib.util.find_spec(name) is None:
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
