"""Many processes: who they are, sums over them, and how they agree; on one process every function is the identity.

A process learns its place from its environment (torchrun's names, or Slurm's under a bare srun). Tensors travel through
the default group, NCCL on CUDA and gloo elsewhere. Small numbers and messages travel through a gloo group of their own,
so that agreeing on something never waits for the device and never mixes with the step's collectives.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinoreg.distributed.failures import Peers
from dinoreg.runtime.errors import RunError, UserError

# NCCL's own watchdog ends a process without a word; the control group's time-out has to come first.
_NCCL_GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """Where a process stands: its rank among `world_size`, its number on its machine, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


_control: Any = None
_peers: Peers | None = None
_subgroups: dict[int, Any] = {}
_sessions = itertools.count()
_stores: dict[tuple[str, int], dist.Store] = {}  # where this process has met the others, by address and port


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes the run's files and speaks for all; before and after a session, too."""
    if is_distributed():
        return dist.get_rank() == 0
    place = place_from_environment()
    return place is None or place.rank == 0


# ------------------------------------------------------------------------------------------------------------
# Starting and ending


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun or srun gave this process; None for a process that stands alone.

    raises UserError when the variables are incomplete or not numbers
    """
    if int_of(environment, "WORLD_SIZE", 1) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(f"WORLD_SIZE={environment['WORLD_SIZE']}: {' and '.join(missing)} missing beside it")
        number = int_of(environment, "RANK", 0)
        return Place(
            number,
            int_of(environment, "WORLD_SIZE", 1),
            int_of(environment, "LOCAL_RANK", number),
            environment["MASTER_ADDR"],
            int_of(environment, "MASTER_PORT", 0),
        )
    # Set by srun only: a batch script or an allocation's shell has SLURM_NTASKS, yet is one process.
    if "WORLD_SIZE" not in environment and int_of(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        from submitit.slurm.slurm import SlurmJobEnvironment

        job = int_of(environment, "SLURM_JOB_ID", 0) * 7 + int_of(environment, "SLURM_STEP_ID", 0)
        return Place(
            int_of(environment, "SLURM_PROCID", 0),
            int_of(environment, "SLURM_STEP_NUM_TASKS", 1),
            int_of(environment, "SLURM_LOCALID", 0),
            environment.get("MASTER_ADDR") or SlurmJobEnvironment().hostnames[0],
            int_of(environment, "MASTER_PORT", 20_000 + job % 30_000),  # the same for all ranks, another for each job
        )
    return None


def int_of(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text}: expected a whole number in the environment") from None


def pick_cuda_index(local_rank: int, device_count: int, local_world_size: int) -> int:
    """The CUDA device of a process; UserError where its machine has fewer devices than processes.

    A scheduler that binds each process to a device of its own shows it that one device as number 0; whether it is its
    own is checked later, when the processes have met.
    """
    if local_rank < device_count:
        return local_rank
    if device_count == 1:
        return 0
    raise UserError(
        f"process {local_rank} of {local_world_size} on this machine: it has {device_count} CUDA devices; "
        "ask for as many processes as there are devices (or device=cpu)"
    )


@contextmanager
def session(device: str, timeout: float) -> Iterator[None]:
    """Join the process group that the environment describes, if any, and leave it at the end.

    device   as given by the user: auto | cpu | cuda | cuda:N | mps
    timeout  seconds that a process waits for the others before it gives them up as lost
    raises   UserError when there are fewer devices than processes; RunError when the others cannot be reached
    """
    global _control, _peers
    place = None if is_distributed() else place_from_environment()
    owner = place is not None
    if place is not None:
        _join(place, device, timeout)
    if is_distributed():
        _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        _peers = Peers(rank(), gather_objects, toward=os.environ.get("MASTER_ADDR"))
        if place is not None:
            _check_devices(device)
    try:
        yield
    except Exception as error:
        explained = diagnose_failure(error, None, timeout)
        if explained is not None:
            _leave(owner, healthy=False)
            raise explained from error
        if _peers is not None and not getattr(error, "collective", False):
            _peers.tell(" ".join(str(error).split()) or type(error).__name__)
        _leave(owner, healthy=False)
        raise
    except BaseException:
        _leave(owner, healthy=False)
        raise
    _leave(owner, healthy=True)


@contextmanager
def simulated_session(count: int) -> Iterator[None]:
    """Be rank 0 of `count` processes of which the others do not exist: collectives return at once, moving nothing.

    Within it, collectives work on fake tensors as well.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401 - registers them for tensors without values
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _subgroups.clear()


def _leave(owner: bool, healthy: bool) -> None:
    """Close all connections; the others notice, at the latest when this process has gone."""
    global _control, _peers
    if owner and not healthy and "nccl" in dist.get_backend_config():
        dist.destroy_process_group(_control)  # NCCL itself would wait for the lost
    elif owner:
        dist.destroy_process_group()  # or gloo's threads turn an exception into an abort
    if _peers is not None:
        _peers.close()
    _control, _peers = None, None
    _subgroups.clear()


def _join(place: Place, device: str, timeout: float) -> None:
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda and torch.cuda.is_available():
        local_world_size = int_of(os.environ, "LOCAL_WORLD_SIZE", place.world_size)
        torch.cuda.set_device(pick_cuda_index(place.local_rank, torch.cuda.device_count(), local_world_size))
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    try:
        store = _meet(place, timedelta(seconds=timeout))
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if cuda else "gloo",
            # Two runs of one process may meet in the same store, which remembers the first one's addresses.
            store=dist.PrefixStore(f"dinoreg-{next(_sessions)}", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout + (_NCCL_GRACE_SECONDS if cuda else 0.0)),
        )
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        _stores.pop((place.address, place.port), None)  # another try meets anew
        reason = str(error).splitlines()[0][:200]
        raise RunError(
            f"rank {place.rank} of {place.world_size} could not meet the others at {place.address}:{place.port} "
            f"within {timeout:.0f} s: {reason}"
        ) from None


