"""Making a plan: what a run will cost, or in one line why it cannot run at all."""

import dataclasses
import math
from pathlib import Path

from dinoreg.config.load import BUDGETS, Config, load_config
from dinoreg.plan.advice import remedies, smallest
from dinoreg.plan.devices import GIB, Device, cpu_device, find_device, local_device
from dinoreg.plan.job import Job, describe
from dinoreg.plan.memory import Memory, memory_of
from dinoreg.plan.operations import Operations, operations_of
from dinoreg.plan.result import Checkpoint, Plan
from dinoreg.plan.speed import Speed, alone, estimate, probe, worth_probing
from dinoreg.plan.traffic import collectives
from dinoreg.runtime.errors import UserError

# Bytes of state for each parameter: student, teacher, and AdamW's two moments.
STATE_BYTES = 16
# Memory and operations of KoLeo's search above these shares of a device or a step are worth a word.
KOLEO_SHARE = 0.05


def plan(
    config: Config | str | Path,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    memory: float | None = None,
    link: float | None = None,
    local_link: float | None = None,
    utilisation: float | None = None,
    num_images: int | None = None,
    disk: float = 1.0,
    probe: bool | None = None,
) -> Plan:
    """What a run of `config` will cost.

    config       a Config, or a name or path that `load_config` takes
    nodes, gpus  machines, and devices of each. With none of nodes, gpus, gpu and memory the plan is for one process on
                 this machine; else for 1 machine of 8 devices
    gpu          a name of the table in `devices`; None: the kind that is here, else h100
    memory       GiB of a device; None: what that device has
    link, local_link  GB/s a device sends to other machines and to its neighbours, as stated by the maker
    utilisation  share of the device's peak that is assumed where nothing is measured; None: by the model's width
    num_images   in the data set; None: counted where data= is here
    disk         GB/s at which all processes together write a checkpoint
    probe        run a few real steps; None: on CUDA where the run fits one device, on a CPU where it takes seconds
    raises       UserError for a job that cannot run, in one line
    """
    config = config if isinstance(config, Config) else load_config(config)
    _check_whole(nodes=nodes, gpus=gpus, num_images=num_images)
    _check_positive(memory=memory, link=link, local_link=local_link, disk=disk, utilisation=utilisation)
    if utilisation is not None and utilisation > 1:
        raise UserError(f"utilisation={utilisation:g}: expected a share of the peak in (0, 1]")
    notes: list[str] = []
    nodes, gpus, device, here = _machines(config, nodes, gpus, gpu, memory)
    if probe and not here:
        raise UserError(f"probe=true: there is no {device.name} here to measure on; leave probe= out")
    if gpu is None and not here:
        notes.append(f"No gpu= was given and none is here: {device.name} is assumed.")
    device = dataclasses.replace(device, link=link or device.link, local_link=local_link or device.local_link)
    job = describe(config, nodes, gpus, device)
    num_steps, num_images = _length(job, num_images, notes)
    needed, operations = memory_of(job), operations_of(job)
    advice = () if needed.fits else tuple(remedies(job))
    if not needed.fits and not advice:
        _refuse(job)
    speed = _speed(job, needed, here, probe, utilisation, notes)
    notes += _remarks(job, operations, speed, num_images)
    return Plan(
        job=job,
        memory=needed,
        operations=operations,
        speed=speed,
        exchanges=tuple(collectives(job)),
        checkpoint=_checkpoint(job, num_steps, disk),
        num_steps=num_steps,
        num_images=num_images,
        advice=advice,
        notes=tuple(notes),
    )


def _length(job: Job, num_images: int | None, notes: list[str]) -> tuple[int, int | None]:
    """Steps of the run, and images of the data set where they are known."""
    config = job.config
    if all(getattr(config, key) is None for key in BUDGETS):
        raise UserError("no budget: give one of steps=, images= or epochs=")
    num_images = num_images or _count_images(config, notes)
    if config.epochs is not None and num_images is None:
        raise UserError(f"epochs={config.epochs:g}: the data are not here to be counted; give num_images=, or steps=")
    return config.num_steps(num_images or 1, job.world_size), num_images


def _check_whole(**values: int | None) -> None:
    for key, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{key}={value}: expected at least 1")


def _check_positive(**values: float | None) -> None:
    for key, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{key}={value:g}: expected a positive number")


