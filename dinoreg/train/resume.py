"""Saving a run's state, restoring it, and going back to the last good one.

All processes call these functions together; rank 0 writes the files beside the checkpoints.
"""

import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.async_writer import Writer
from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.run_folder import whole
from dinoreg.data.source import Source
from dinoreg.distributed.process_group import Ranks
from dinoreg.runtime.errors import Interrupted, RunError, UserError, one_line
from dinoreg.runtime.json_files import read_json, step_in
from dinoreg.train.logger import SilentLog
from dinoreg.train.prepare import Setup
from dinoreg.train.state import TrainState


def find_checkpoint(out: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of the run folder `out` (None without any), and a line per damaged newer one.

    raises RunError where there are checkpoints and none can be read, or where they are gone: a new start would
    overwrite what there is of the run
    """
    path, damaged = checkpoint.newest(out / "checkpoints", ranks)
    saved = ranks.from_main(whole(read_json(out / "status.json").get("step")) or 0)
    if path is None and (damaged or saved):
        why = f"its checkpoints are gone, the last was of step {saved}"
        if damaged:
            newest = damaged[0].removesuffix("; passed over")
            why = f"none of its {len(damaged)} checkpoint(s) can be read, the newest: {newest}"
        raise RunError(f"{out}: {why}. Bring them back, or begin anew with overwrite=true")
    return path, damaged


def restore(state: TrainState, path: Path, source: Source) -> list[str]:
    """Load a checkpoint that `find_checkpoint` has verified into `state`; returns lines for the log.

    source  the images of this start, compared with those of the checkpoint
    raises  RunError when a file is damaged, UserError when the checkpoint is of another architecture or tutor
    """
    tensors, tutor = state.tensors(), state.history.get("distill")
    optional = ("anchor",)  # which a run may have from some step on
    numbers = checkpoint.load(path, tensors, state.numbers(), verified=True, ranks=state.ranks, optional=optional)
    bad = numbers["history"].get("bad", {})
    if not (numbers["step"] == step_in(path.name) and 0 <= numbers["position"] < 2**62 and isinstance(bad, dict)):
        raise RunError(f"checkpoint {path}: unreadable (its step, its position or its list of bad images is none)")
    if tutor != numbers["history"].get("distill"):
        raise UserError(f"{path}: was distilled from other weights than those that distill= names now")
    state.load(tensors, numbers)
    messages = [f"resumed from {path}"]
    if state.history.get("source") not in (None, source.fingerprint()):
        messages.append("the data are not those the run was started with")
    return messages


class Checkpoints:
    """The checkpoints of a run in progress, with the files beside them: status.json, skipped.jsonl, health events.

    on_checkpoint  called on rank 0 with (step, teacher file) after a checkpoint has been published
    """

    def __init__(
        self, setup: Setup, writer: Writer, log: SilentLog, on_checkpoint: Callable[[int, Path], None] | None = None
    ) -> None:
        self.out, self.source, self.num_steps, self.ranks = setup.out, setup.source, setup.num_steps, setup.ranks
        self.writer, self.log, self.on_checkpoint = writer, log, on_checkpoint
        self._status: dict[str, Any] = {}

    def save(self, state: TrainState, bad: Mapping[str, str], *, best: bool, wait: bool) -> None:
        """Start writing training state and teacher file; `last` points to them once they are on the disk.

        bad     {image name: reason} of the images that this process could not read
        best    `best` shall point to this checkpoint, too
        wait    return only when it is on the disk
        raises  RunError when too many checkpoints in a row have failed, or with `wait` when this one fails
        """
        bad = {name: reason for part in self.ranks.gather_objects(dict(bad)) for name, reason in part.items()}
        with suppress(OSError):  # the checkpoint will report it
            self.log.flush()
            self._write_skipped(bad)
        state.history |= {"source": self.source.fingerprint(), "bad": bad}
        try:
            self.writer.save(state.step, state.tensors(), state.numbers(), best=best, wait=wait)
        except BaseException:
            self.poll(announce=False)
            raise
        self.poll()

    def save_last(self, state: TrainState, bad: Mapping[str, str]) -> bool:
        """Save the last whole step, between two; returns whether there was one that was not saved yet."""
        with suppress(RunError):  # then it is written again
            self.writer.wait()
        if state.step == 0 or self.writer.saved == state.step:
            return False
        self.save(state, bad, best=False, wait=True)
        return True

    def rescue(self, state: TrainState, bad: Mapping[str, str]) -> None:
        """Save the last whole step before the run ends by an error; a failure is logged, as the first error counts."""
        try:
            if self.save_last(state, bad):
                self.log.say(f"saved at step {state.step}: go on with resume=true once the data are there")
        except (RunError, OSError) as error:
            self.log.say(f"the state of step {state.step} could not be saved: {one_line(error)}", logging.WARNING)

    def poll(self, announce: bool = True) -> None:
        """Log the checkpoints that failed since the last call, announce published ones; never waits.

        announce  False: do not call `on_checkpoint`
        """
        for failure in self.writer.poll():
            self.log.say(f"{failure.message}. {failure.remedy}", logging.WARNING)
            event = {"name": "checkpoint-failed", "message": failure.message, "remedy": failure.remedy}
            self.log.append("health/events.jsonl", {"step": failure.step, **event})
        published = self.writer.read_published()
        if published and self.writer.owns():
            with suppress(OSError):
                self.write_status(published[-1])
        if announce and self.on_checkpoint is not None and self.ranks.is_main:
            for step in published:
                self.on_checkpoint(step, self.out / "teacher" / f"{checkpoint.step_name(step)}.safetensors")

    def write_status(self, step: int) -> None:
        """Write `status.json` on rank 0: "phase", "step", "num_steps", "num_images", "time" in seconds since 1970."""
        self._status = {"phase": "finished" if step >= self.num_steps else "running", "step": step}
        self._write_status()

    def write_end(self, reached: int, error: BaseException) -> None:
        """Add to `status.json` why a run ended early and where: "phase" "stopped" or "failed", "reason", "reached"."""
        if self._status.get("phase") == "finished" or not self.writer.owns():
            return
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        number = getattr(error, "signal_number", signal.SIGINT)
        reason = signal.Signals(number).name if stopped else f"{type(error).__name__}: {one_line(error)}"
        self._status |= {"phase": "stopped" if stopped else "failed", "reason": reason, "reached": reached}
        with suppress(OSError):
            self._write_status()

    def _write_status(self) -> None:
        if self.ranks.is_main:
            content = {**self._status, "num_steps": self.num_steps, "num_images": len(self.source), "time": time.time()}
            write_atomic(self.out / "status.json", json.dumps(content) + "\n")

    def _write_skipped(self, bad: Mapping[str, str]) -> None:
        """`skipped.jsonl`: the images that could not be read."""
        if bad and self.ranks.is_main:
            lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in bad.items())
            write_atomic(self.out / "skipped.jsonl", lines)

    def roll_back(self, state: TrainState, bad: Mapping[str, str], max_rollbacks: int) -> None:
        """Restore the newest checkpoint, but continue after the samples that led to non-finite steps.

        bad            {image name: reason} of the unreadable images so far, kept in the state
        max_rollbacks  times that a run may be rolled back
        raises         RunError when it has been rolled back that often already
        """
        step, position, rollbacks = state.step, state.position, state.rollbacks
        if rollbacks >= max_rollbacks:
            many = f"{int(state.rejected)} steps in a row up to step {step} were not finite"
            samples = f"the samples are listed in {self.out / 'health' / 'nonfinite.jsonl'}"
            do = f"Lower the learning rate or use precision=fp32; {samples}, the log is {self.out / 'train.log'}"
            raise RunError(f"{many}, after {rollbacks} roll-back(s). {do}")
        with suppress(RunError):  # then the one before it is the last good one
            self.writer.wait()
        path, _ = find_checkpoint(self.out, self.ranks)
        if path is not None:
            restore(state, path, self.source)
        state.position = position
        state.rollbacks = rollbacks + 1
        state.rejected.zero_()
        state.history["bad"] = dict(bad)
        # Steps that were not finite changed nothing: without a checkpoint the current weights are the last good ones.
        back = f"from step {step} to step {state.step}" if state.step < step else f"no checkpoint yet, kept step {step}"
        self.log.say(f"health: rolled back, {back}; the samples in between are left behind", logging.WARNING)
        event = {"name": "rolled-back", "message": back, "remedy": "None needed if it does not happen again."}
        self.log.append("health/events.jsonl", {"step": state.step, **event})

    def close(self, bad: Mapping[str, str]) -> None:
        """Wait for the checkpoint that is being written, and log the outcome; `bad` as for `save`."""
        self.writer.close()
        with suppress(OSError):  # a full disk has been reported by then
            self.poll(announce=False)
            self._write_skipped(bad)
