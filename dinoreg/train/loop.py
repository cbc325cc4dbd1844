"""The training loop of a run, from its config to a finished run folder.

`train` is the loop itself, in the open: batch, schedules, step, health, metrics, probe, checkpoint. What a step
computes stands in `step.py`, what is refused before it starts in `setup.py`, what is written down in `record.py` and
`saving.py`.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.async_writer import Writer
from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.config.load import Config
from dinoreg.distributed import process_group as distributed
from dinoreg.models.attention import describe_backend
from dinoreg.runtime.environment import environment
from dinoreg.runtime.errors import Interrupted
from dinoreg.train.health import Health, WeightWatch
from dinoreg.train.logger import RunLog, SilentLog
from dinoreg.train.metrics import Clock, record_rejected, report_diagnoses, run_probe, step_metrics
from dinoreg.train.parallelize import check_replicas, compile_backbones
from dinoreg.train.prepare import Setup, check_shared, claim_folder, prepare
from dinoreg.train.resume import (
    open_writer,
    report_checkpoints,
    restore,
    roll_back,
    save,
    status,
    too_many_nonfinite,
    write_skipped,
)
from dinoreg.train.state import TrainState
from dinoreg.train.step import train_step

logger = logging.getLogger(__name__)


def pretrain(config: Config, on_checkpoint: Callable[[int, Path], None] | None = None) -> Path:
    """Pretrain as `config` says; returns the run folder. Every process of a run calls this, with the same config.

    on_checkpoint  called on rank 0 with (step, teacher file) after a checkpoint has been published, between two steps
    raises UserError before anything is written when the config, the data or the weights cannot be used; RunError
    when the run fails; Interrupted when a signal ended it, after its state was saved
    """
    with distributed.session(config.device, config.parallel.timeout):
        with distributed.collective_errors():
            setup = prepare(config)
        check_shared(setup)
        with distributed.collective_errors():
            if distributed.is_main():
                claim_folder(setup)
        state = setup.new_state()
        writer = open_writer(setup)
        resumed = restore(setup, state) if config.resume else []
        with open_log(setup, state) as log:
            if distributed.is_main():
                log_run_header(setup, state, resumed, log)
            try:
                with Signals() as signals:
                    train(setup, state, log, signals, writer, on_checkpoint)
            except Exception as error:
                diagnosis = distributed.diagnose_failure(error, state.step, config.parallel.timeout)
                if diagnosis is None:
                    raise
                log.say(str(diagnosis), logging.ERROR)
                raise diagnosis from error
            log.say(f"finished: {state.step} steps, {state.step * setup.global_batch_size} images -> {setup.out}")
    return setup.out


def open_log(setup: Setup, state: TrainState) -> RunLog:
    if not distributed.is_main():
        return SilentLog(setup.out)
    return RunLog(setup.out, step=state.step, num_steps=setup.num_steps, tensorboard=setup.config.log.tensorboard)


def train(
    setup: Setup,
    state: TrainState,
    log: RunLog,
    signals: Signals,
    writer: Writer,
    on_checkpoint: Callable[[int, Path], None] | None = None,
) -> None:
    """Train to the end of the run, or until a signal asks to stop (Interrupted, after saving)."""
    config = setup.config
    health = Health(config.head.prototypes, grace=max(100, setup.num_steps // 5))
    weights = WeightWatch(state.student, state.teacher)
    probe_every = config.probe.every if config.probe.every is not None else max(1, setup.num_steps // 10)
    save_every = config.checkpoint.every or min(2000, max(1, setup.num_steps // 10))
    clock = Clock()
    agreement = distributed.Agreement()
    if config.model.compile:
        compile_backbones(state.student, state.teacher)

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
                metrics["checkpoint_stall"] = writer.read_stall()
                log.metrics(metrics)
                notify_checkpoints(report_checkpoints(setup, log, writer), setup, on_checkpoint)
                report_diagnoses(log, state.step, health.diagnose(metrics))
                if too_many_nonfinite(setup, state):
                    batches.close()
                    roll_back(setup, state, log, writer, batches.bad)
                    batches = setup.batches(state)
                    continue
            last = state.step == setup.num_steps
            stop = agreement.maximum(signals.received)  # the signal that some process got
            if config.parallel.check_every and every(config.parallel.check_every, state.step):
                check_replicas(state.step, state.position, state.replicated())
            improved = False
            if setup.probe is not None and probe_every > 0 and (every(probe_every, state.step) or last):
                improved = run_probe(setup, state, log, clock, health)
            good = every(save_every, state.step) and float(state.rejected) == 0  # a state to come back to
            if good or improved or last or stop:
                published = save(setup, state, log, batches, writer, best=improved, wait=last or stop > 0)
                notify_checkpoints(published, setup, on_checkpoint)
            if stop and not last:
                interrupted = Interrupted(
                    f"stopped by {signal.Signals(stop).name} after step {state.step} of {setup.num_steps}; "
                    f"go on with the same command and resume=true (state saved in {setup.out})",
                    stop,
                )
                interrupted.reported = not distributed.is_main()
                raise interrupted
            del batch, result  # the targets are as large as the logits: the next step needs the room
    finally:
        batches.close()
        writer.close()
        with suppress(OSError):  # a full disk has been reported by then
            report_checkpoints(setup, log, writer)
            if distributed.is_main():
                write_skipped(setup, batches.bad)


def notify_checkpoints(steps: list[int], setup: Setup, on_checkpoint: Callable[[int, Path], None] | None) -> None:
    """Name the teacher files of new checkpoints to whoever wants to know."""
    if on_checkpoint is not None and distributed.is_main():
        for step in steps:
            on_checkpoint(step, setup.out / "teacher" / f"{checkpoint.step_name(step)}.safetensors")


def every(period: int, step: int) -> bool:
    return step % period == 0


def log_run_header(setup: Setup, state: TrainState, resumed: list[str], log: RunLog) -> None:
    """Say what is about to happen, and keep the environment beside the run."""
    config = setup.config
    path = setup.out / "environment.json"
    found = environment()
    if state.step > 0:
        setup.notes.extend(changed_code(path, found))
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    backbone = state.student.backbone
    parameters = sum(p.numel() for p in backbone.parameters())
    num_tokens = 1 + backbone.num_registers + math.prod(backbone.grid)
    attention = describe_backend(config.model.attention, setup.device, num_tokens, setup.dtype)
    log.say(
        f"{config.model.name}: {parameters / 1e6:.2f} M parameters, {setup.device} {str(setup.dtype)[6:]}, "
        f"attention {attention}, {len(setup.source)} images, {setup.num_steps} steps of {setup.global_batch_size}"
    )
    for note in setup.notes:
        log.say(note)
    for message in resumed:
        log.say(message)
    if config.resume and state.step == 0:
        log.say(f"nothing to resume in {setup.out}: starting at step 0")
    logger.info("config:\n%s", (setup.out / "config.yaml").read_text())
    status(setup, state, "running")


def changed_code(path: Path, now: dict[str, Any]) -> list[str]:
    """One line when a run is resumed with other code or another PyTorch than its environment.json tells of."""
    try:
        before = json.loads(path.read_text())
        pairs = [(name, before.get(name), now[name]) for name in ("dinoreg", "commit")]
        pairs.append(("torch", before["packages"].get("torch"), now["packages"]["torch"]))
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    changed = [f"{name} {then} -> {new}" for name, then, new in pairs if then != new]
    text = f"resumed with other code than before ({', '.join(changed)}): losses may differ from an unbroken run's"
    return [text] if changed else []


class Signals:
    """Remembers SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 so that the loop can save at the end of the step.

    A second SIGINT interrupts at once.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

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
