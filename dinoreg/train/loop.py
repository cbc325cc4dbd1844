"""The training loop of a run, from its config to a finished run folder.

`train` is the loop itself, in the open: batch, schedules, step, health, metrics, probe, checkpoint. What a step
computes stands in `step.py`, what is refused before it starts in `setup.py`.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg import checkpoint
from dinoreg.config import Config
from dinoreg.data.batches import Batch, BatchLoader
from dinoreg.environment import environment
from dinoreg.errors import Interrupted, RunError
from dinoreg.runtime import peak_memory
from dinoreg.train.health import Diagnosis, Health, WeightWatch
from dinoreg.train.log import RunLog
from dinoreg.train.schedules import Now
from dinoreg.train.setup import Setup, claim_folder, prepare
from dinoreg.train.state import TrainState
from dinoreg.train.step import StepResult, train_step

logger = logging.getLogger(__name__)

# An fp16 loss scale may halve this often before a non-finite step means anything.
FP16_GRACE = 16


def pretrain(config: Config) -> Path:
    """Pretrain as `config` says; returns the run folder.

    raises UserError before anything is written when the config, the data or the weights cannot be used; RunError
    when the run fails; Interrupted when a signal ended it, after its state was saved
    """
    setup = prepare(config)
    claim_folder(setup)
    state = setup.new_state()
    resumed = restore(setup, state) if config.resume else []
    with RunLog(setup.out, step=state.step, num_steps=setup.num_steps, tensorboard=config.log.tensorboard) as log:
        announce(setup, state, resumed, log)
        with Signals() as signals:
            train(setup, state, log, signals)
        log.say(f"finished: {state.step} steps, {state.step * setup.global_batch_size} images -> {setup.out}")
    return setup.out


def train(setup: Setup, state: TrainState, log: RunLog, signals: Signals) -> None:
    """Train to the end of the run, or until a signal asks to stop (Interrupted, after saving)."""
    config = setup.config
    health = Health(config.head.prototypes, grace=max(100, setup.num_steps // 5))
    weights = WeightWatch(state.student, state.teacher)
    probe_every = config.probe.every if config.probe.every is not None else max(1, setup.num_steps // 10)
    save_every = config.checkpoint.every or min(2000, max(1, setup.num_steps // 10))
    clock = Clock()
    if config.model.compile:
        state.student.backbone.compile()
        state.teacher.backbone.compile()

    batches = setup.batches(state)
    try:
        while state.step < setup.num_steps:
            batch = next(batches)
            now = setup.schedules.at(state.step)
            logs_now = every(config.log.every, state.step + 1) or state.step + 1 == setup.num_steps
            if logs_now:
                weights.before()
            result = train_step(
                state,
                batch,
                now,
                loss=config.loss,
                dtype=setup.dtype,
                clip_grad=config.optim.clip_grad,
                accumulate=config.optim.accumulate,
                seed=config.seed,
            )
            health.observe(result)
            clock.add(batch, result)

            if logs_now:  # the one place that waits for the device
                metrics = step_metrics(setup, state, batch, result, now)
                metrics |= weights.after() | health.summarise() | clock.read(setup.global_batch_size)
                metrics |= record_rejected(setup, log, clock, state)
                log.metrics(metrics)
                report_diagnoses(log, state.step, health.diagnose(metrics))
                if give_up(setup, state):
                    batches.close()
                    roll_back(setup, state, log)
                    batches = setup.batches(state)
                    continue
            last = state.step == setup.num_steps
            improved = False
            if setup.probe is not None and probe_every > 0 and (every(probe_every, state.step) or last):
                improved = run_probe(setup, state, log, clock)
            good = every(save_every, state.step) and float(state.rejected) == 0  # a state to come back to
            if good or improved or last or signals.received:
                save(setup, state, log, batches, best=improved)
            if signals.received and not last:
                raise Interrupted(
                    f"stopped by {signals.name} after step {state.step} of {setup.num_steps}; "
                    f"go on with the same command and resume=true (state saved in {setup.out})",
                    signals.received,
                )
    finally:
        batches.close()
        with suppress(OSError):  # a full disk has been reported by then
            write_skipped(setup, batches.bad)


def every(period: int, step: int) -> bool:
    return step % period == 0


# --------------------------------------------------------------------------------------------------------------
# Metrics


def step_metrics(setup: Setup, state: TrainState, batch: Batch, result: StepResult, now: Now) -> dict[str, float | int]:
    """The values of this very step, under dinov2's names; losses as they are optimised."""
    losses = {
        "total_loss": "total",
        "dino_global_crops_loss": "dino_global",
        "dino_local_crops_loss": "dino_local",
        "ibot_loss": "ibot",
        "koleo_loss": "koleo",
    }
    return {
        "step": state.step,
        "images": state.step * setup.global_batch_size,
        **{name: float(result.losses[key]) for name, key in losses.items() if key in result.losses},
        "lr": now.lr,
        "wd": now.weight_decay,
        "mom": now.momentum,
        "teacher_temp": now.teacher_temp,
        "last_layer_lr": now.last_layer_lr,
        **{name: float(norm) for name, norm in result.norms.items()},
        "current_batch_size": setup.config.batch_size,
        "global_batch_size": setup.global_batch_size,
        "pixel_std": float(batch.global_crops.std(dim=(0, 2, 3)).max()),
        "max_memory": peak_memory(setup.device),
        **({"loss_scale": float(state.loss_scale)} if setup.dtype == torch.float16 else {}),
    }


