"""The real training step on fake tensors, which needs neither a device nor its memory.

PyTorch's FakeTensorMode gives tensors a shape and no values. Several processes are simulated by rank 0 alone, whose
collectives transfer nothing; FSDP2 gathers and frees weights as usual.

The step runs on fake CPU tensors, since a backward pass on fake CUDA tensors needs a CUDA device. CUDA's autocast keeps
more operations in float32 than the CPU's, but none that a step calls under autocast with lower-precision input; fused
attention saves the same tensors on both. DDP cannot run on fake tensors: such a step runs unwrapped, see `memory`.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from dinoreg.config.load import Config
from dinoreg.config.schema import ParallelConfig
from dinoreg.data.loader import Batch
from dinoreg.distributed.process_group import ALONE, Ranks, simulated_session
from dinoreg.plan.job import Job
from dinoreg.plan.recorder import Parts, Recorder
from dinoreg.plan.step import masked_batch, take_step
from dinoreg.runtime import tiling
from dinoreg.runtime.device import DTYPES
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.packed_attention import PACKED
from dinoreg.train.optimizer import start_moments
from dinoreg.train.parallelize import device_mesh
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.tutor import Tutor, as_cut

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trace:
    """Memory and operations of a step, from `Recorder`.

    peaks       {moment: {part: bytes}}, without the gradients of DDP's last micro-batch, which are in its buckets
    operations  {kind: floating-point operations}
    """

    peaks: dict[str, Parts]
    operations: dict[str, int]


def trace_job(job: Job, depth: int, masked: tuple[int, ...]) -> Trace:
    """Trace a step of a job, but with `depth` blocks and one micro-batch per entry of `masked`.

    masked  masked patches of each micro-batch
    """
    config, parts = job.config, len(masked)
    attention = "sdpa" if job.backend in PACKED else job.backend  # which keeps a little more, and runs anywhere
    parallel = replace(config.parallel, strategy=job.strategy) if job.world_size > 1 else ParallelConfig()
    return trace_step(
        Config(
            batch_size=job.micro_batch_size * parts,
            model=replace(config.model, depth=depth, attention=attention),
            head=config.head,
            crops=config.crops,
            loss=config.loss,
            optim=replace(config.optim, accumulate=parts),
            parallel=parallel,
            distill=config.distill,
        ),
        job.precision,
        job.world_size,
        job.device.kind,
        masked,
        job.sizes.tutor,
    )


@lru_cache(maxsize=512)
def trace_step(
    config: Config,
    precision: str,
    world_size: int,
    device_kind: str,
    masked: tuple[int, ...],
    tutor: Tutor | None = None,
) -> Trace:
    """Trace one training step of rank 0 of `world_size` processes, on fake tensors.

    config       with parallel.strategy set ("ddp" runs unwrapped) and an attention backend that runs on a CPU
    precision    "bf16" | "fp16" | "fp32"
    device_kind  "cuda" | "cpu", which determines the size of the losses' scratch memory
    masked       masked patches of each micro-batch
    tutor        with its weights, of which only the shapes count
    raises       UserError for several processes inside a process group, since the step simulates one
    """
    if world_size > 1 and dist.is_initialized():
        raise UserError("a plan for several processes cannot be made inside a process group; make it before")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_pieces_of(device_kind))
        ranks = stack.enter_context(simulated_session(world_size)) if world_size > 1 else ALONE
        sharded = config.parallel.strategy == "fsdp"
        mesh = device_mesh(CPU, config.parallel.shard, world_size) if sharded else None
        stack.enter_context(FakeTensorMode())
        state = _fake_state(config, precision, ranks, mesh, None if tutor is None else _fake_tutor(tutor))
        return record_step(config, state, _fake_batch(config, state, masked))


def record_step(config: Config, state: TrainState, batch: Batch) -> Trace:
    """Take a step and record it; AdamW's moments exist before, as after a first step."""
    if not state.optimizer.state:
        start_moments(state.optimizer)
    centers = {center.shape[-1] for center in state.centers.values()} if state.tutor is None else ()
    koleo_ranks = config.loss.koleo_ranks or state.ranks.world_size
    recorder = Recorder(centers, koleo_ranks * config.batch_size)
    recorder.hold_state(state, batch)
    with recorder.watching(state), recorder:
        take_step(state, batch)
    recorder.label_gradients(state.student)
    in_buckets = config.parallel.strategy == "ddp" and config.optim.accumulate == 1
    return Trace(recorder.peaks(without=("gradients",) if in_buckets else ()), dict(recorder.operations))


def _fake_tutor(tutor: Tutor) -> Tutor:
    """The same with fake weights; FakeTensorMode must be active."""
    network, encoder = tutor.network, copy.copy(tutor.encoder)
    tensors = (*network.parameters(), *network.buffers())
    fakes = {id(t): nn.Parameter(torch.empty(t.shape, dtype=t.dtype), False) for t in tensors}
    encoder.module = copy.deepcopy(network, fakes)  # type: ignore[attr-defined]
    return replace(tutor, encoder=encoder)


def _fake_state(
    config: Config, precision: str, ranks: Ranks, mesh: DeviceMesh | None, tutor: Tutor | None
) -> TrainState:
    """A run's training state of fake tensors, sharded over `mesh` if given; FakeTensorMode must be active."""
    with torch.device("meta"):  # where drawing start weights costs nothing
        student, teacher = build_networks(config, tutor)
        anchor = build_networks(config)[1].backbone if config.loss.anchored else None
    for network in (student, teacher, anchor):
        if network is not None:
            _give_fake_parameters(network)
            network.__dict__["to"] = lambda *_, network=network: network  # fake parameters cannot be moved
    owners = ALONE if mesh is None else ranks
    state = TrainState(config, student, teacher, CPU, DTYPES[precision], anchor, owners, mesh, tutor=tutor)
    state.ranks = ranks
    return state


def _give_fake_parameters(network: nn.Module) -> None:
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad))


def _fake_batch(config: Config, state: TrainState, masked: tuple[int, ...]) -> Batch:
    crops, patch_size = as_cut(state.tutor, config.crops, state.student.backbone.patch_size)
    patches = (crops.global_size // patch_size) ** 2
    mask = torch.empty(2 * config.batch_size, patches, dtype=torch.bool)
    hidden, count = np.zeros(len(mask), dtype=np.int64), sum(masked)
    hidden[: config.batch_size : config.batch_size // len(masked)] = masked  # the first crop of each part has them all
    return masked_batch(config, crops, mask, torch.empty(count, dtype=torch.int64), torch.empty(count), hidden)


@contextmanager
def _pieces_of(device_kind: str) -> Iterator[None]:
    """A context in which heads and losses walk through matrices in pieces as large as on that kind of device."""
    size = tiling.CPU_CHUNK
    tiling.CPU_CHUNK = size if device_kind == "cpu" else tiling.DEVICE_PIECE
    try:
        yield
    finally:
        tiling.CPU_CHUNK = size