def _machines(
    config: Config, nodes: int | None, gpus: int | None, gpu: str | None, memory: float | None
) -> tuple[int, int, Device, bool]:
    """Machines, devices of each, what they are, and whether such a one is here."""
    import torch

    cuda = torch.cuda.is_available()
    if config.device == "cpu" or config.device == "mps":
        if gpu is not None:
            raise UserError(f"gpu={gpu}: the config says device={config.device}; give one of the two")
        device = cpu_device()
        bytes_each = device.memory // (gpus or 1) if memory is None else int(memory * GIB)
        return nodes or 1, gpus or 1, dataclasses.replace(device, memory=bytes_each), True
    alone = nodes is None and gpus is None and gpu is None and memory is None
    if alone and (cuda or not config.device.startswith("cuda")):
        return 1, 1, local_device(), True
    here = gpu is None and cuda
    device = find_device(gpu or "h100") if not here else local_device()
    if gpu is not None and cuda:
        found = local_device()
        here = found.peaks == device.peaks and abs(found.memory - device.memory) < 2 * GIB
    if memory is not None:
        device = dataclasses.replace(device, memory=int(memory * GIB))
    return nodes or 1, gpus or 8, device, here


def _count_images(config: Config, notes: list[str]) -> int | None:
    """Images of data=, or None with a word on why they could not be counted."""
    if config.data.source is None:
        return None
    from dinoreg.data.open import open_source

    try:
        source = open_source(
            config.data.source, weights=config.data.weights, root=config.data.root, index_dir=config.data.index_dir
        )
    except UserError as error:
        notes.append(f"The images could not be counted here: {error}")
        return None
    return len(source)


def _refuse(job: Job) -> None:
    least = smallest(job)
    raise UserError(
        f"does not fit: {memory_of(job).needed / GIB:.1f} GiB a device as it is, "
        f"{least.memory.needed / GIB:.1f} GiB with {least}, and a {job.device.name} has "
        f"{job.device.memory / GIB:.1f} GiB; use a larger device"
        + (", or more of them" if job.strategy == "fsdp" or job.world_size == 1 else "")
    )


def _speed(
    job: Job, needed: Memory, here: bool, wanted: bool | None, utilisation: float | None, notes: list[str]
) -> Speed | None:
    import torch

    if wanted and not needed.fits:
        notes.append("Nothing was measured: the run does not fit as it is.")
    elif here and (wanted or (wanted is None and utilisation is None and worth_probing(job))):
        kind = torch.device("cuda", torch.cuda.current_device()) if job.device.kind == "cuda" else torch.device("cpu")
        measured = probe(job, kind)
        if measured is not None:
            return measured
        notes.append("The probe ran out of memory; the speed is an estimate.")
    return estimate(job, utilisation)


def _remarks(job: Job, operations: Operations, speed: Speed | None, num_images: int | None) -> list[str]:
    """What one should know besides the figures."""
    config, notes = job.config, []
    if num_images is not None and job.global_batch_size > num_images:
        notes.append(f"A step of {job.global_batch_size} images sees some of the {num_images} more than once.")
    if int(2 * job.global_batch_size * config.mask.probability) == 0 and config.loss.ibot_weight > 0:
        notes.append("No crop of a step gets a mask: the patches' loss is 0. Raise batch_size or mask.probability.")
    images = job.koleo_ranks * config.batch_size
    pairs, share = 4 * images**2, job.koleo_operations() / (operations.total * config.batch_size)
    if config.loss.koleo_weight > 0 and (share > KOLEO_SHARE or pairs > KOLEO_SHARE * max(1, job.device.memory)):
        notes.append(
            f"KoLeo compares {images} images with one another: {pairs / GIB:.1f} GiB and {share:.0%} of a step's "
            "operations; loss.koleo_ranks= searches in groups of processes"
        )
    if config.model.compile:
        notes.append("model.compile: activations shrink and steps get faster by what this plan does not know")
    if config.init is not None and config.adapt.heads > 0:
        notes.append(f"The first {config.adapt.heads:.0%} of the steps leave the backbone frozen and are cheaper.")
    if speed is not None and speed.peak_memory:
        expected = memory_of(alone(job)).allocated  # what was measured is one process
        notes.append(
            f"The probe allocated {speed.peak_memory / GIB:.2f} GiB, the plan says {expected / GIB:.2f} "
            f"({expected / speed.peak_memory - 1:+.1%})."
        )
    return notes


def _checkpoint(job: Job, num_steps: int, disk: float) -> Checkpoint:
    config = job.config
    centers = 4 * sum(head.prototypes for head in job.sizes.heads.values()) * (1 if len(job.sizes.heads) > 1 else 2)
    size = STATE_BYTES * job.sizes.student + centers
    teacher = 4 * job.sizes.student
    return Checkpoint(
        size=size,
        teacher=teacher,
        kept=config.checkpoint.keep + 1,
        every=config.checkpoint.every or min(2000, max(1, num_steps // 10)),
        seconds=(size + teacher) / (disk * 1e9),
        # Of what is equal everywhere each process writes its share; shards are written by all that hold them.
        copy=size // (job.shard_size if job.strategy == "fsdp" else job.world_size) * config.checkpoint.asynchronous,
    )
