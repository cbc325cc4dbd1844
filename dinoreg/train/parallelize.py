"""A run's networks on many processes: DDP, FSDP2 or HSDP, chosen once and wrapped from outside.

A step reads the same whatever is chosen: it calls `train_modules["backbone"]` and the heads, and backward passes
leave the mean of all processes' gradients. DDP keeps a replica of everything on each process. FSDP2 shards parameters,
gradients, moments and the teacher, a block at a time, over `parallel.shard` consecutive processes; the groups of an
HSDP run hold replicas of one another.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dinoreg.config.option import check
from dinoreg.config.schema import LossConfig, ParallelConfig
from dinoreg.distributed.process_group import Ranks
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.device import DTYPES
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.packed_attention import Shapes, mark_constants

# A student or teacher by module name, see `state.Networks`.
Modules = nn.ModuleDict | Mapping[str, nn.Module]


def choose_strategy(options: ParallelConfig, num_parameters: int, world_size: int) -> str:
    """ "single", "ddp" or "fsdp", from the options or, for "auto", from the number of parameters of the student.

    raises UserError where `world_size` processes do not divide into groups of `parallel.shard`
    """
    if world_size == 1:
        return "single"
    divides = options.shard is None or world_size % options.shard == 0
    check(divides, "parallel.shard", options.shard, f"a divisor of the {world_size} processes")
    if options.strategy != "auto":
        return options.strategy
    # Of larger networks, replicas of the training state on every process waste memory.
    return "fsdp" if num_parameters > 300_000_000 or options.shard is not None else "ddp"


def parallelize(
    options: ParallelConfig,
    loss: LossConfig,
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    anchor: RegisterViT | None,
    device: torch.device,
    ranks: Ranks,
    mesh: DeviceMesh | None = None,
) -> Modules:
    """Distribute the networks, all on `device`, over the processes; returns the student's modules as a step calls them.

    loss    its weights say which heads get gradients, which DDP has to know
    anchor  the frozen backbone that a loss holds to, if any
    mesh    of the processes, for FSDP2; None: `device_mesh` of all of them
    raises  UserError where the processes do not divide into groups of `parallel.shard`

    FSDP2 turns parameters into DTensors in place, so this comes before the optimizer is built.
    """
    strategy = choose_strategy(options, sum(p.numel() for p in student.parameters()), ranks.world_size)
    if strategy == "fsdp":
        mesh = mesh or device_mesh(device, options.shard, ranks.world_size)
        policy = MixedPrecisionPolicy(
            param_dtype=None if options.param_dtype == "fp32" else DTYPES[options.param_dtype],
            reduce_dtype=DTYPES[options.reduce_dtype],
        )
        shard(student, mesh, policy, options.reshard)
        # No backward pass frees the teacher's weights, so that they have to go as soon as they were used.
        shard(teacher, mesh, policy, True)
        if anchor is not None:
            shard(nn.ModuleDict({"backbone": anchor}), mesh, policy, True)
        return student
    if strategy == "ddp":
        # Looking for unused parameters keeps DDP from regrouping its buckets after the first step. The groups fix the
        # order of sums, so that a resumed run, which has another first step, would differ in the last bits.
        replicate = partial(DistributedDataParallel, gradient_as_bucket_view=True, find_unused_parameters=True)
        return {name: replicate(m) if _learns(name, student, loss) else m for name, m in student.items()}
    return student


def device_mesh(device: torch.device, shard_size: int | None, world_size: int) -> DeviceMesh:
    """A mesh of all processes: one dimension ("shard"), or two ("replicate", "shard") for HSDP.

    shard_size  consecutive processes that share one replica, a divisor of world_size; None: all (FSDP)
    """
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_size, shard_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(networks: nn.ModuleDict, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    """Apply FSDP2 in place to every block of the backbone, to the rest of the backbone, and to each head.

    policy   dtypes of gathered parameters and of reduced gradients
    reshard  free the gathered parameters of a unit after its forward pass, and gather them again for the backward
    """
    # Tokens are views of one tensor; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in networks.values():
        for unit in [*module.blocks, module] if isinstance(module, RegisterViT) else [module]:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def _learns(name: str, student: nn.ModuleDict, loss: LossConfig) -> bool:
    """Whether a module gets gradients; DDP would wait for those of a head whose loss has no weight."""
    if name in ("backbone", "distill_head"):
        return True
    if name == "ibot_head":
        return loss.ibot_weight > 0
    return loss.dino_weight > 0 or (loss.ibot_weight > 0 and "ibot_head" not in student)


def compile_blocks(student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
    """Have torch.compile make one graph of each kind of backbone block, in place, for the passes of a step.

    Blocks, not backbones: DDP reduces gradients and FSDP gathers weights between them, outside of the graphs.
    """
    mark_constants()
    for networks in (student, teacher):
        backbone = networks["backbone"]
        assert isinstance(backbone, RegisterViT)
        for block in backbone.blocks:
            block.forward = _compiled(block.forward)


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward pass of a `Block`, compiled where its groups are packed: pictures of a probe come in any size."""
    compiled = torch.compile(forward)

    def of_step(
        x: Tensor, shapes: Shapes, backends: Sequence[str], packed: bool, rows: Tensor | None, *more: Any
    ) -> Tensor:
        if rows is not None:  # how many there are changes from step to step
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return (compiled if packed else forward)(x, shapes, backends, packed, rows, *more)

    return of_step


