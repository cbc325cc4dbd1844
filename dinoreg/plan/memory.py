"""Memory of one device through a training step, by part: the step is run on fake tensors and followed.

A step of a deep backbone is not run whole. Within a moment of the step memory grows by the same amount with each block,
and with each micro-batch that comes before, so that a step of few blocks and micro-batches is extended along both.
"""

from dataclasses import dataclass

from dinoreg.plan.devices import CONTEXT_GIB, FRAGMENTATION, GIB, NCCL_GIB
from dinoreg.plan.job import Job
from dinoreg.plan.recorder import KOLEO, PARTS, Parts
from dinoreg.plan.trace import trace_job

# What stays from step to step: the rest comes and goes, and leaves gaps.
LASTING = ("student weights", "teacher weights", "anchor weights", "AdamW moments")
# Blocks of the two steps that are run in place of a deeper one, and micro-batches in place of more.
BLOCKS = (3, 5)
MICRO_BATCHES = (2, 3)


@dataclass(frozen=True)
class Moment:
    """What a device holds at the peak of one moment of a step: {part: bytes}."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes.

    moments    of a step, in their order
    context    allowance for the CUDA context, libraries and NCCL
    fragments  allowance for what the allocator cannot use
    host       pinned (or plain) CPU memory of one process for crops that are prepared ahead
    available  what the device has; 0: not known
    """

    moments: tuple[Moment, ...]
    context: int
    fragments: int
    host: int
    available: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def allocated(self) -> int:
        """Tensors at the peak: what `max_memory` in metrics.jsonl shows."""
        return self.peak.total

    @property
    def needed(self) -> int:
        return self.allocated + self.context + self.fragments

    @property
    def fits(self) -> bool:
        return self.available == 0 or self.needed <= self.available


def memory_of(job: Job) -> Memory:
    """What a device holds through a step of this job."""
    moments = tuple(Moment(name, parts) for name, parts in step_peaks(job).items())
    peak = max(moments, key=lambda moment: moment.total)
    cuda = job.device.kind == "cuda"
    passing = sum(size for part, size in peak.parts.items() if part not in LASTING)
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
    blocks = depth if depth <= BLOCKS[1] else BLOCKS[0]
    micro_batches = parts if parts <= MICRO_BATCHES[1] else MICRO_BATCHES[0]
    start = _traced(job, blocks, micro_batches)
    slopes = []
    if blocks < depth:
        slopes.append(((depth - blocks) / (BLOCKS[1] - blocks), _traced(job, BLOCKS[1], micro_batches)))
    if micro_batches < parts:
        slopes.append((parts - micro_batches, _traced(job, blocks, MICRO_BATCHES[1])))
    peaks = {}
    for moment, bytes_of in start.items():
        names = {part for _, more in slopes for part in more[moment]} | set(bytes_of)
        peaks[moment] = {
            part: round(
                bytes_of.get(part, 0)
                + sum(times * (more[moment].get(part, 0) - bytes_of.get(part, 0)) for times, more in slopes)
            )
            for part in PARTS
            if part in names
        }
    if KOLEO in peaks:  # the one part that grows with the square of the batch
        peaks[KOLEO]["similarities for KoLeo"] = 4 * (job.koleo_ranks * job.config.batch_size) ** 2
    return peaks


def _traced(job: Job, depth: int, micro_batches: int) -> dict[str, Parts]:
    """The peaks of a step of so many blocks and micro-batches, the last of which has most masked patches.

    DDP's buckets hold the gradients of all parameters throughout. Passes before the last micro-batch's leave gradients
    of their own besides.
    """
    split = micro_batches > 1
    trace = trace_job(job, depth, _masked(job, micro_batches))
    if job.strategy != "ddp":
        return trace.peaks
    peaks = trace.peaks if split else trace.peaks_without_gradients
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