def _meet(place: Place, timeout: timedelta) -> dist.Store:
    """The store of all processes. It outlives a session: a process that is ahead would find it closing in the next."""
    key = (place.address, place.port)
    if key not in _stores:
        _stores[key], _, _ = next(dist.rendezvous("env://", timeout=timeout))
    _stores[key].set_timeout(timeout)
    return _stores[key]


def _check_devices(device: str) -> None:
    """Each process computes on a device of its own."""
    if device == "cpu" or not torch.cuda.is_available():
        return
    mine = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    everyone = gather_objects(mine)
    sharing = [number for number, other in enumerate(everyone) if other == mine]
    if len(sharing) > 1:
        raise UserError(
            f"ranks {', '.join(map(str, sharing))} share one CUDA device: their machine has fewer devices than "
            "processes; ask for as many processes as there are devices (or device=cpu)"
        )


# ------------------------------------------------------------------------------------------------------------
# Tensors of all processes


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, of the same shape; `tensor` itself on one process."""
    if world_size() == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum of `tensor` over all processes; `tensor` itself on one process."""
    if world_size() == 1:
        return tensor
    largest = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes; `tensor` itself on one process."""
    return tensor if world_size() == 1 else all_reduce_sum(tensor) / world_size()


def gather_rows(tensor: Tensor, group_size: int | None = None) -> Tensor:
    """(n, …) of each process -> (G·n, …), in the order of the ranks; `tensor` itself on one process. No gradient.

    group_size  processes G that gather among themselves, consecutive ranks; it divides the number of processes.
                None: all
    """
    size = world_size() if group_size is None else group_size
    if size == 1:
        return tensor
    rows = tensor.detach().contiguous()
    gathered = torch.empty(size * len(rows), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    # PyTorch 2.14 gave it another name and warns of the old one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, rows, group=subgroup(size))
    return gathered


def subgroup(size: int) -> Any:
    """The process group of this rank's `size` consecutive ranks; None, the default group, for all."""
    world = world_size()
    if size == world:
        return None
    if world % size:
        raise UserError(f"{world} processes do not divide into groups of {size}")
    if size not in _subgroups:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        _subgroups[size] = groups[rank() // size]
    return _subgroups[size]


# ------------------------------------------------------------------------------------------------------------
# Agreeing, off the device


def gather_objects(value: Any) -> list[Any]:
    """Everybody's small picklable value, in the order of the ranks. Values come from our own processes alone."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value, group=_control)
    return everyone


def from_main(value: Any) -> Any:
    """Rank 0's small picklable value, on every rank: for decisions that hang on a clock or on one machine."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


@contextmanager
def collective_errors() -> Iterator[None]:
    """What is done inside succeeds on all ranks, or fails on all of them with the error of the first that failed.

    The error of another rank is raised here as well, naming the rank, and marked as reported. Nests:
    a rank that fails early meets the others at whichever agreement they have reached, and all of them end there.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1 or getattr(error, "collective", False):
            raise
        problem = error
    if world_size() == 1:
        return
    kinds = {UserError: "user", RunError: "run"}
    mine = None if problem is None else (kinds.get(type(problem), "other"), f"{problem}" or type(problem).__name__)
    everyone = gather_objects(mine)
    failed = [number for number, each in enumerate(everyone) if each is not None]
    if not failed:
        return
    if problem is not None and failed[0] == rank():
        problem.collective = True  # type: ignore[attr-defined]
        raise problem
    kind, message = everyone[failed[0]]
    elsewhere: Exception = (UserError if kind == "user" else RunError)(f"rank {failed[0]}: {message}")
    elsewhere.collective = elsewhere.reported = True  # type: ignore[attr-defined]
    raise elsewhere from problem


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 does what is inside before the others do; the failure of one is everybody's."""
    if is_main():
        with collective_errors():
            yield
        with collective_errors():
            pass
    else:
        with collective_errors():
            pass
        with collective_errors():
            yield


class Agreement:
    """Whole numbers whose maximum over all processes everybody learns one step later, so that nobody waits.

    On one process the maximum is the number itself, at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor] | None = None

    def maximum(self, value: int) -> int:
        """Give this step's number; returns the largest of the step before (0 at the first)."""
        if world_size() == 1:
            return value
        agreed = 0
        if self._pending is not None:
            work, numbers = self._pending
            work.wait()
            agreed = int(numbers)
        numbers = torch.tensor(value)
        self._pending = (dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=_control, async_op=True), numbers)
        return agreed

    def finish(self) -> int:
        """The largest number of the last step, waited for."""
        if self._pending is None:
            return 0
        (work, numbers), self._pending = self._pending, None
        work.wait()
        return int(numbers)


def diagnose_failure(error: BaseException, step: int | None, timeout: float) -> RunError | None:
    """In words, which processes a failed collective was waiting for; None when the error is not about that.

    step  after which it failed; None: outside the steps
    """
    if not is_distributed() or _peers is None or not is_collective_failure(error):
        return None
    explained = RunError(_peers.explain(step, timeout))
    explained.collective = True  # the others have found out by themselves, or are gone
    return explained


def is_collective_failure(error: BaseException) -> bool:
    """Whether an exception comes from torch.distributed, as opposed to the program's own."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, RunError):  # in words already
        return False
    text = str(error).lower()
    signs = ("connection closed by peer", "timed out waiting", "gloo", "nccl", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
