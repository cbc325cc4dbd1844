"""Writing a run's state down, taking it up again, and going back to the last good one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from dinoreg import checkpoint
from dinoreg.data.batches import BatchLoader
from dinoreg.errors import RunError
from dinoreg.train.log import RunLog
from dinoreg.train.setup import Setup
from dinoreg.train.state import TrainState

# An fp16 loss scale may halve this often before a non-finite step means anything.
FP16_GRACE = 16


def save(setup: Setup, state: TrainState, log: RunLog, batches: BatchLoader, best: bool) -> None:
    """Training state, teacher file and the list of unreadable images; then `last` (and `best`) point to them."""
    log.flush()
    keep = setup.config.checkpoint.keep
    write_skipped(setup, batches.bad)
    write_teacher(setup, state)
    state.history |= {"source": setup.source.fingerprint(), "bad": dict(batches.bad)}
    checkpoint.save(setup.out / "checkpoints", state.step, state.tensors(), state.numbers(), keep, best)
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


def roll_back(setup: Setup, state: TrainState, log: RunLog, bad: Mapping[str, str]) -> None:
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
