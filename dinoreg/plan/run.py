"""A plan: everything that can be known about a run before it starts, and whether it can run at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.config.load import BUDGETS, Config, load_config
from dinoreg.plan.advice import Remedy, remedies, smallest
from dinoreg.plan.devices import GIB, Device, cpu_device, find_device, local_device
from dinoreg.plan.job import Job, describe
from dinoreg.plan.memory import Memory, memory_of
from dinoreg.plan.operations import Check, check_operations
from dinoreg.plan.speed import Speed, estimate, probe, worth_probing
from dinoreg.plan.traffic import Collective, collectives
from dinoreg.runtime.errors import UserError

logger = logging.getLogger(__name__)

# Bytes of state for each parameter: student, teacher, and AdamW's two moments.
STATE_BYTES = 16
# Images of 500 x 375 pixels that one core decodes and crops in a second (docs/results/benchmarks.md).
IMAGES_PER_CORE = 480.0
# Memory and operations of KoLeo's search above these shares of a device or a step are worth a word.
KOLEO_SHARE = 0.05


@dataclass(frozen=True)
class Checkpoint:
    """What is written to disk.

    size        bytes of one training state, of all processes together
    teacher     bytes of the teacher file beside it
    kept        states on the disk in the end, the best included
    every       steps between them
    seconds     to write one at `disk` GB/s
    copy        bytes of CPU memory that a process needs to write while training goes on
    """

    size: int
    teacher: int
    kept: int
    every: int
    seconds: float
    copy: int


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    checks      operations by the formula against fvcore's count
    speed       of one process alone; None where nothing is known of the device
    exchanges   what processes send one another in a step
    num_steps   of the run            num_images  in the data set, where that is known
    advice      what to change when it does not fit, the best first
    notes       sentences
    """

    job: Job
    memory: Memory
    checks: tuple[Check, ...]
    speed: Speed | None
    exchanges: tuple[Collective, ...]
    checkpoint: Checkpoint
    num_steps: int
    num_images: int | None
    advice: tuple[Remedy, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def computing(self) -> float | None:
        """Seconds of a step on one device."""
        return None if self.speed is None else self.job.config.batch_size / self.speed.images_per_second

    @property
    def communicating(self) -> float:
        return sum(each.seconds(self.job.device) for each in self.exchanges)

    @property
    def hidden(self) -> float:
        """Of `communicating`, what can go on beside the computing."""
        return sum(each.seconds(self.job.device) for each in self.exchanges if each.hidden)

    @property
    def sent(self) -> int:
        """Bytes that one process sends in a step."""
        return sum(each.sent for each in self.exchanges)

    @property
    def step_seconds(self) -> float | None:
        """Of a step; data and checkpoints are not waited for."""
        computing = self.computing
        return None if computing is None else max(computing, self.hidden) + self.communicating - self.hidden

    @property
    def images_per_second(self) -> float | None:
        """Of all processes together."""
        seconds = self.step_seconds
        return None if seconds is None else self.job.global_batch_size / seconds

    @property
    def wall_seconds(self) -> float | None:
        seconds = self.step_seconds
        return None if seconds is None else self.num_steps * seconds

    @property
    def images_seen(self) -> int:
        return self.num_steps * self.job.global_batch_size

    @property
    def epochs(self) -> float | None:
        return None if self.num_images is None else self.images_seen / self.num_images

    @property
    def cores(self) -> float | None:
        """CPU cores that one process needs to keep its device fed."""
        rate = self.images_per_second
        return None if rate is None else rate / self.job.world_size / IMAGES_PER_CORE

    def as_dict(self) -> dict[str, Any]:
        """Every figure, fit for JSON. Bytes, seconds and operations are plain numbers."""
        job, sizes, memory, flops = self.job, self.job.sizes, self.memory, self.job.flops()
        config, encoder = job.config, sizes.encoder
        crops = {"global": config.crops.global_size} | (
            {"local": config.crops.local_size} if config.crops.num_local else {}
        )
        return {
            "job": {
                "model": config.model.name,
                "nodes": job.nodes,
                "gpus": job.gpus,
                "processes": job.world_size,
                "device": job.device.name,
                "strategy": job.strategy,
                "shard": job.shard_size,
                "precision": job.precision,
                "attention": job.backend,
                "batch_size": config.batch_size,
                "global_batch_size": job.global_batch_size,
                "accumulate": config.optim.accumulate,
                "checkpointing": config.model.checkpointing,
            },
            "fits": self.fits,
            "parameters": {
                "backbone": sizes.backbone,
                **{name: head.unit.parameters for name, head in sizes.heads.items()},
                "student": sizes.student,
                "teacher": sizes.student,
            },
            "tokens": {name: encoder.tokens(size) for name, size in crops.items()},
            "operations_per_image": {**dataclasses.asdict(flops), "total": flops.total},
            "operations_per_step": flops.total * job.global_batch_size + job.koleo_flops() * job.world_size,
            "operations_koleo": job.koleo_flops() * job.world_size,
            "checks": [dataclasses.asdict(check) | {"difference": check.difference} for check in self.checks],
            "memory": {
                "available": memory.available,
                "needed": memory.needed,
                "allocated": memory.allocated,
                "context": memory.context,
                "fragments": memory.fragments,
                "peak": memory.peak.name,
                "moments": {moment.name: {**moment.parts, "total": moment.total} for moment in memory.moments},
                "host_crops": memory.host,
                "host_checkpoint": self.checkpoint.copy,
            },
            "speed": None if self.speed is None else dataclasses.asdict(self.speed),
            "exchanges": [
                dataclasses.asdict(each) | {"sent": each.sent, "seconds": each.seconds(job.device)}
                for each in self.exchanges
            ],
            "links": {"local": job.device.local_link, "between": job.device.link},
            "step": {
                "computing": self.computing,
                "communicating": self.communicating,
                "hidden": self.hidden,
                "sent": self.sent,
                "seconds": self.step_seconds,
            },
            "run": {
                "steps": self.num_steps,
                "images": self.images_seen,
                "epochs": self.epochs,
                "images_per_second": self.images_per_second,
                "seconds": self.wall_seconds,
                "cores_per_process": self.cores,
            },
            "checkpoint": dataclasses.asdict(self.checkpoint),
            "advice": [
                {"overrides": remedy.overrides, "needed": remedy.memory.needed, "slower": remedy.slower}
                for remedy in self.advice
            ],
            "notes": list(self.notes),
        }

    def write(self, path: str | Path) -> Path:
        """Every figure to a JSON file; UserError where it cannot be written."""
        path = Path(path)
        try:
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"out={path}: cannot be written ({error.strerror})") from None
        return path


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
    for key, value in (("nodes", nodes), ("gpus", gpus), ("num_images", num_images)):
        if value is not None and value < 1:
            raise UserError(f"{key}={value}: expected at least 1")
    figures = (("memory", memory), ("link", link), ("local_link", local_link), ("disk", disk))
    for key, figure in (*figures, ("utilisation", utilisation)):
        if figure is not None and not (figure > 0 and math.isfinite(figure)):
            raise UserError(f"{key}={figure:g}: expected a positive number")
    if utilisation is not None and utilisation > 1:
        raise UserError(f"utilisation={utilisation:g}: expected a share of the peak in (0, 1]")
    notes: list[str] = []
    nodes, gpus, device, here = _machines(config, nodes, gpus, gpu, memory)
    if gpu is None and not here:
        notes.append(f"No gpu= was given and none is here: {device.name} is assumed.")
    if link is not None or local_link is not None:
        device = dataclasses.replace(device, link=link or device.link, local_link=local_link or device.local_link)
    job = describe(config, nodes, gpus, device)
    if all(getattr(config, key) is None for key in BUDGETS):
        raise UserError("no budget: give one of steps=, images= or epochs=")
    num_images = num_images or _count_images(config, notes)
    if config.epochs is not None and num_images is None:
        raise UserError(f"epochs={config.epochs:g}: the data are not here to be counted; give num_images=, or steps=")
    num_steps = config.num_steps(num_images or 1, job.world_size)

    needed = memory_of(job)
    advice: tuple[Remedy, ...] = ()
    if not needed.fits:
        advice = tuple(remedies(job))
        if not advice:
            _refuse(job)
    speed = _speed(job, needed, here, probe, utilisation, notes)
    checks = tuple(check_operations(job))
    _remarks(job, needed, checks, speed, num_images, notes)
    return Plan(
        job=job,
        memory=needed,
        checks=checks,
        speed=speed,
        exchanges=tuple(collectives(job)),
        checkpoint=_checkpoint(job, num_steps, disk),
        num_steps=num_steps,
        num_images=num_images,
        advice=advice,
        notes=tuple(notes),
    )


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

    if wanted and not here:
        raise UserError(f"probe=true: there is no {job.device.name} here to measure on; leave probe= out")
    if wanted and not needed.fits:
        notes.append("Nothing was measured: the run does not fit as it is.")
    elif here and (wanted or (wanted is None and utilisation is None and worth_probing(job))):
        kind = torch.device("cuda", torch.cuda.current_device()) if job.device.kind == "cuda" else torch.device("cpu")
        measured = probe(job, kind)
        if measured is not None:
            return measured
        notes.append("The probe ran out of memory; the speed is an estimate.")
    return estimate(job, utilisation)


