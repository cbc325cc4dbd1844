"""How a run stands, by the files of its folder: finished, running, stopped, failed, or ended without a word."""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from dinoreg.checkpoint.run_folder import Run, whole
from dinoreg.runtime.durations import about
from dinoreg.runtime.environment import is_alive

# Phases, and how much each is a problem.
MARKS = {"finished": "ok", "running": "running", "unseen": "running", "stopped": "open", "failed": "problem"}
MARKS |= {"lost": "problem"}
SPOKEN = {"unseen": "not seen to end", "lost": "ended without a word"}


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    phase      one of MARKS; "unseen": on another machine, not seen to end; "lost": ended without a word
    reason     why it ended early ("SIGTERM", an error), or where it runs; "" where nothing is to be said
    reached    the last step that is known of
    saved      the step of the last checkpoint; 0: nothing was saved
    num_steps  of the whole run; None: unknown
    updated    when its files were last written, in seconds since 1970; 0: unknown
    """

    phase: str
    reason: str
    reached: int
    saved: int
    num_steps: int | None
    updated: float

    @property
    def age(self) -> str:
        """How long ago its files were last written, in words."""
        return about(max(0.0, time.time() - self.updated)) if self.updated else ""

    @property
    def in_words(self) -> str:
        """As "stopped by SIGTERM", "failed by an error, OSError: …" or "ended without a word (…)"."""
        if self.phase in ("stopped", "failed"):
            return f"{self.phase} by {'an error, ' if self.phase == 'failed' else ''}{self.reason or '?'}"
        said = SPOKEN.get(self.phase, self.phase)
        return f"{said} ({self.reason})" if self.reason else said


def state_of(run: Run) -> RunState:
    """How a run stands."""
    phase, reason = run.status.get("phase"), str(run.status.get("reason", ""))
    if phase not in ("finished", "stopped", "failed"):
        phase, reason = _alive(run.folder)
    reached, saved = (whole(run.status.get(key)) or 0 for key in ("reached", "step"))
    files = (run.folder / name for name in ("metrics.jsonl", "status.json"))
    updated = max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)
    return RunState(str(phase), reason, max(run.step, reached), saved, run.num_steps, updated)


def _alive(run: Path) -> tuple[str, str]:
    """Phase and reason of a run that has not said that it ended."""
    from dinoreg.checkpoint.lease import owner_of  # which needs torch, as the runs that have ended do not

    owner = owner_of(run)
    if owner is None:
        return "unseen", ""
    if owner.host != socket.gethostname():
        return "unseen", str(owner)
    if Path("/proc").is_dir() and not is_alive(owner.pid, owner.started):
        return "lost", f"process {owner.pid} is gone; killed, or out of memory?"
    return "running", str(owner)
