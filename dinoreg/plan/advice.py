"""What to change when a job does not fit: the fewest overrides under which it does, found by trying them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dinoreg.config.load import Config
from dinoreg.config.option import build, flat
from dinoreg.plan.job import Job, describe
from dinoreg.plan.memory import Memory, memory_from, memory_of, operations_of
from dinoreg.plan.recorder import PARTS, STATE, TEACHER, WORKING
from dinoreg.plan.traffic import step_of

# In order of preference: the first ones change where tensors are stored, the others the training itself.
HARMLESS = ("parallel.strategy", "parallel.reshard", "optim.accumulate", "model.checkpointing")
OTHERS = ("loss.koleo_ranks", "batch_size")
FEW_IMAGES = 4  # a micro-batch below this is a last resort
# What the seconds of an exchange between machines are worth where no device's speed is known.
_ASSUMED_FLOPS = 1e14


@dataclass(frozen=True)
class Remedy:
    """Overrides, the memory that the job needs with them, and the relative increase of the time per image.

    slower  0.25 means 25 % more time, estimated from operations and traffic; negative means less
    """

    overrides: dict[str, Any]
    memory: Memory
    slower: float

    def __str__(self) -> str:
        return " ".join(f"{key}={value}".lower() for key, value in self.overrides.items())


def remedies(job: Job, most: int = 3) -> list[Remedy]:
    """Up to `most` sets of as few overrides as possible with which the job fits, the best first; [] where none does.

    Micro-batches of a few images underuse a device, and a smaller batch or another group for KoLeo changes the
    training: these are tried only when nothing else is enough.
    """
    batch, too_large = job.config.batch_size, [job]

    def fits(overrides: dict[str, Any]) -> bool:
        changed = change(job, overrides)
        if any(_rules_out(other, changed) for other in too_large):
            return False
        if not memory_of(changed).fits:
            too_large.append(changed)
            return False
        return True

    for extra, fewest in ((0, FEW_IMAGES), (0, 1), (1, 1), (2, 1)):
        for count in range(len(HARMLESS) + 1):
            mildest = [
                next(filter(fits, choices(job, (*keys, *more), fewest)), None)
                for keys in itertools.combinations(HARMLESS, count)
                for more in itertools.combinations(OTHERS, extra)
            ]
            found = [_remedy(job, overrides) for overrides in mildest if overrides]
            if found:  # those that leave the batch as it is first
                return sorted(found, key=lambda each: (-each.overrides.get("batch_size", batch), each.slower))[:most]
    return []


def smallest(job: Job) -> Remedy:
    """All overrides together, with a single image per process: the least memory that the job can need."""
    overrides: dict[str, Any] = {"model.checkpointing": True, "batch_size": 1, "optim.accumulate": 1}
    if job.world_size > 1:
        overrides |= {"parallel.strategy": "fsdp", "parallel.reshard": True, "loss.koleo_ranks": 1}
    return _remedy(job, overrides)


def _remedy(job: Job, overrides: dict[str, Any]) -> Remedy:
    changed = change(job, overrides)
    return Remedy(overrides, memory_of(changed), _seconds(changed) / _seconds(job) - 1)


def _rules_out(job: Job, other: Job) -> bool:
    """Whether `other` cannot fit because `job` does not, by lower bounds on every part of its memory.

    Memory of images shrinks at most with their number, less one that drop path may round off.
    """
    before, after = job.config, other.config
    if after.optim.accumulate == 1 < before.optim.accumulate:  # which has moments of its own
        return False
    images = max(0, other.micro_batch_size - (after.model.drop_path > 0)) / job.micro_batch_size
    left = dict.fromkeys(PARTS, min(1.0, images))
    left["crops"] = min(1.0, after.batch_size / before.batch_size)
    pairs = other.koleo_ranks * after.batch_size / (job.koleo_ranks * before.batch_size)
    left["similarities for KoLeo"] = min(1.0, pairs**2)
    left |= dict.fromkeys((*STATE, "gradients"), job.shard_size / other.shard_size)
    left |= dict.fromkeys(("weights in low precision", "gathered weights"), 1.0)
    if other.strategy != job.strategy:
        left["weights in low precision"] = left[WORKING] = 0.0
    if other.strategy == "fsdp" and after.parallel.reshard > before.parallel.reshard:
        left["gathered weights"] = left[WORKING] = 0.0
    if after.model.checkpointing > before.model.checkpointing:
        left["activations of the backbone"] = left["weights in low precision"] = left[WORKING] = 0.0
    targets = {**left, "logits and targets": left["crops"]}  # computed for the full batch, however it is divided
    peaks = {
        moment: {part: int((targets if moment == TEACHER else left)[part] * size) for part, size in held.items()}
        for moment, held in memory_of(job).moments.items()
    }
    return not memory_from(other, peaks).fits


def choices(job: Job, keys: tuple[str, ...], fewest: int) -> Iterator[dict[str, Any]]:
    """All overrides of exactly these keys that save memory, the mildest first; the last key varies most slowly.

    fewest  smallest number of images of a micro-batch
    """
    if not keys:
        yield {}
        return
    *earlier, key = keys
    for value in _values(job, key, fewest):
        for choice in choices(change(job, {key: value}), tuple(earlier), fewest):
            yield {key: value, **choice}


def _values(job: Job, key: str, fewest: int) -> list[Any]:
    """Values of a key that need less memory than the job's own, the mildest first.

    fewest  smallest number of images of a micro-batch
    """
    config, batch = job.config, job.config.batch_size
    parts = config.optim.accumulate
    fewer = {batch * part // 8 for part in range(1, 8)} | {batch >> times for times in range(1, batch.bit_length())}
    ranks = range(job.koleo_ranks - 1, 0, -1) if config.loss.koleo_weight > 0 else ()
    values: dict[str, list[Any]] = {
        "parallel.strategy": ["fsdp"] if job.strategy == "ddp" else [],
        "parallel.reshard": [True] if job.world_size > 1 and not config.parallel.reshard else [],
        "model.checkpointing": [] if config.model.checkpointing else [True],
        "optim.accumulate": [count for count in range(parts + 1, batch // fewest + 1) if batch % count == 0],
        "loss.koleo_ranks": [count for count in ranks if job.world_size % count == 0],
        "batch_size": [images for images in sorted(fewer, reverse=True) if images and images % parts == 0],
    }
    return values[key]


def change(job: Job, overrides: dict[str, Any]) -> Job:
    """The same job with other values of some keys, which must not change the networks; UserError for invalid values."""
    config = build(Config, {**flat(job.config), **overrides})
    return describe(config, job.nodes, job.gpus, job.device, job.sizes)


def _seconds(job: Job) -> float:
    """The estimated seconds of a step per image; only ratios are meaningful."""
    batch_size, peak = job.config.batch_size, job.device.peak(job.precision)
    operations = operations_of(job, worst=True).total * batch_size + job.koleo_operations()
    seconds = step_of(job, operations / (0.3 * peak if peak else _ASSUMED_FLOPS)).seconds
    assert seconds is not None
    return seconds / batch_size
