"""The training loop of a run, from its config to a finished run folder.

`train` is the loop itself, in the open: batch, schedules, step, health, metrics, probe, checkpoint. What a step
computes stands in `step.py`, what is refused before it starts in `setup.py`, what is written down in `record.py` and
`saving.py`.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dinoreg import checkpoint
from dinoreg.config import Config
from dinoreg.environment import environment
from dinoreg.errors import Interrupted
from dinoreg.train.health import Health, WeightWatch
from dinoreg.train.log import RunLog
from dinoreg.train.record import Clock, record_rejected, report_diagnoses, run_probe, step_metrics
from dinoreg.train.saving import give_up, restore, roll_back, save, status, write_skipped
from dinoreg.train.setup import Setup, claim_folder, prepare
from dinoreg.train.state import TrainState
from dinoreg.train.step import train_step

logger = logging.getLogger(__name__)


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

    if state.step == 0 and setup.probe is not None and probe_every > 0 and (setup.start or setup.general):
        run_probe(setup, state, log, clock, health)  # what the run starts with, to compare with later

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
                    roll_back(setup, state, log, batches.bad)
                    batches = setup.batches(state)
                    continue
            last = state.step == setup.num_steps
            improved = False
            if setup.probe is not None and probe_every > 0 and (every(probe_every, state.step) or last):
                improved = run_probe(setup, state, log, clock, health)
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
