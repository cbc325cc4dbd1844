"""Making a plan: the cost of a run, or a one-line error when it cannot run at all."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dinoreg.config.load import BUDGETS, Config, load_config
from dinoreg.config.option import keys_of, read
from dinoreg.config.plan_options import PlanOptions
from dinoreg.data.loader import num_workers, seconds_per_image
from dinoreg.data.open import open_source
from dinoreg.data.source import ScenesSource, Source
from dinoreg.plan.advice import remedies, smallest
from dinoreg.plan.devices import GIB, Device, cpu_device, find_device, local_device
from dinoreg.plan.job import Job, describe
from dinoreg.plan.memory import Memory, Operations, checkpoint_of, memory_of, operations_of
from dinoreg.plan.result import Plan, Run, Stage
from dinoreg.plan.speed import Speed, estimate, probe, worth_probing
from dinoreg.plan.traffic import Step, collectives, step_of
from dinoreg.runtime.environment import busy, usable_cores
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.templates import render
from dinoreg.train.tutor import views_of

# Images of 500 x 375 pixels that one core decodes and crops in a second (docs/results/benchmarks.md).
IMAGES_PER_CORE = 480.0
# Memory and operations of KoLeo's search above these shares of a device or a step are worth a word.
KOLEO_SHARE = 0.05


def plan(config: Config | str | Path, **keys: Any) -> Plan:
    """Predict the cost of a run; the same as `dinoreg plan CONFIG key=value …`.

    config   a name in `configs/`, a YAML file or a run folder; or a Config, which has its keys already
    keys     the command line's: data="photos/", batch_size=32, nodes=2, gpus=8, out="plan.json",
             **{"parallel.strategy": "fsdp"}. Without nodes, gpus, gpu and memory the plan is for one process on this
             machine, otherwise by default for 1 machine with 8 devices
    returns  the figures; `.verdict` is a sentence, `.fits`, `.advice` and `.as_dict()` the rest
    raises   UserError (a ValueError), in one line, for invalid keys, for a job that cannot run, for one that no change
             makes fit, and where `out` cannot be written
    """
    notes: list[str] = []
    own = {key: keys.pop(key) for key in [*keys] if isinstance(config, Config) or key in keys_of(PlanOptions)}
    options, _ = read(PlanOptions, own)
    config = config if isinstance(config, Config) else load_config(config, keys)
    nodes, gpus, device, here = _machines(config, options)
    if options.probe and not here:
        raise UserError(f"probe=true: there is no {device.name} here to measure on; leave probe= out")
    if options.gpu is None and not here:
        notes.append(f"No gpu= was given and none is here: {device.name} is assumed.")
    links = {name: value for name in ("link", "local_link") if (value := getattr(options, name)) is not None}
    source = _open(config, notes)
    num_images = options.num_images or (None if source is None else len(source))
    if num_images is not None and config.probe.data is None:  # it takes some of them
        config = replace(config, probe=replace(config.probe, num_images=min(config.probe.num_images, num_images)))
    job = describe(config, nodes, gpus, replace(device, **links))
    num_steps = _length(job, num_images)
    jobs = _in_stages(job, num_steps)
    memories = [memory_of(each) for each, _ in jobs]
    needed, job = max(zip(memories, (each for each, _ in jobs)), key=lambda pair: pair[0].needed)
    advice = () if needed.fits else tuple(remedies(job))
    if not needed.fits and not advice:
        _refuse(job)
    stages = []
    for (each, steps), memory in zip(jobs, memories):
        speed, loading = _speed(each, memory, here, options, notes), _loading(each, source, notes)
        stages.append(Stage(each, steps, memory, operations_of(each), speed, loading))
    operations, speed, loading = _means(stages, next(stage.speed for stage in stages if stage.job is job))
    notes += _remarks(job, operations, speed, here)
    step = step_of(job, None if speed is None else config.batch_size / speed.images_per_second)
    found = Plan(
        job=job,
        memory=needed,
        operations=operations,
        speed=speed,
        exchanges=tuple(collectives(job)),
        step=step,
        run=_run(job, step, num_steps, num_images, loading, here),
        checkpoint=checkpoint_of(job, num_steps, options.disk),
        num_images=num_images,
        advice=advice,
        notes=tuple(dict.fromkeys(notes)),
        stages=tuple(stages),
    )
    if options.out is not None:
        found.write(options.out)
    return found


def _in_stages(job: Job, num_steps: int) -> list[tuple[Job, int]]:
    """(job with the crops of a stage, its steps) for each stage of the run; a run of one size has one."""
    crops = job.config.stages(num_steps)
    return [
        (replace(job, config=replace(job.config, crops=crops[first])), end - first)
        for first, end in itertools.pairwise([*crops, num_steps])
    ]


def _means(stages: Sequence[Stage], speed: Speed | None) -> tuple[Operations, Speed | None, float | None]:
    """Operations and speed of an image, and seconds to load it: means over all steps; None where one is unknown.

    speed  of the stage that the plan is about, whose other figures are kept
    """
    shares = [stage.steps / sum(each.steps for each in stages) for stage in stages]
    kinds = Operations.__dataclass_fields__
    operations = {
        kind: sum(share * getattr(stage.operations, kind) for share, stage in zip(shares, stages)) for kind in kinds
    }
    speeds = [stage.speed.images_per_second for stage in stages if stage.speed is not None]
    loading = [stage.loading for stage in stages if stage.loading is not None]
    if speed is not None:
        speed = replace(speed, images_per_second=1 / sum(share / each for share, each in zip(shares, speeds)))
    mean = sum(share * each for share, each in zip(shares, loading))
    return Operations(**operations), speed, mean if len(loading) == len(stages) else None


def _length(job: Job, num_images: int | None) -> int:
    """Steps of the run; UserError without a budget, or for epochs of an unknown number of images."""
    config = job.config
    if all(getattr(config, key) is None for key in BUDGETS):
        raise UserError("no budget: give one of steps=, images= or epochs=")
    if config.epochs is not None and num_images is None:
        raise UserError(f"epochs={config.epochs:g}: the data are not here to be counted; give num_images=, or steps=")
    return config.num_steps(num_images or 1, job.world_size)


def _machines(config: Config, options: PlanOptions) -> tuple[int, int, Device, bool]:
    """(number of machines, devices of each, the device, whether this machine has such a device)."""
    nodes, gpus, gpu, memory = options.nodes, options.gpus, options.gpu, options.memory
    cuda = torch.cuda.is_available()
    if config.device in ("cpu", "mps"):
        if gpu is not None:
            raise UserError(f"gpu={gpu}: the config says device={config.device}; give one of the two")
        device, here = cpu_device(), True
        nodes, gpus = nodes or 1, gpus or 1
        device = replace(device, memory=device.memory // gpus)
    elif (nodes, gpus, gpu, memory) == (None,) * 4 and (cuda or not config.device.startswith("cuda")):
        nodes, gpus, device, here = 1, 1, local_device(), True
    else:
        nodes, gpus = nodes or 1, gpus or 8
        device = local_device() if gpu is None and cuda else find_device(gpu or "h100")
        here = cuda and (gpu is None or _is_here(device))
    return nodes, gpus, device if memory is None else replace(device, memory=int(memory * GIB)), here


def _is_here(device: Device) -> bool:
    found = local_device()
    return found.peaks == device.peaks and abs(found.memory - device.memory) < 2 * GIB


def _open(config: Config, notes: list[str]) -> Source | None:
    """The images of data=, or None and a note on why they cannot be opened."""
    if config.data.source is None:
        return None
    try:
        data, source = config.data, config.data.source
        return open_source(source, data.weights, data.index_dir, data.root, data.range, data.columns)
    except UserError as error:
        notes.append(f"The images could not be counted here: {error}")
        return None


def _loading(job: Job, source: Source | None, notes: list[str]) -> float | None:
    """Seconds in which a core of this machine prepares an image of the source; None where there are no files."""
    if source is None or isinstance(source, ScenesSource):
        return None
    any_pixels = replace(job.config.augment, mean=(0.5,), std=(0.25,))  # which the run will measure
    config = replace(job.config, augment=any_pixels)
    try:
        views = views_of(config, config.crops, job.sizes.networks.backbone.patch_size, job.sizes.tutor)
        return seconds_per_image(source, views, config.data, augmented=job.device.kind == "cpu")
    except (UserError, RunError) as error:
        notes.append(f"No image could be loaded here: {error}")
        return None


def _refuse(job: Job) -> None:
    least = smallest(job)
    raise UserError(
        f"does not fit: {memory_of(job).needed / GIB:.1f} GiB a device as it is, "
        f"{least.memory.needed / GIB:.1f} GiB with {least}, and {job.device.name} has "
        f"{least.memory.available / GIB:.1f} GiB{' to spare' if least.memory.on_cpu else ''}; use a larger device"
        + (", or more of them" if job.strategy == "fsdp" or job.world_size == 1 else "")
    )


def _speed(job: Job, needed: Memory, here: bool, options: PlanOptions, notes: list[str]) -> Speed | None:
    wanted = options.probe
    if wanted and not needed.fits:
        notes.append("Nothing was measured: the run does not fit as it is.")
    elif here and (wanted or (wanted is None and options.utilisation is None and worth_probing(job))):
        kind = torch.device("cuda", torch.cuda.current_device()) if job.device.kind == "cuda" else torch.device("cpu")
        measured = probe(job, kind)
        if measured is not None:
            return measured
        notes.append("The probe ran out of memory; the speed is an estimate.")
    return estimate(job, options.utilisation)


def _run(job: Job, step: Step, num_steps: int, num_images: int | None, loading: float | None, here: bool) -> Run:
    images = num_steps * job.global_batch_size
    epochs = None if num_images is None else images / num_images
    if step.seconds is None:
        return Run(num_steps, images, epochs, None, None, None, loading)
    seconds, waiting = step.seconds, None
    if loading is not None and here:
        seconds = job.config.batch_size * loaded(job, step.seconds / job.config.batch_size, loading)
        waiting = 1 - step.seconds / seconds
    rate = job.global_batch_size / step.seconds
    cores = rate / job.world_size * (loading or 1 / IMAGES_PER_CORE)
    return Run(num_steps, images, epochs, job.global_batch_size / seconds, num_steps * seconds, cores, loading, waiting)


def loaded(job: Job, computing: float, loading: float) -> float:
    """Seconds of an image on one process of this machine, whose workers prepare the next ones meanwhile.

    computing  seconds of an image in a step; on a CPU that keeps all cores busy, so that preparing comes on top
    loading    seconds of a core
    """
    cores, processes = usable_cores(), job.gpus
    workers = min(num_workers(job.config.data.workers, torch.device(job.device.kind)) or 1, cores / processes)
    shared = computing + loading * processes / cores if job.device.kind == "cpu" else computing
    return max(shared, loading / workers)


def _remarks(job: Job, operations: Operations, speed: Speed | None, here: bool) -> list[str]:
    """Remarks for the user, one sentence each; `here`: the speed was timed on this machine."""
    config = job.config
    measured = None if speed is None else speed.peak_memory
    text = render(
        "plan/templates/notes.txt.j2",
        job=job,
        config=config,
        busy=busy() if here and job.device.kind == "cpu" else "",
        no_masks=config.distill is None and int(2 * job.global_batch_size * config.mask.probability) == 0,
        pairs=4 * (job.koleo_ranks * config.batch_size) ** 2,
        share=job.koleo_operations() / (operations.total * config.batch_size),
        measured=measured,
        expected=memory_of(job.alone()).allocated if measured else None,  # what was measured is one process
        KOLEO_SHARE=KOLEO_SHARE,
        GIB=GIB,
    )
    return text.splitlines()
