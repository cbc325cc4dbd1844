"""Memory of one device during a training step, by part, and its operations: the step is run on fake tensors.

A step of a deep backbone is not run in full. Within a phase ("moment") of the step memory grows by the same amount with
each block and with each earlier micro-batch, so that steps of few blocks and micro-batches are extrapolated along both.
Operations are those of matrix products, a multiply-add as two: linear maps and attention, as they are executed. Norms,
activations and losses are left out (below one percent). Work that drop path skips is not counted, and neither is the
last FFN of tokens that no loss uses.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from dinoreg.data.loader import num_workers
from dinoreg.plan import devices
from dinoreg.plan.devices import GIB
from dinoreg.plan.job import Job
from dinoreg.plan.recorder import KOLEO, PARTS, STATE, TEACHER, Parts
from dinoreg.plan.trace import trace_job
from dinoreg.train.probes import BATCH_SIZE as PROBE_BATCH
from dinoreg.train.probes import MOST_IMAGES
from dinoreg.train.tutor import as_cut

# Bytes of state for each parameter: student, teacher, and AdamW's two moments.
STATE_BYTES = 16

# Blocks of the two steps that are run in place of a deeper one, and micro-batches in place of more.
BLOCKS = (3, 5)
MICRO_BATCHES = (2, 3)


@dataclass(frozen=True)
class Memory:
    """The memory of one device, in bytes.

    moments    {phase of a step, in order: {part: bytes} at its peak}
    peak       the phase with the largest peak
    context    the CUDA context, libraries and NCCL; on a CPU the process with its libraries
    fragments  allowance for fragmentation of the allocator's memory
    host       CPU memory of one process for crops that are prepared ahead
    saving     CPU memory of one process while a checkpoint is written
    probing    CPU memory for the probe's images and their features, on a CPU
    available  what a process may use of the device; 0: unknown
    on_cpu     whether the device is the CPU, where `host`, `saving` and `probing` are of the same memory
    """

    moments: dict[str, Parts]
    peak: str
    context: int
    fragments: int
    host: int
    saving: int
    probing: int
    available: int
    on_cpu: bool = False

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak, on CUDA `max_memory` in metrics.jsonl."""
        return sum(self.moments[self.peak].values())

    @property
    def needed(self) -> int:
        """Bytes that the device must have: tensors at the peak and allowances; on a CPU the peak of the process."""
        beside = self.host + self.saving + self.probing if self.on_cpu else 0
        return self.allocated + self.context + self.fragments + beside

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory; True where its memory is not known."""
        return self.available == 0 or self.needed <= self.available


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoints of a run.

    size     bytes of one training state, of all processes together
    teacher  bytes of the teacher file beside it
    kept     training states on the disk at the end, including the best
    every    steps between checkpoints
    seconds  to write one
    copy     bytes of CPU memory of a process for the copy of its share, to write it while training continues
    """

    size: int
    teacher: int
    kept: int
    every: int
    seconds: float
    copy: int


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a training step per image.

    student    backbone on all crops, forward and backward
    teacher    backbone on the global crops, for PaKA on undistorted ones, too
    heads      of student and teacher, and products of losses but KoLeo
    again      repeated or additional forward passes: recomputed blocks, an anchor, KoLeo's pass over micro-batches
    tutor      frozen network of `distill=` on the same crops
    attention  products with (T, T) matrices; included in the others
    """

    student: float
    teacher: float
    heads: float
    again: float
    tutor: float
    attention: float

    @property
    def total(self) -> float:
        """Floating-point operations of one image in all."""
        return self.student + self.teacher + self.heads + self.again + self.tutor


def memory_of(job: Job) -> Memory:
    """The memory of a device during a step of this job."""
    return memory_from(job, step_peaks(job))


def memory_from(job: Job, moments: dict[str, Parts]) -> Memory:
    """The memory of a job, from the peaks {phase: {part: bytes}} of its step."""
    cpu, peak = job.device.kind == "cpu", max(moments, key=lambda name: sum(moments[name].values()))
    passing = sum(size for part, size in moments[peak].items() if part not in STATE)
    checkpoint = checkpoint_of(job)
    host, saving = _crops_ahead(job), checkpoint.copy + checkpoint.teacher
    if cpu:
        workers = num_workers(job.config.data.workers, torch.device("cpu"))
        context = devices.PROCESS_GIB + devices.WORKER_GIB * workers
        passing += saving
        fragments = devices.CPU_FRAGMENTATION * passing + min(passing / 2, devices.SMALL_GIB * GIB)
    else:
        context = devices.CONTEXT_GIB + devices.NCCL_GIB * (job.world_size > 1)
        fragments = devices.gaps(passing)
    return Memory(
        moments=moments,
        peak=peak,
        context=int(GIB * context),
        fragments=int(fragments),
        host=host,
        saving=saving,
        probing=_probe_memory(job, moments) if cpu else 0,
        available=int(job.device.memory * (devices.FREE_SHARE if cpu else 1)),
        on_cpu=cpu,
    )


def _crops_ahead(job: Job) -> int:
    """Bytes of the crops of all batches that a process prepares ahead: bytes, and on a CPU the augmented floats."""
    config = job.config
    crops, _ = as_cut(job.sizes.tutor, config.crops, job.sizes.networks.backbone.patch_size)
    clean_size = config.loss.clean_size(crops.global_size) or 0
    pixels = 2 * (crops.global_size**2 + clean_size**2) + crops.num_local * crops.local_size**2
    each = 1 + 4 * (job.device.kind == "cpu")
    return (config.data.prefetch + 1) * config.batch_size * pixels * config.model.crop_channels * each


def _probe_memory(job: Job, moments: dict[str, Parts]) -> int:
    """Bytes that the probe inside a run needs on a CPU, little of which finds room in what a step has left.

    A batch of its images needs what as many global crops of the teacher do in a step (of a bag of channels, as many for
    each channel), and two copies of its pixels.
    """
    config, size = job.config, job.config.crops.global_size
    if config.probe.every == 0:
        return 0
    passing = sum(count for part, count in moments[TEACHER].items() if part not in STATE) * (config.model.bag_of or 1)
    pixels, images = config.model.in_channels * size**2, min(config.probe.num_images, PROBE_BATCH)
    kept = config.probe.num_images * (1 + (config.probe.general is not None)) * pixels
    kept += MOST_IMAGES * (config.probe.dense is not None) * pixels
    network = images * (passing / (2 * job.micro_batch_size) + 2 * 4 * pixels)
    return int(devices.PROBE_GIB * GIB + network) + kept


def checkpoint_of(job: Job, num_steps: int = 1, disk: float = 1.0) -> Checkpoint:
    """The checkpoints of a run of `num_steps`, written at `disk` GB/s by all processes together."""
    config, sizes, teacher = job.config, job.sizes, 4 * job.sizes.student
    anchor = sizes.parameters["backbone"] if config.loss.gram_weight > 0 else 0
    size = STATE_BYTES * sizes.student + 4 * (sizes.centers + anchor)
    # Each process writes its share of replicated tensors; shards are written by the processes that have them.
    shares = job.shard_size if job.strategy == "fsdp" else job.world_size
    return Checkpoint(
        size=size,
        teacher=teacher,
        kept=config.checkpoint.keep + 1,
        every=config.checkpoint.period(config.schedule.horizon or num_steps),
        seconds=(size + teacher) / (disk * 1e9),
        copy=size // shares * config.checkpoint.asynchronous,
    )


def step_peaks(job: Job) -> dict[str, Parts]:
    """The peaks {phase: {part: bytes}} of a full step, extrapolated from smaller steps where it is too large to run.

    DDP's buckets hold the gradients of all parameters throughout; before the last micro-batch there are separate
    gradients, too.
    """
    peaks: dict[str, dict[str, float]] = {}
    for times, blocks, micro_batches in _steps(job):
        for moment, parts_held in trace_job(job, blocks, _masked(job, micro_batches)).peaks.items():
            held = peaks.setdefault(moment, defaultdict(float))
            for part, count in parts_held.items():
                held[part] += times * count
            if job.strategy == "ddp":
                held["gradients"] += times * parts_held["student weights"]
    whole = {moment: {part: round(held[part]) for part in PARTS if part in held} for moment, held in peaks.items()}
    if KOLEO in whole:  # the one part that grows with the square of the batch
        whole[KOLEO]["similarities for KoLeo"] = 8 * (job.koleo_ranks * job.config.batch_size) ** 2
    return whole


def _steps(job: Job, add_up: bool = False) -> list[tuple[float, int, int]]:
    """(factor, blocks, micro-batches) of the steps whose weighted sum is a full one, the smallest of them first.

    add_up  whether what blocks need adds up over the micro-batches, as operations do and memory does not
    """
    depth, parts = job.sizes.depth, job.config.optim.accumulate
    blocks = depth if depth <= BLOCKS[1] else BLOCKS[0]
    few = parts if parts <= MICRO_BATCHES[1] else MICRO_BATCHES[0]
    deeper, more = (depth - blocks) / (BLOCKS[1] - BLOCKS[0]) * (parts / few if add_up else 1), parts - few
    steps = [(1.0 - deeper - more, blocks, few), (deeper, BLOCKS[1], few), (more, blocks, MICRO_BATCHES[1])]
    return [step for step in steps if step[0]]


def _masked(job: Job, micro_batches: int) -> tuple[int, ...]:
    """Masked patches of each micro-batch: the likely maximum in the last one, the rest of the batch's in the others."""
    whole = job.masked_patches(job.config.batch_size, worst=True)
    if micro_batches == 1:
        return (whole,)
    last = job.masked_patches(job.micro_batch_size, worst=True)
    other = max(0, whole - last) // (job.config.optim.accumulate - 1)
    return (*(other,) * (micro_batches - 1), last)


def operations_of(job: Job, worst: bool = False) -> Operations:
    """Operations of this job per image, without KoLeo's search, see `Job.koleo_operations`.

    worst  with the number of masked patches that `memory_of` assumes, whose steps have been run already
    """
    counts: dict[str, float] = defaultdict(float)
    for times, blocks, few in _steps(job, add_up=True):
        masked = _masked(job, few) if worst else (job.masked_patches(job.micro_batch_size),) * few
        for kind, count in trace_job(job, blocks, masked).operations.items():
            counts[kind] += times * count
    return Operations(**{name: counts[name] / job.config.batch_size for name in Operations.__dataclass_fields__})
