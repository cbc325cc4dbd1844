"""Memory of one device through a training step, by part, and its operations: the step is run on fake tensors.

A step of a deep backbone is not run whole. Within a moment of the step memory grows by the same amount with each block,
and with each micro-batch that comes before, so that a step of few blocks and micro-batches is extended along both.
Operations are those of matrix products, a multiply-add as two: linear maps and attention, as they are executed. Norms,
activations and losses are left out (below one percent). What drop path skips is not computed, and neither is the last
FFN of tokens that no loss looks at.
"""

from collections import defaultdict
from dataclasses import dataclass

from dinoreg.plan.devices import CONTEXT_GIB, FRAGMENTATION, GIB, NCCL_GIB
from dinoreg.plan.job import Job
from dinoreg.plan.recorder import KOLEO, PARTS, STATE, Parts
from dinoreg.plan.trace import trace_job

# Blocks of the two steps that are run in place of a deeper one, and micro-batches in place of more.
BLOCKS = (3, 5)
MICRO_BATCHES = (2, 3)


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes.

    moments    of a step, in their order: {part: bytes} at the peak of each
    context    allowance for the CUDA context, libraries and NCCL
    fragments  allowance for what the allocator cannot use
    host       pinned (or plain) CPU memory of one process for crops that are prepared ahead
    available  what the device has; 0: not known
    """

    moments: dict[str, Parts]
    context: int
    fragments: int
    host: int
    available: int

    @property
    def peak(self) -> str:
        """The moment at which most is held."""
        return _peak(self.moments)

    @property
    def allocated(self) -> int:
        """Tensors at the peak: what `max_memory` in metrics.jsonl shows."""
        return sum(self.moments[self.peak].values())

    @property
    def needed(self) -> int:
        return self.allocated + self.context + self.fragments

    @property
    def fits(self) -> bool:
        return self.available == 0 or self.needed <= self.available


@dataclass(frozen=True)
class Operations:
    """One image's share of a training step, in floating-point operations.

    student    backbone on all crops, forward and backward
    teacher    backbone on the global crops
    heads      the student's and the teacher's
    again      forward passes that are repeated or added: recomputed blocks, an anchor, KoLeo's pass over micro-batches
    attention  products with (T, T) matrices; contained in the others
    """

    student: float
    teacher: float
    heads: float
    again: float
    attention: float

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.heads + self.again


def memory_of(job: Job) -> Memory:
    """What a device holds through a step of this job."""
    return memory_from(job, step_peaks(job))


def _peak(moments: dict[str, Parts]) -> str:
    return max(moments, key=lambda name: sum(moments[name].values()))


def memory_from(job: Job, moments: dict[str, Parts]) -> Memory:
    """The memory of a job, from {moment: {part: bytes}} of its step."""
    cuda = job.device.kind == "cuda"
    passing = sum(size for part, size in moments[_peak(moments)].items() if part not in STATE)
    crops, channels = job.config.crops, job.config.model.in_channels
    pixels = 2 * crops.global_size**2 + crops.num_local * crops.local_size**2
    slots = job.config.data.prefetch + 1
    return Memory(
        moments=moments,
        context=int(GIB * (CONTEXT_GIB + NCCL_GIB * (job.world_size > 1))) if cuda else 0,
        fragments=int(FRAGMENTATION * passing) if cuda else 0,
        host=slots * job.config.batch_size * pixels * channels,
        available=job.device.memory,
    )


def step_peaks(job: Job) -> dict[str, Parts]:
    """{moment: {part: bytes}} of a whole step, extended from smaller ones where it has more blocks or micro-batches."""
    depth, parts = job.sizes.depth, job.config.optim.accumulate
    blocks, micro_batches = _few(depth, BLOCKS), _few(parts, MICRO_BATCHES)
    steps = _depths(depth, blocks, micro_batches)
    if micro_batches < parts:
        steps += [(parts - micro_batches, blocks, MICRO_BATCHES[1]), (micro_batches - parts, blocks, micro_batches)]
    peaks: dict[str, dict[str, float]] = {}
    for times, *size in steps:
        for moment, parts_held in _traced(job, *size).items():
            held = peaks.setdefault(moment, defaultdict(float))
            for part, count in parts_held.items():
                held[part] += times * count
    whole = {moment: {part: round(held[part]) for part in PARTS if part in held} for moment, held in peaks.items()}
    if KOLEO in whole:  # the one part that grows with the square of the batch
        whole[KOLEO]["similarities for KoLeo"] = 4 * (job.koleo_ranks * job.config.batch_size) ** 2
    return whole


def _few(count: int, instead: tuple[int, int]) -> int:
    """`count` itself, or the smaller of two numbers that are run instead of more."""
    return count if count <= instead[1] else instead[0]


def _depths(depth: int, blocks: int, micro_batches: int) -> list[tuple[float, int, int]]:
    """(times, blocks, micro-batches) of the steps that add up to one of `depth` blocks: each adds the same."""
    if blocks == depth:
        return [(1.0, blocks, micro_batches)]
    times = (depth - blocks) / (BLOCKS[1] - blocks)
    return [(1.0 - times, blocks, micro_batches), (times, BLOCKS[1], micro_batches)]


def _traced(job: Job, depth: int, micro_batches: int) -> dict[str, Parts]:
    """The peaks of a step of so many blocks and micro-batches, the last of which has most masked patches.

    DDP's buckets hold the gradients of all parameters throughout. Passes before the last micro-batch's leave gradients
    of their own besides.
    """
    trace = trace_job(job, depth, _masked(job, micro_batches))
    if job.strategy != "ddp":
        return trace.peaks
    peaks = trace.peaks if micro_batches > 1 else trace.peaks_without_gradients
    return {
        moment: {**parts, "gradients": parts.get("gradients", 0) + parts["student weights"]}
        for moment, parts in peaks.items()
    }


def _masked(job: Job, micro_batches: int) -> tuple[int, ...]:
    """Masked patches of each micro-batch: as many as chance makes likely in one, and in the whole batch."""
    whole = job.masked_patches(job.config.batch_size, worst=True)
    if micro_batches == 1:
        return (whole,)
    last = job.masked_patches(job.micro_batch_size, worst=True)
    other = max(0, whole - last) // (job.config.optim.accumulate - 1)
    return (*(other,) * (micro_batches - 1), last)


def operations_of(job: Job, worst: bool = False) -> Operations:
    """Operations of one image of this job; KoLeo's search, which depends on the whole batch, is `job.koleo_operations`.

    Every micro-batch takes as many.
    worst  with as many masked patches as memory allows for: of the steps that `memory_of` has run already
    """
    depth, parts = job.sizes.depth, _few(job.config.optim.accumulate, MICRO_BATCHES)
    masked = _masked(job, parts) if worst else (job.masked_patches(job.micro_batch_size),) * parts
    counts: dict[str, float] = defaultdict(float)
    for times, blocks, _ in _depths(depth, _few(depth, BLOCKS), parts):
        for kind, count in trace_job(job if worst else job.alone(), blocks, masked).operations.items():
            counts[kind] += times * count
    images = job.micro_batch_size * parts
    return Operations(**{name: counts[name] / images for name in Operations.__dataclass_fields__})
