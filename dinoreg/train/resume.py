"""Writing a run's state down, taking it up again, and going back to the last good one.

All of it is done by all processes together; the files beside the checkpoints are written by rank 0.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress

import torch

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.async_writer import Writer
from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.data.loader import BatchLoader
from dinoreg.distributed import process_group as distributed
from dinoreg.runtime.errors import RunError
from dinoreg.train.logger import RunLog
from dinoreg.train.prepare import Setup
from dinoreg.train.state import TrainState

# An fp16 loss scale may halve this often before a non-finite step means anything.
FP16_GRACE = 16


def open_writer(setup: Setup) -> Writer:
    """The writer of this run's checkpoints; the run folder is this start's own from here on."""
    config = setup.config
    return Writer(
        setup.out,
        keep=config.checkpoint.keep,
        keep_hours=config.checkpoint.keep_hours,
        asynchronous=config.checkpoint.asynchronous,
        describe_teacher={
            "architecture": setup.teacher.backbone.architecture(),
            "preprocessing": {
                "mean": list(config.augment.mean),
                "std": list(config.augment.std),
                "image_size": config.crops.global_size,
            },
            "config_hash": config.hash(),
        },
        max_failures=config.checkpoint.max_failures,
        timeout=config.parallel.timeout,
    )


def save(
    setup: Setup, state: TrainState, log: RunLog, batches: BatchLoader, writer: Writer, *, best: bool, wait: bool
) -> list[int]:
    """Have training state and teacher file written; `last` (and `best`) point to them once they are on the disk.

    wait     for the last of a run: until they are
    returns  as report_checkpoints
    """
    bad = {name: why for each in distributed.gather_objects(dict(batches.bad)) for name, why in each.items()}
    with suppress(OSError):  # of which the checkpoint will tell
        log.flush()
        write_skipped(setup, bad)
    state.history |= {"source": setup.source.fingerprint(), "bad": bad}
    try:
        writer.save(state.step, state.tensors(), state.numbers(), best=best, wait=wait)
    finally:
        published = report_checkpoints(setup, log, writer)
    return published


def report_checkpoints(setup: Setup, log: RunLog, writer: Writer) -> list[int]:
    """Say what has become of the checkpoints since this was last called; never waits.

    returns the steps whose checkpoints have got to the disk since then
    """
    for failure in writer.poll():
        log.say(f"{failure.message}. {failure.remedy}", logging.WARNING)
        event = {"name": "checkpoint-failed", "message": failure.message, "remedy": failure.remedy}
        with suppress(OSError):  # the same full disk; it has been said
            log.append("health/events.jsonl", {"step": failure.step, **event})
    published = writer.read_published()
    if published and writer.owns():
        with suppress(OSError):
            _write_status(setup, "running", published[-1])
    return published


def write_skipped(setup: Setup, bad: Mapping[str, str]) -> None:
    """`skipped.jsonl`: the images that could not be read, as all processes found them."""
    lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in bad.items())
    if bad and distributed.is_main():
        write_atomic(setup.out / "skipped.jsonl", lines)


def status(setup: Setup, state: TrainState, phase: str) -> None:
    """`status.json`: where the run is, for `doctor` and `report`."""
    _write_status(setup, phase, state.step)


def _write_status(setup: Setup, phase: str, step: int) -> None:
    if distributed.is_main():
        phase = "finished" if step >= setup.num_steps else phase
        content = {"phase": phase, "step": step, "num_steps": setup.num_steps, "time": time.time()}
        write_atomic(setup.out / "status.json", json.dumps(content) + "\n")


def restore(setup: Setup, state: TrainState) -> list[str]:
    """Load the newest whole checkpoint of the run into `state`; returns what was done, [] when there was none."""
    folder = setup.out / "checkpoints"
    path, messages = checkpoint.newest(folder)
    if path is None:
        return messages
    tensors = state.tensors()
    numbers = checkpoint.load(path, tensors, state.numbers(), verified=True)
    state.load(tensors, numbers)
    messages.append(f"resumed from {path}")
    if state.history.get("source") not in (None, setup.source.fingerprint()):
        messages.append("the data are not those the run was started with")
    return messages


def too_many_nonfinite(setup: Setup, state: TrainState) -> bool:
    """Whether too many steps in a row were not finite."""
    patience = setup.config.health.max_nonfinite
    if setup.dtype == torch.float16:
        patience += FP16_GRACE
    return float(state.rejected) >= patience


def roll_back(setup: Setup, state: TrainState, log: RunLog, writer: Writer, bad: Mapping[str, str]) -> None:
    """Return to the last good state, past the samples that led here; RunError once that has been tried enough.

    bad  the unreadable images found so far, which stay known
    """
    step, position, rollbacks = state.step, state.position, state.rollbacks
    if rollbacks >= setup.config.health.max_rollbacks:
        raise RunError(
            f"{int(state.rejected)} steps in a row up to step {step} were not finite, after {rollbacks} roll-back(s). "
            f"Lower the learning rate or use precision=fp32; the samples are listed in "
            f"{setup.out / 'health' / 'nonfinite.jsonl'}, the log is {setup.out / 'train.log'}"
        )
    with suppress(RunError):  # then the one before it is the last good one
        writer.wait()
    restore(setup, state)
    state.position = position
    state.rollbacks = rollbacks + 1
    state.rejected.zero_()
    state.history["bad"] = dict(bad)
    # Steps that were not finite changed nothing, so without a checkpoint the weights at hand are the last good ones.
    back = f"from step {step} to step {state.step}" if state.step < step else f"no checkpoint yet, kept step {step}"
    log.say(f"health: rolled back, {back}; the samples in between are left behind", logging.WARNING)
    event = {"name": "rolled-back", "message": back, "remedy": "None needed if it does not happen again."}
    log.append("health/events.jsonl", {"step": state.step, **event})
