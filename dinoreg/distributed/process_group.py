"""The processes of a run: their ranks, collectives over them, and joint decisions; on one process all are the identity.

A process learns its rank from its environment (torchrun's variables, or Slurm's under a bare srun). Tensors go through
the default group, NCCL on CUDA and gloo elsewhere. Small numbers and messages go through a gloo group of their own, so
that a joint decision never waits for the device and never mixes with the step's collectives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinoreg.distributed.failures import Peers
from dinoreg.distributed.waiting import Meetings, Place
from dinoreg.runtime.errors import RunError, UserError, one_line

# NCCL's own watchdog ends a process without a word; the control group's time-out has to come first.
_NCCL_GRACE_SECONDS = 120.0


# ------------------------------------------------------------------------------------------------------------
# The processes of a run


class Ranks:
    """The processes of a run, from the view of one of them; `Ranks()` is a single process.

    rank, world_size  this process's number, from 0, and the number of processes

    All processes have to call a collective method together, with tensors of one shape (any) and dtype; the result of a
    reduction has the same shape.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, control: Any = None, peers: Peers | None = None) -> None:
        """
        control  the gloo group that messages travel through
        peers    finds out which process is lost when a collective fails
        """
        self.rank, self.world_size = rank, world_size
        self.control, self.peers = control, peers
        self._subgroups: dict[int, Any] = {}
        self._common_error: BaseException | None = None

    @classmethod
    def of_default_group(cls, timeout: float) -> Ranks:
        """The processes of torch.distributed's default group, all of which call this.

        timeout  seconds that a message may take before it fails
        """
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return cls(dist.get_rank(), dist.get_world_size(), control)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's files and the console."""
        return self.rank == 0

    # Tensors

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The elementwise sum of `tensor` over all processes; `tensor` itself on one process. Not differentiable."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum of `tensor` over all processes; `tensor` itself on one. Not differentiable."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """The elementwise mean of `tensor` over all processes; `tensor` itself on one process. Not differentiable."""
        return tensor if self.world_size == 1 else self.all_reduce_sum(tensor) / self.world_size

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.world_size == 1:
            return tensor
        result = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, op=operation)
        return result

    def gather_rows(self, tensor: Tensor, group_size: int | None = None) -> Tensor:
        """(n, …) of each process -> (G·n, …), in the order of the ranks; `tensor` itself on one process. No gradient.

        group_size  number G of consecutive ranks that gather among themselves, a divisor of world_size; None: all
        """
        size = self.world_size if group_size is None else group_size
        if size == 1:
            return tensor
        rows = tensor.detach().contiguous()
        gathered = torch.empty(size * len(rows), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        # PyTorch 2.14 gave it another name and warns of the old one.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, rows, group=self._subgroup(size))
        return gathered

    def _subgroup(self, size: int) -> Any:
        """The process group of this rank's `size` consecutive ranks; None, the default group, for all."""
        if size == self.world_size:
            return None
        if size not in self._subgroups:
            self._subgroups[size], _ = dist.new_subgroups(size)
        return self._subgroups[size]

    # Messages, off the device

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's small picklable value, in the order of the ranks; only processes of the run can send one."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's small picklable value, on every rank: for decisions that depend on a clock or on one machine."""
        return self.gather_objects(value)[0]

    def maximum(self, value: int, meanwhile: Callable[[], None] = lambda: None) -> int:
        """The maximum of an integer over all processes; `meanwhile` is called now and then until all have given theirs.

        It never waits for the device, of which a process may be ahead.
        """
        if self.world_size == 1:
            return value
        number, began = torch.tensor(value), time.monotonic()
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.control, async_op=True)
        while not work.is_completed():
            meanwhile()
            time.sleep(min(max(1e-4, (time.monotonic() - began) / 20), 0.2))
        work.wait()  # raises what went wrong
        return int(number)

    def ask_to_stop(self, number: int) -> None:
        """Leave the number of a signal for the others, which may wait for data and hear of nothing else."""
        dist.distributed_c10d._get_default_store().set(f"stop {self.control.group_name}", str(number))

    def asked_to_stop(self) -> int:
        """The number that another process has left by `ask_to_stop`, or 0."""
        if self.world_size == 1:
            return 0
        store, key = dist.distributed_c10d._get_default_store(), f"stop {self.control.group_name}"
        return int(store.get(key)) if store.check([key]) else 0

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """A context that all ranks enter: if it fails on one, it fails on all with the error of the lowest such rank.

        raises  on that rank its own error; on others a UserError or RunError that names the rank, marked as reported

        Contexts nest: a rank that fails in an outer one meets the others at the end of an inner one; all fail there.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world_size == 1 or self.is_common(error):
                raise
            problem = error
        if self.world_size == 1:
            return
        own = None if problem is None else (isinstance(problem, UserError), f"{problem}" or type(problem).__name__)
        errors = self.gather_objects(own)
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return
        if problem is not None and failed[0] == self.rank:
            self.mark_common(problem)
            raise problem
        user_error, message = errors[failed[0]]
        elsewhere = (UserError if user_error else RunError)(f"rank {failed[0]}: {message}")
        elsewhere.reported = True
        self.mark_common(elsewhere)
        raise elsewhere from problem

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A context that rank 0 runs before the others do; an error on one rank is raised on all."""
        for mains_turn in (True, False):
            with self.collective_errors():
                if self.is_main is mains_turn:
                    yield

    def mark_common(self, error: BaseException) -> None:
        """Note that all processes end with this error, so that it need not be sent to the others."""
        self._common_error = error

    def is_common(self, error: BaseException) -> bool:
        """Whether all processes end with this error, see `mark_common`."""
        return error is self._common_error

    # Lost processes

    def diagnose_failure(self, error: BaseException, step: int | None, timeout: float) -> RunError | None:
        """A RunError that names the processes a failed collective was waiting for; None for any other error.

        step     after which it failed; None: outside the steps
        timeout  seconds, parallel.timeout, for the message
        """
        if self.peers is None or not is_collective_failure(error):
            return None
        explained = RunError(self.peers.explain(step, timeout))
        self.mark_common(explained)  # the others have found out by themselves, or are gone
        return explained

    def broadcast_failure(self, error: BaseException) -> None:
        """Send the others, which may wait in a collective, the error with which this process stops."""
        if self.peers is not None and not self.is_common(error):
            self.peers.broadcast_failure(one_line(error))


ALONE = Ranks()


def is_collective_failure(error: BaseException) -> bool:
    """Whether an exception comes from torch.distributed rather than from this program.

    gloo has no exception class: its errors, also in DDP's and FSDP's backward passes, are plain RuntimeErrors and are
    recognised by their text.
    """
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, RunError):  # in words already
        return False
    text = str(error).lower()
    closed = ("connection closed by peer", "connection reset", "broken pipe", "pair closure")
    signs = (*closed, "timed out waiting", "gloo", "nccl")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


# ------------------------------------------------------------------------------------------------------------
# A process's place


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun or srun gave this process; None for a single process.

    raises UserError when the variables are incomplete or not integers
    """
    number = partial(int_of, environment)
    if (world_size := number("WORLD_SIZE", 1)) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(f"WORLD_SIZE={world_size}: {' and '.join(missing)} missing beside it")
        rank = number("RANK")
        address, port = environment["MASTER_ADDR"], number("MASTER_PORT")
        return Place(rank, world_size, number("LOCAL_RANK", rank), address, port)
    # Set by srun only: a batch script or an allocation's shell has SLURM_NTASKS, yet is one process.
    if "WORLD_SIZE" not in environment and (world_size := number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        from submitit.slurm.slurm import SlurmJobEnvironment

        address = environment.get("MASTER_ADDR") or SlurmJobEnvironment().hostnames[0]
        job = number("SLURM_JOB_ID") * 7 + number("SLURM_STEP_ID")
        port = number("MASTER_PORT", 20_000 + job % 30_000)  # the same for all ranks, another for each job
        name = "SLURM_STEP_NUM_TASKS"
        return Place(number("SLURM_PROCID"), world_size, number("SLURM_LOCALID"), address, port, name)
    return None


def int_of(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    """The integer value of an environment variable, `default` without it or any text; UserError for any other text."""
    text = environment.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text}: expected a whole number in the environment") from None


def is_main_process() -> bool:
    """Whether this process is rank 0 by its environment, for use where no session is open; a single process is."""
    place = place_from_environment()
    return place is None or place.rank == 0


# ------------------------------------------------------------------------------------------------------------
# Joining and leaving


@contextmanager
def session(device: str, timeout: float) -> Iterator[Ranks]:
    """A context that joins the process group which the environment describes, if any, and leaves it at the end.

    device   as given by the user: auto | cpu | cuda | cuda:N | mps
    timeout  seconds that a process waits for the others before it counts them as lost
    yields   the processes of the group; a default group that exists already is used and not closed
    raises   UserError when there are fewer devices than processes; RunError when the others cannot be reached, or when
             a collective inside fails, naming the lost processes
    """
    joined = dist.is_available() and dist.is_initialized()
    place = None if joined else place_from_environment()
    if place is not None:
        _join(place, device, timeout)
    ranks = Ranks()
    if joined or place is not None:
        ranks = Ranks.of_default_group(timeout)
        ranks.peers = Peers(ranks.rank, ranks.gather_objects, toward=os.environ.get("MASTER_ADDR"))
    healthy = False
    try:
        if place is not None:
            _check_devices(device, ranks)
        yield ranks
        healthy = True
    except Exception as error:
        explained = ranks.diagnose_failure(error, None, timeout)
        if explained is not None:
            raise explained from error
        ranks.broadcast_failure(error)
        raise
    finally:
        _leave(ranks, place is not None, healthy)


@contextmanager
def simulated_session(count: int) -> Iterator[Ranks]:
    """A context as rank 0 of `count` simulated processes: collectives return at once and transfer nothing.

    They work on fake tensors, too.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401 - registers them for tensors without values
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield Ranks(0, count)
    finally:
        dist.destroy_process_group()


def _leave(ranks: Ranks, owns_group: bool, healthy: bool) -> None:
    """Close all connections; the others notice, at the latest when this process has gone."""
    if owns_group and not healthy and "nccl" in dist.get_backend_config():
        dist.destroy_process_group(ranks.control)
        dist.distributed_c10d._abort_process_group()  # destroyed, NCCL would wait for the lost
    elif owns_group:
        dist.destroy_process_group()  # or gloo's threads turn an exception into an abort
    if ranks.peers is not None:
        ranks.peers.close()


def _join(place: Place, device: str, timeout: float) -> None:
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda and torch.cuda.is_available():
        # A scheduler may show each process one device alone; that no two share one is checked once they have met.
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.world_size), MASTER_ADDR=place.address, MASTER_PORT=str(place.port)
    )
    # Else NCCL's monitor asks rank 0 every second for a dump that nobody reads, and reports at length when it is gone.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    meetings = _meetings.setdefault((place.address, place.port), Meetings())
    try:
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if cuda else "gloo",
            store=meetings.next_store(place, timeout),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout + (_NCCL_GRACE_SECONDS if cuda else 0.0)),
        )
    except (RuntimeError, ValueError, OSError) as error:  # DistError is a RuntimeError
        meetings.store = None  # another attempt needs a new one
        where = f"{place.address}:{place.port} within {timeout:.0f} s ({str(error).splitlines()[0][:200]})"
        raise RunError(f"rank {place.rank} of {place.world_size} could not meet the others at {where}") from None


_meetings: dict[tuple[str, int], Meetings] = {}  # by address and port


def _check_devices(device: str, ranks: Ranks) -> None:
    """UserError where two processes compute on the same CUDA device."""
    if device == "cpu" or not torch.cuda.is_available():
        return
    own = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    sharing = [rank for rank, other in enumerate(ranks.gather_objects(own)) if other == own]
    if len(sharing) > 1:
        what = "share one CUDA device: their machine has fewer devices than processes"
        do = "ask for as many processes as there are devices (or device=cpu)"
        raise UserError(f"ranks {', '.join(map(str, sharing))} {what}; {do}")