class Clock:
    """Step and data times since the last line of metrics, and which steps were accepted."""

    def __init__(self) -> None:
        self.probing = 0.0  # seconds spent in probes since the run began
        self.started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps = 0
        self._data = 0.0
        self._paused = 0.0
        self.steps: list[tuple[np.ndarray, Tensor]] = []

    def add(self, batch: Batch, result: StepResult) -> None:
        self._steps += 1
        self._data += batch.data_time
        self.steps.append((batch.sample_ids, result.accepted))

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training: probes, checkpoints."""
        self._paused += seconds

    def read(self, global_batch_size: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self._since - self._paused
        step_time = elapsed / max(1, self._steps)
        result = {
            "step_time": step_time,
            "data_time": self._data / max(1, self._steps),
            "images_per_second": global_batch_size / step_time,
        }
        return result

    def finish_window(self) -> list[tuple[np.ndarray, Tensor]]:
        """Sample ids and acceptance of the steps since the last line; starts the next window."""
        steps = self.steps
        self._reset()
        return steps


def record_rejected(setup: Setup, log: RunLog, clock: Clock, state: TrainState) -> dict[str, int]:
    """Name the samples of steps that were left out because they were not finite."""
    steps = clock.finish_window()
    accepted = torch.stack([flag for _, flag in steps]).tolist()
    first = state.step - len(steps) + 1
    rejected = 0
    for offset, ((sample_ids, _), fine) in enumerate(zip(steps, accepted)):
        if not fine:
            rejected += 1
            ids = [int(i) for i in sample_ids]
            names = [setup.source.name(i) for i in ids]
            log.append("health/nonfinite.jsonl", {"step": first + offset, "sample_ids": ids, "names": names})
    overflow_is_normal = setup.dtype == torch.float16 and float(state.loss_scale) > 1.0
    return {"nonfinite_steps": 0 if overflow_is_normal else rejected}


def report_diagnoses(log: RunLog, step: int, diagnoses: list[Diagnosis]) -> None:
    for found in diagnoses:
        log.say(f"health: {found.name} at step {step}: {found.message}. {found.remedy}", logging.WARNING)
        log.append(
            "health/events.jsonl",
            {"step": step, "name": found.name, "message": found.message, "remedy": found.remedy},
        )


def run_probe(setup: Setup, state: TrainState, log: RunLog, clock: Clock) -> bool:
    """Probe the teacher; returns whether it is the best so far. Left out when it would take too much of the time."""
    assert setup.probe is not None
    elapsed = time.perf_counter() - clock.started
    last = state.step == setup.num_steps
    if not last and clock.probing > setup.config.probe.max_share * elapsed:
        return False
    values = setup.probe.measure(state.teacher.backbone, setup.device, setup.dtype)
    clock.probing += values["probe_time"]
    clock.pause(values["probe_time"])
    log.append("probe.jsonl", {"step": state.step, **values})
    metric = setup.config.probe.metric if setup.config.probe.metric in values else "rankme"
    best = state.history.get("best")
    shown = "  ".join(f"{key}: {value:.4g}" for key, value in values.items() if key != "probe_time")
    log.say(f"probe at step {state.step}: {shown}")
    if best is not None and best["metric"] == metric and best["value"] >= values[metric]:
        return False
    state.history["best"] = {"metric": metric, "value": values[metric], "step": state.step}
    return True


# --------------------------------------------------------------------------------------------------------------
# Saving, resuming, rolling back


def save(setup: Setup, state: TrainState, log: RunLog, batches: BatchLoader, best: bool) -> None:
    """Training state, teacher file and the list of unreadable images; then `last` (and `best`) point to them."""
    log.flush()
    folder = setup.out / "checkpoints"
    keep = setup.config.checkpoint.keep
    write_skipped(setup, batches.bad)
    write_teacher(setup, state)
    state.history |= {"source": setup.source.fingerprint(), "bad": dict(batches.bad)}
    checkpoint.save(folder, state.step, state.tensors(), state.numbers(), keep)
    if best:
        checkpoint.write_pointer(folder, "best", state.step)
    checkpoint.retire_teachers(setup.out, keep)
    status(setup, state, "finished" if state.step == setup.num_steps else "running")


def write_teacher(setup: Setup, state: TrainState) -> Path:
    config = setup.config
    description = {
        "architecture": state.teacher.backbone.architecture(),
        "preprocessing": {
            "mean": list(config.augment.mean),
            "std": list(config.augment.std),
            "image_size": config.crops.global_size,
        },
        "config_hash": config.hash(),
    }
    return checkpoint.write_teacher(setup.out, state.step, state.teacher.state_dict(), description)


def write_skipped(setup: Setup, bad: Mapping[str, str]) -> None:
    lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in bad.items())
    if bad:
        checkpoint.write_atomic(setup.out / "skipped.jsonl", lines)


def status(setup: Setup, state: TrainState, phase: str) -> None:
    """`status.json`: where the run is, for `doctor` and `report`."""
    content = {"phase": phase, "step": state.step, "num_steps": setup.num_steps, "time": time.time()}
    checkpoint.write_atomic(setup.out / "status.json", json.dumps(content) + "\n")


def restore(setup: Setup, state: TrainState) -> list[str]:
    """Load the newest whole checkpoint of the run into `state`; returns what was done, [] when there was none."""
    folder = setup.out / "checkpoints"
    checkpoint.remove_unfinished(folder)
    path, messages = checkpoint.newest(folder)
    if path is None:
        return messages
    tensors = state.tensors()
    numbers = checkpoint.load(path, tensors)
    state.load(tensors, numbers)
    messages.append(f"resumed from {path}")
    if state.history.get("source") not in (None, setup.source.fingerprint()):
        messages.append("the data are not those the run was started with")
    return messages


def give_up(setup: Setup, state: TrainState) -> bool:
    """Whether too many steps in a row were not finite."""
    patience = setup.config.health.max_nonfinite
    if setup.dtype == torch.float16:
        patience += FP16_GRACE
    return float(state.rejected) >= patience


def roll_back(setup: Setup, state: TrainState, log: RunLog) -> None:
    """Return to the last good state, past the samples that led here; RunError once that has been tried enough."""
    step, position, rollbacks = state.step, state.position, state.rollbacks
    if rollbacks >= setup.config.health.max_rollbacks:
        raise RunError(
            f"{int(state.rejected)} steps in a row up to step {step} were not finite, after {rollbacks} roll-back(s). "
            f"Lower the learning rate or use precision=fp32; the samples are listed in "
            f"{setup.out / 'health' / 'nonfinite.jsonl'}, the log is {setup.out / 'train.log'}"
        )
    restore(setup, state)
    if state.step == step:  # no checkpoint yet
        fresh = setup.new_state()
        state.load(fresh.tensors(), fresh.numbers())
    state.position = position
    state.rollbacks = rollbacks + 1
    state.rejected.zero_()
    log.say(f"health: rolled back from step {step} to step {state.step}", logging.WARNING)
    event = {"name": "rolled-back", "message": f"from step {step} to {state.step}", "remedy": ""}
    log.append("health/events.jsonl", {"step": state.step, **event})


# --------------------------------------------------------------------------------------------------------------
# Start and stop


def announce(setup: Setup, state: TrainState, resumed: list[str], log: RunLog) -> None:
    """Say what is about to happen, and keep the environment beside the run."""
    config = setup.config
    path = setup.out / "environment.json"
    checkpoint.write_atomic(path, json.dumps(environment(), indent=1) + "\n")
    parameters = sum(p.numel() for p in state.student.backbone.parameters())
    log.say(
        f"{config.model.name}: {parameters / 1e6:.2f} M parameters, {setup.device} {str(setup.dtype)[6:]}, "
        f"{len(setup.source)} images, {setup.num_steps} steps of {setup.global_batch_size}"
    )
    for note in setup.notes:
        log.say(note)
    for message in resumed:
        log.say(message)
    if config.resume and state.step == 0:
        log.say(f"nothing to resume in {setup.out}: starting at step 0")
    logger.info("config:\n%s", (setup.out / "config.yaml").read_text())
    status(setup, state, "running")


class Signals:
    """Remembers SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 so that the loop can save at the end of the step.

    A second SIGINT interrupts at once.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in self.NAMES:
                number = getattr(signal, name, None)
                if number is not None:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
