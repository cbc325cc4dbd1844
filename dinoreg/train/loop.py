"""The training loop of a run, from its config to a finished run folder.

`train` is the loop itself: batch, schedules, step, metrics, probe, checkpoint. What a step computes is in `step.py`,
the checks before the start are in `prepare.py`, what a run writes is in `metrics.py` and `resume.py`.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.steps import which_steps
from dinoreg.config.load import Config
from dinoreg.config.option import flat
from dinoreg.data.loader import Batch, BatchLoader
from dinoreg.distributed.process_group import session
from dinoreg.models.attention import describe_backend
from dinoreg.runtime.environment import environment
from dinoreg.runtime.errors import Interrupted, RunError
from dinoreg.runtime.guide import after_training, next_lines
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.regular_files import being_read
from dinoreg.train.logger import Remote, RunLog, SilentLog, open_trackers
from dinoreg.train.metrics import Monitor, ProbeRunner
from dinoreg.train.outlook import Pace, rounded
from dinoreg.train.parallelize import check_replicas, compile_blocks
from dinoreg.train.prepare import Setup, check_shared
from dinoreg.train.resume import Checkpoints, find_checkpoint, restore
from dinoreg.train.state import TrainState
from dinoreg.train.step import train_step

logger = logging.getLogger(__name__)

_NO_DATA = 1000  # in place of a signal's number: some process has no batch


def pretrain(config: Config, on_checkpoint: Callable[[int, Path], None] | None = None) -> Path:
    """Pretrain as `config` says; returns the run folder. Every process of a run calls this, with the same config.

    on_checkpoint  called on rank 0 with (step, teacher file) after a checkpoint has been published, between two steps
    raises UserError before anything is written when the config, the data or the weights cannot be used; RunError
    when the run fails; Interrupted when a signal ended it, after its state was saved
    """
    with session(config.device, config.parallel.timeout) as ranks:
        with ranks.collective_errors():
            setup = Setup(config, ranks)
        config, out = setup.config, setup.out
        check_shared(out, ranks)
        newest, messages = find_checkpoint(out, ranks) if config.resume else (None, [])
        with ranks.collective_errors():
            trackers = setup.claim(newest is not None) if ranks.is_main else {}
        state = setup.new_state()
        writer = setup.open_writer()
        if newest is not None:
            messages += restore(state, newest, setup.source)
            writer.saved = state.step
        if config.resume and state.step == 0:
            messages.append(f"nothing to resume in {out}: starting at step 0")
        with ranks.collective_errors():
            log = open_log(setup, state.step, trackers)
        with log:
            monitor = Monitor(setup, state, log)
            probes = None if setup.probe is None else ProbeRunner(setup, setup.probe, monitor)
            checkpoints = Checkpoints(setup, writer, log, on_checkpoint)
            if config.model.compile:
                compile_blocks(state.student, state.teacher)
            if ranks.is_main:
                log_run_header(setup, state, messages, log)
            checkpoints.write_status(state.step)
            try:
                with Signals() as signals:
                    if probes is not None and state.step == 0:
                        probes.run(state)  # to compare with later
                    train(monitor, state, probes, checkpoints, signals)
            except (Exception, KeyboardInterrupt) as error:
                checkpoints.write_end(state.step, error)
                if not isinstance(error, Exception):
                    raise
                diagnosis = ranks.diagnose_failure(error, state.step, config.parallel.timeout)
                if diagnosis is None:
                    raise
                log.say(str(diagnosis), logging.ERROR)
                raise diagnosis from error
            log.say(f"finished: {state.step} steps, {state.step * setup.global_batch_size} images -> {out}")
            log.say(which_steps(out))
            for line in next_lines("trained", after_training(out, flat(config))):
                log.say(line)
    return out


def open_log(setup: Setup, step: int, trackers: Mapping[str, Remote]) -> SilentLog:
    """The log of a run: files and console on rank 0, a silent one on the others.

    step      that the run starts or resumes at
    trackers  that `Setup.claim` has begun
    raises    UserError for a log that is a link
    """
    if not setup.ranks.is_main:
        return SilentLog()
    opened = open_trackers(setup.out, step, trackers, setup.config.log.tensorboard)
    return RunLog(setup.out, step=step, num_steps=setup.num_steps, trackers=opened)


def train(
    monitor: Monitor, state: TrainState, probes: ProbeRunner | None, checkpoints: Checkpoints, signals: Signals
) -> None:
    """Train to the end of the run.

    raises Interrupted after a signal, once saved; RunError for lost checkpoints, non-finite steps or drifted replicas
    """
    setup, config, num_steps = monitor.setup, monitor.setup.config, monitor.setup.num_steps
    save_every = config.checkpoint.period(setup.schedules.horizon)
    # An fp16 loss scale may halve 16 times before a non-finite step means anything.
    max_nonfinite = config.health.max_nonfinite + (16 if monitor.fp16 else 0)
    patience = Patience(monitor, signals)
    batches, pace = open_stage(setup, state, patience)
    try:
        while state.step < num_steps:
            if batches.views is not setup.stage_of(state.step)[0]:
                batches, pace = open_stage(setup, state, patience, batches)
            batch = next_batch(batches, state, patience, checkpoints)
            now = setup.schedules.at(state.step)
            last = state.step + 1 == num_steps
            if logs_now := last or every(config.log.every, state.step + 1):
                monitor.weights.before()
            result = train_step(state, batch, now)
            monitor.observe(batch, result)
            pace.after(state.step, batch.data_time)
            if logs_now:  # the one place that waits for the device
                metrics = monitor.write(state, batch, result, now, checkpoints.writer.read_stall())
                checkpoints.poll()
                monitor.report(state.step, monitor.health.diagnose(metrics))
                if float(state.rejected) >= max_nonfinite:
                    batches.close()
                    checkpoints.roll_back(state, batches.bad, config.health.max_rollbacks)
                    batches = setup.batches(state).when_waiting(patience.for_data)
                    continue
            if config.parallel.check_every and every(config.parallel.check_every, state.step):
                check_replicas(state.step, state.position, state.replicated(), state.ranks)
            improved = probes is not None and probes.is_due(state.step) and probes.run(state)
            good = every(save_every, state.step) and float(state.rejected) == 0  # a state to come back to
            if good or improved or last:
                checkpoints.save(state, batches.bad, best=improved, wait=last)
            del batch, result  # the targets are as large as the logits: the next step needs the room
    finally:
        batches.close()
        checkpoints.close(batches.bad)


class Patience:
    """What is done while a process waits: files that are not read are named, and signals answered."""

    def __init__(self, monitor: Monitor, signals: Signals) -> None:
        self.ranks, self.log, self.signals, self.said = monitor.ranks, monitor.log, signals, 0.0
        self.timeout = monitor.setup.config.parallel.timeout  # after which the others count this process as lost

    def for_data(self, seconds: float) -> None:
        """After `seconds` of waiting for a batch; Interrupted after a signal to any process.

        raises RunError while the other processes still wait for this one
        """
        if number := self.ranks.asked_to_stop():
            self.signals.received = number
        if self.signals.received:
            raise Interrupted("while waiting for data", self.signals.received)
        which = "".join(f", of which {path} is being read" for _, path, _ in being_read()[:1])
        if self.ranks.world_size > 1 and seconds > self.timeout / 2:
            raise RunError(f"data: a batch has not come for {seconds:.0f} s{which}")
        self.said = self.said if seconds > self.said else 0.0
        if seconds > max(10.0, 3 * self.said):
            self.said = seconds
            line = f"data: a batch is waited for since {seconds:.0f} s{which}"
            if self.ranks.is_main:
                self.log.say(line, logging.WARNING)
            else:
                print_status(line)

    def for_others(self) -> None:
        """While other processes, perhaps, wait for their data: have them hear of a signal that only this one got."""
        if self.signals.received:
            self.ranks.ask_to_stop(self.signals.received)


def next_batch(batches: BatchLoader, state: TrainState, patience: Patience, checkpoints: Checkpoints) -> Batch:
    """The next batch, once every process has one; else all save the last whole step and end with the same error.

    raises Interrupted after a signal to any process; what the lowest process without a batch has raised
    """
    batch, problem, ranks = None, None, state.ranks
    try:
        batch = next(batches)
    except Exception as error:
        problem = None if isinstance(error, Interrupted) else error
    stop = ranks.maximum(patience.signals.received if problem is None else _NO_DATA, patience.for_others)
    if batch is not None and not stop:
        return batch
    if stop == _NO_DATA:
        try:
            with ranks.collective_errors():
                if problem is not None:
                    raise problem
        except Exception as error:
            checkpoints.rescue(state, batches.bad)
            ranks.mark_common(error)
            raise
    checkpoints.save_last(state, batches.bad)
    when = f"after step {state.step} of {checkpoints.num_steps}" if state.step else "before the first step"
    saved = f"; go on with the same command and resume=true (state saved in {checkpoints.out})" if state.step else ""
    interrupted = Interrupted(f"stopped by {signal.Signals(stop).name} {when}{saved}", stop)
    interrupted.reported = not ranks.is_main
    ranks.mark_common(interrupted)
    raise interrupted


def open_stage(
    setup: Setup, state: TrainState, patience: Patience, before: BatchLoader | None = None
) -> tuple[BatchLoader, Pace]:
    """The batches of the stage of crops that `state.step` is in, and what says how long it will take.

    before  the loader of the stage before, which is closed; None: the run starts or resumes
    """
    views, end = setup.stage_of(state.step)
    if before is not None:
        before.close()
        state.history["bad"] = dict(before.bad)
        if setup.config.model.compile:
            torch.compiler.reset()  # else what is compiled anew would be for crops of any size
        sizes = f"{views.crops.global_size} and {views.crops.local_size} px"
        patience.log.say(f"step {state.step}: from here to step {end} crops of {sizes}")
    return setup.batches(state).when_waiting(patience.for_data), Pace(setup.outlook, end, patience.log, setup.device)


def every(period: int, step: int) -> bool:
    """Whether `step` is a multiple of `period`, both in steps."""
    return step % period == 0


def log_run_header(setup: Setup, state: TrainState, messages: list[str], log: SilentLog) -> None:
    """Log model, device, data, messages and config, and write environment.json into the run folder."""
    config, path = setup.config, setup.out / "environment.json"
    backbone, now = state.student.backbone, environment()
    notes = [*setup.notes, *(changed_code(path, now) if state.step > 0 else []), *messages]
    parameters = sum(p.numel() for p in backbone.parameters())
    num_tokens = 1 + backbone.num_registers + math.prod(backbone.grid)
    precision = "tf32" if config.precision == "tf32" else str(setup.dtype)[6:]
    attention = describe_backend(config.model.attention, setup.device, num_tokens, setup.dtype)
    write_atomic(path, json.dumps(now | {"attention": attention}, indent=1) + "\n")
    log.say(
        f"{config.model.name}: {parameters / 1e6:.2f} M parameters, {setup.device} {precision}, "
        f"attention {attention}, {len(setup.source):,} images, {setup.num_steps:,} steps of {setup.global_batch_size} "
        f"({rounded(setup.outlook.passes)} passes)"
    )
    for note in notes:
        log.say(note)
    logger.info("config:\n%s", (setup.out / "config.yaml").read_text())


def changed_code(path: Path, now: dict[str, Any]) -> list[str]:
    """A one-line message when a run is resumed with another dinoreg, commit or PyTorch than `path` records; else [].

    path  the run's environment.json
    now   the environment of this start
    """
    before = read_json(path)
    if not isinstance(before.get("packages"), dict):
        return []
    pairs = [(name, before.get(name), now[name]) for name in ("dinoreg", "commit")]
    pairs.append(("torch", before["packages"].get("torch"), now["packages"]["torch"]))
    changed = [f"{name} {then} -> {new}" for name, then, new in pairs if then != new]
    text = f"resumed with other code than before ({', '.join(changed)}): losses may differ from an unbroken run's"
    return [text] if changed else []


class Signals:
    """A context in which signals that end a process are recorded, so that the loop can save after the step.

    received  the number of the last signal; 0: none

    A second SIGINT raises KeyboardInterrupt at once. SIGHUP stays ignored where nohup has it so.
    Outside the main thread signals are left alone.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