# ------------------------------------------------------------------------------------------------------------
# Around a step


@contextmanager
def without_reduction(train_modules: Modules, active: bool) -> Iterator[None]:
    """A context for all but the last micro-batch of a step: backward passes inside do not reduce gradients.

    active  False: the context does nothing

    It affects DDP only. FSDP2 reduces after each micro-batch, which keeps gradients sharded; the mean is the same.
    """
    with ExitStack() as stack:
        for module in train_modules.values() if active else ():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def reshard(networks: nn.Module) -> None:
    """Free the weights that FSDP gathered, so that `parameters()` are the shards.

    Needed after a forward pass without a backward pass.
    """
    for module in networks.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory (it may be empty); any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which call together; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------------------
# Replicas that must not drift apart


def check_replicas(step: int, position: int, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Compare step, data position and all tensors between the processes that hold replicas of them, bit by bit.

    step, position  optimizer steps and samples so far, on this process
    tensors         by name; parts of sharded ones are compared with the same parts of other groups (HSDP)
    raises          RunError on all ranks, naming the differing ranks and values
    """
    if ranks.world_size == 1:
        return
    digests = {"step": str(step), "position": str(position)}
    digests |= {f"{name}{_part(tensor)}": _digest(local(tensor)) for name, tensor in tensors.items()}
    problems = find_drift(ranks.gather_objects(digests))
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        do = "Resume from the last checkpoint; if it happens again, look at the memory and the network of that machine"
        raise RunError(f"processes have drifted apart at step {step}: {shown}. {do}")


def find_drift(digests_of_ranks: list[dict[str, str]]) -> list[str]:
    """One sentence for each name whose digests differ between ranks; the most frequent digest counts as right.

    digests_of_ranks  in rank order, {name: digest}; a name may be missing on some ranks
    """
    problems = []
    for name in sorted(set().union(*digests_of_ranks), key=lambda name: (" " in name, name)):
        held = {rank: digests[name] for rank, digests in enumerate(digests_of_ranks) if name in digests}
        values = list(held.values())
        common = max(values, key=values.count)
        odd = [rank for rank, value in held.items() if value != common]
        if odd:
            ranks = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
            problems.append(f"{name} of {ranks} differs from {'most' if len(held) > 2 else 'the other'}")
    return problems


def _part(tensor: Tensor) -> str:
    """Which part of a sharded tensor this is: its place along the sharding dimension."""
    if not isinstance(tensor, DTensor):
        return ""
    coordinate = tensor.device_mesh.get_coordinate()
    return f" (shard {coordinate[-1]})" if coordinate is not None else ""


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=8).hexdigest()
