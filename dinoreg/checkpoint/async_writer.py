"""Writing checkpoints while training goes on, by the one start of a run that owns its folder.

`Writer.save` copies the state to CPU memory and returns; a thread writes the copy (`checkpoint.save`), with collectives
on a process group of its own, since those of two threads on one group would mix. At most one checkpoint is being
written: the next save first waits for it, and there all processes learn how it went.

Slurm may start a job again while its first copy still runs on a machine that is only unreachable. The run folder's
`owner.json` says which copy owns it; it is read again just before a checkpoint is published, and a copy that finds
another owner there stops.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.atomic import part_name, remedy, write_atomic
from dinoreg.config.overwrite import OWNER
from dinoreg.config.schema import CheckpointConfig
from dinoreg.distributed.process_group import ALONE, Ranks, int_of
from dinoreg.runtime.environment import start_time
from dinoreg.runtime.errors import RunError, reworded
from dinoreg.runtime.json_files import read_json


class TakenOver(RunError):
    """Another copy of this job has claimed the run folder; this one must not write there any more."""


@dataclass(frozen=True)
class Lease:
    """One start of a run, by default this one: a random token, and the host and process of its rank 0.

    job, restarts  Slurm's job id (None outside Slurm) and how often Slurm has started the job again
    time           of the start, seconds since 1970
    started        of the process, as `start_time` says; None where unknown
    """

    token: str = field(default_factory=lambda: secrets.token_hex(4))
    host: str = field(default_factory=lambda: socket.gethostname())
    pid: int = field(default_factory=os.getpid)
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    restarts: int = field(default_factory=lambda: int_of(os.environ, "SLURM_RESTART_COUNT", 0))
    time: float = field(default_factory=time.time)
    started: int | None = field(default_factory=lambda: start_time(os.getpid()))

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
            lease = Lease()
            with reworded(f"out={run}: cannot be written", OSError):
                write_atomic(run / OWNER, json.dumps(asdict(lease), indent=1) + "\n", lease.token)
            checkpoint.remove_unfinished(run / "checkpoints")
            for pattern in (part_name(Path(OWNER), "*").name, "checkpoints/*.part", "teacher/*.part"):
                for path in run.glob(pattern):
                    path.unlink(missing_ok=True)
    owner: Lease = ranks.from_main(lease)
    return owner


def owner_of(run: Path) -> Lease | None:
    """The owner of a run folder; None where owner.json is missing or unreadable."""
    content = {"started": None, **read_json(run / OWNER)}
    return Lease(**content) if content.keys() == {each.name for each in fields(Lease)} else None


# ------------------------------------------------------------------------------------------------------------
# Writing


logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A checkpoint that could not be written: its step, the error, and what to do about it (one sentence)."""

    step: int
    message: str
    remedy: str


