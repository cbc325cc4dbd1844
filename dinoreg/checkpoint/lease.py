"""Ownership of a run folder: only one start of a job writes into it.

Slurm may start a job again while its first copy still runs on a machine that is only unreachable. The run folder's
`owner.json` says which copy owns it; it is read again just before a checkpoint is published, and a copy that finds
another owner there stops.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dinoreg.checkpoint.atomic import part_name, write_atomic
from dinoreg.checkpoint.format import remove_unfinished
from dinoreg.config.overwrite import OWNER
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.runtime.environment import start_time
from dinoreg.runtime.errors import RunError, reworded
from dinoreg.runtime.json_files import read_json


class TakenOver(RunError):
    """Another copy of this job has claimed the run folder; this one must not write there any more."""


@dataclass(frozen=True)
class Lease:
    """One start of a run: a random token, and the host and process of its rank 0.

    job, restarts  Slurm's job id (None outside Slurm) and how often Slurm has started the job again
    time           of the start, seconds since 1970
    started        of the process, as `start_time` says; None where unknown
    """

    token: str
    host: str
    pid: int
    job: str | None
    restarts: int
    time: float
    started: int | None = None

    def __str__(self) -> str:
        place = f"process {self.pid}" if self.job is None else f"job {self.job}"
        again = f" (restart {self.restarts})" if self.restarts else ""
        return f"{place}{again} on {self.host} at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.time))}"

    def successor(self, run: Path) -> Lease | None:
        """The start that has claimed the run folder since; None while this one owns it."""
        owner = owner_of(run)
        return None if owner is None or owner.token == self.token else owner

    def check(self, run: Path) -> None:
        """Raise TakenOver when another start has claimed the run folder since."""
        successor = self.successor(run)
        if successor is not None:
            raise TakenOver(f"{run} was taken over by {successor}; this copy ({self}) stops writing there")


def acquire(run: Path, ranks: Ranks = ALONE) -> Lease:
    """Claim the run folder for this start and remove the unfinished files of earlier ones. Called by all processes.

    raises UserError, on all processes, when the folder cannot be written
    """
    with ranks.collective_errors():
        lease = None
        if ranks.is_main:
            restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
            lease = Lease(
                token=secrets.token_hex(4),
                host=socket.gethostname(),
                pid=os.getpid(),
                job=os.environ.get("SLURM_JOB_ID"),
                restarts=int(restarts) if restarts.isdigit() else 0,
                time=time.time(),
                started=start_time(os.getpid()),
            )
            with reworded(f"out={run}: cannot be written", OSError):
                write_atomic(run / OWNER, json.dumps(asdict(lease), indent=1) + "\n", lease.token)
            remove_unfinished(run / "checkpoints")
            for pattern in (part_name(Path(OWNER), "*").name, "checkpoints/*.part", "teacher/*.part"):
                for path in run.glob(pattern):
                    path.unlink(missing_ok=True)
    owner: Lease = ranks.from_main(lease)
    return owner


def owner_of(run: Path) -> Lease | None:
    """The owner of a run folder; None where owner.json is missing or unreadable."""
    try:
        return Lease(**read_json(run / OWNER))
    except TypeError:
        return None