def _remarks(
    job: Job,
    needed: Memory,
    checks: tuple[Check, ...],
    speed: Speed | None,
    num_images: int | None,
    notes: list[str],
) -> None:
    """What one should know besides the figures."""
    config = job.config
    for check in checks:
        if not check.agrees:
            notes.append(
                f"Operations of the {check.name}: the formula says {check.formula / 1e9:.2f} G, fvcore counts "
                f"{check.counted / 1e9:.2f} G ({check.difference:+.1%}): do not trust the figures above"
            )
    if num_images is not None and job.global_batch_size > num_images:
        notes.append(f"A step of {job.global_batch_size} images sees some of the {num_images} more than once.")
    if int(2 * job.global_batch_size * config.mask.probability) == 0 and config.loss.ibot_weight > 0:
        notes.append("No crop of a step gets a mask: the patches' loss is 0. Raise batch_size or mask.probability.")
    images = job.koleo_ranks * config.batch_size
    pairs, share = 4 * images**2, job.koleo_flops() / (job.flops().total * config.batch_size)
    if config.loss.koleo_weight > 0 and (share > KOLEO_SHARE or pairs > KOLEO_SHARE * max(1, job.device.memory)):
        notes.append(
            f"KoLeo compares {images} images with one another: {pairs / GIB:.1f} GiB and {share:.0%} of a step's "
            "operations; loss.koleo_ranks= searches in groups of processes"
        )
    if config.model.compile:
        notes.append("model.compile: activations shrink and steps get faster by what no formula here tells")
    if config.init is not None and config.adapt.heads > 0:
        notes.append(f"The first {config.adapt.heads:.0%} of the steps leave the backbone frozen and are cheaper.")
    if speed is not None and speed.peak_memory:
        # What one process held, beside what the formula says of one process.
        from dinoreg.plan.speed import alone

        told = memory_of(alone(job)).allocated
        notes.append(
            f"The probe allocated {speed.peak_memory / GIB:.2f} GiB, the formula says {told / GIB:.2f} "
            f"({told / speed.peak_memory - 1:+.1%})."
        )


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