class Writer(AbstractContextManager):
    """Writes the checkpoints of one run; built once by all processes, which then call `save` and `wait` together.

    Building it raises UserError when the folder cannot be written.

    run               the run folder
    describe_teacher  architecture, preprocessing and config hash, for the teacher file's JSON
    timeout           seconds after which a process that does not answer counts as lost
    ranks             the processes that write together
    saved             step of the last published checkpoint; None before the first
    """

    def __init__(
        self, run: Path, options: CheckpointConfig, describe_teacher: dict, timeout: float, ranks: Ranks = ALONE
    ) -> None:
        self.run, self.options, self.describe_teacher = run, options, describe_teacher
        self.timeout, self.ranks, self.lease = timeout, ranks, acquire(run, ranks)
        self._writers = ALONE if ranks.world_size == 1 else Ranks.of_default_group(timeout)
        self._stall = 0.0
        self.saved: int | None = None
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._step = self._failures = 0
        self._reports: list[Failure] = []
        self._published: list[int] = []

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self, step: int, tensors: dict[str, Any], numbers: dict[str, Any], *, best: bool = False, wait: bool = False
    ) -> None:
        """Begin to write a checkpoint; returns when `tensors` may change again. Called by all processes.

        step     optimizer steps taken
        tensors  nested, by name, as for `format.save`
        numbers  JSON values
        best     whether `best` shall point to it
        wait     return only when it is on the disk
        raises   RunError when options.max_failures in a row have failed, or with `wait` this one; TakenOver when
                 another copy of the job has taken over the run folder
        """
        started = time.perf_counter()
        self._settle(self.options.max_failures if not wait else None)
        share = self._share(checkpoint.flatten(tensors))
        self._step = step
        if self.options.asynchronous:
            arguments = (step, self._stage(share), copy.deepcopy(numbers), best)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(step, share, numbers, best)
            if not wait:
                self._settle(self.options.max_failures)
        if wait:
            self.wait()
        self._stall += time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any; RunError when it failed. Called by all processes."""
        self._settle(1)

    def poll(self) -> list[Failure]:
        """The failures since the last call; never waits."""
        return _take(self._reports)

    def read_published(self) -> list[int]:
        """The steps of the checkpoints published since the last call; never waits."""
        return _take(self._published)

    def read_stall(self) -> float:
        """Seconds that training has waited in `save` since the last call: for the one before it, and for the copy."""
        seconds, self._stall = self._stall, 0.0
        return seconds

    def close(self) -> None:
        """Wait for the checkpoint that is being written, at most `timeout` seconds: a lost process may block it."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(self.timeout)
            if thread.is_alive():
                logger.warning("checkpoint of step %d: given up after %.0f s", self._step, self.timeout)
                return  # its buffers are in use
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    # What follows the call of `save`, in the thread

    def _write(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any], best: bool) -> None:
        retention: Any = {"keep": self.options.keep, "keep_hours": self.options.keep_hours, "best": best}
        writers: Any = {"ranks": self._writers, "token": self.lease.token, "finish": partial(self._finish, step)}
        try:
            try:
                checkpoint.save(self.run / "checkpoints", step, tensors, numbers, **retention, **writers)
            except RunError:
                # Whoever takes over clears away what others have started: then it is not the disk that is to blame.
                checkpoint.on_main(self._writers, lambda: self.lease.check(self.run))
                raise
        except BaseException as error:  # stored until all processes meet in `_settle`
            self._problem = error
            if isinstance(error, RunError) and not isinstance(error, TakenOver):
                self._reports.append(Failure(step, str(error), remedy(error, self.run)))
        else:
            self.saved = step
            self._published.append(step)
            self._failures = 0

    def _finish(self, step: int, folder: Path) -> None:
        """Write the teacher file from a checkpoint's folder; TakenOver when another start has claimed the run."""
        self.lease.check(self.run)
        teacher = checkpoint.read_plain(folder, "teacher.")
        checkpoint.write_teacher(self.run, step, teacher, self.describe_teacher, self.lease.token)
        self.lease.check(self.run)

    def owns(self) -> bool:
        """Whether the run folder still belongs to this start of the run."""
        return self.lease.successor(self.run) is None

    # What happens where all processes are together

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that this process writes: all DTensors, and a share of the replicated ones."""
        plain = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
        plain.sort(key=lambda name: (tensors[name].nbytes, name))
        others = set(plain) - set(plain[self.ranks.rank :: self.ranks.world_size])
        return {name: tensor for name, tensor in tensors.items() if name not in others}

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy in CPU memory (pinned next to a CUDA device) that is used again for every save."""
        if self._stager is None:
            cuda = any(tensor.is_cuda for tensor in tensors.values())
            options = {"use_pinned_memory": cuda, "use_non_blocking_copy": cuda}
            self._stager = DefaultStager(StagingOptions(**options, use_shared_memory=False, use_async_staging=False))
        staged = self._stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
        assert isinstance(staged, dict)
        return staged

    def _settle(self, limit: int | None) -> None:
        """Wait for the checkpoint that is being written. Count a failure, and raise it when there are `limit` in a row
        (None: never).

        A RunError is known to all processes, which therefore decide alike.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is None:
            return
        if isinstance(problem, RunError):
            self._failures += 1
            if not isinstance(problem, TakenOver):
                if limit is None or self._failures < limit:
                    return
                if limit > 1:
                    many = f"{self._failures} checkpoints in a row could not be written; the last: {problem}"
                    problem = RunError(many)
            problem.reported = not self.ranks.is_main
            self.ranks.mark_common(problem)
        raise problem


def _take(items: list[T]) -> list[T]:
    """Empty a list to which another thread appends; returns its items."""
    taken = items[:]
    del items[: len(taken)]
    return taken
