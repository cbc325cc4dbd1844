"""What to change when a job does not fit: the fewest overrides under which it does, found by trying them."""

import bisect
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from dinoreg.plan.job import Job, describe
from dinoreg.plan.memory import Memory, memory_of
from dinoreg.plan.operations import operations_of
from dinoreg.plan.traffic import collectives

# In the order in which they are preferred: the first ones change where things are kept, the last one the run itself.
KEYS = (
    "parallel.strategy",
    "parallel.reshard",
    "optim.accumulate",
    "model.checkpointing",
    "loss.koleo_ranks",
    "batch_size",
)
FEW_IMAGES = 4  # a micro-batch below this is a last resort
# What the seconds of an exchange between machines are worth where no device's speed is known.
_ASSUMED_FLOPS = 1e14


@dataclass(frozen=True)
class Remedy:
    """Overrides under which the job fits, the memory it then needs, and how much longer an image then takes.

    slower  0.25: a quarter longer, by operations and traffic on paper
    """

    overrides: dict[str, Any]
    memory: Memory
    slower: float

    def __str__(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self.overrides.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def remedies(job: Job, most: int = 3) -> list[Remedy]:
    """Up to `most` smallest sets of overrides that fit, the best first; [] where nothing fits.

    Micro-batches of a few images leave a device idle, a smaller batch is another run, as is another group for KoLeo:
    these are tried only when nothing else is enough.
    """
    if not smallest(job).memory.fits:
        return []
    base = _seconds(job)
    harmless, others = KEYS[:4], KEYS[4:]
    for extra, fewest in ((0, FEW_IMAGES), (0, 1), (1, 1), (2, 1)):
        additions = list(itertools.combinations(others, extra))
        if not any(_fits(job, _strongest(job, (*harmless, *more), fewest)) for more in additions):
            continue
        for count in range(len(harmless) + 1):
            found = [
                Remedy(overrides, memory_of(change(job, overrides)), _seconds(change(job, overrides)) / base - 1)
                for keys in itertools.combinations(harmless, count)
                for more in additions
                if (overrides := _mildest(job, (*keys, *more), fewest))
            ]
            if found:
                return sorted(found, key=lambda remedy: (_change_of_run(job, remedy), remedy.slower))[:most]
    return []


def smallest(job: Job) -> Remedy:
    """Everything at once, down to a single image: the least memory that the job can need."""
    overrides: dict[str, Any] = {"model.checkpointing": True, "batch_size": 1, "optim.accumulate": 1}
    if job.world_size > 1:
        overrides |= {"parallel.strategy": "fsdp", "parallel.reshard": True, "loss.koleo_ranks": 1}
    changed = change(job, overrides)
    return Remedy(overrides, memory_of(changed), _seconds(changed) / _seconds(job) - 1)


def _change_of_run(job: Job, remedy: Remedy) -> float:
    """How far the batch moves, as a factor; 0 where it stays."""
    return job.config.batch_size / remedy.overrides.get("batch_size", job.config.batch_size) - 1


def _mildest(job: Job, keys: tuple[str, ...], fewest: int) -> dict[str, Any]:
    """For these keys the mildest values that fit, {} if none do: the later a key stands in `keys`, the less it moves.

    fewest  images of a micro-batch
    """
    overrides: dict[str, Any] = {}
    for position in reversed(range(len(keys))):
        key, earlier = keys[position], keys[:position]
        values = _values(change(job, overrides), key, fewest)
        # Memory falls along the values, so that halving finds the first one that fits.
        choices = [_strongest(job, earlier, fewest, {**overrides, key: value}) for value in values]
        first = bisect.bisect_left(choices, True, key=lambda choice: _fits(job, choice))
        if first == len(values):
            return {}
        overrides[key] = values[first]
    return overrides


def _strongest(job: Job, keys: tuple[str, ...], fewest: int, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """`overrides`, and besides the values of `keys` that save most."""
    strongest = dict(overrides or {})
    for key in reversed(keys):
        values = _values(change(job, strongest), key, fewest)
        if values:
            strongest[key] = values[-1]
    return strongest


def _fits(job: Job, overrides: dict[str, Any]) -> bool:
    return memory_of(change(job, overrides)).fits


def _values(job: Job, key: str, fewest: int) -> list[Any]:
    """Values of a key that save memory over the job's own, the mildest first.

    fewest  images of a micro-batch
    """
    config = job.config
    batch = config.batch_size
    if key == "parallel.strategy":
        return ["fsdp"] if job.strategy == "ddp" else []
    if key == "parallel.reshard":
        return [True] if job.world_size > 1 and not config.parallel.reshard else []
    if key == "model.checkpointing":
        return [] if config.model.checkpointing else [True]
    if key == "optim.accumulate":
        parts = range(config.optim.accumulate + 1, batch // fewest + 1)
        return [count for count in parts if batch % count == 0]
    if key == "loss.koleo_ranks":
        if config.loss.koleo_weight == 0:
            return []
        return [ranks for ranks in range(job.koleo_ranks - 1, 0, -1) if job.world_size % ranks == 0]
    eighths = {batch * part // 8 for part in range(1, 8)} | {
        batch >> halvings for halvings in range(1, batch.bit_length())
    }
    return [images for images in sorted(eighths, reverse=True) if images and images % config.optim.accumulate == 0]


def change(job: Job, overrides: dict[str, Any]) -> Job:
    """The same job with other values of some keys that leave the networks as they are."""
    config = job.config
    top = {key: value for key, value in overrides.items() if "." not in key}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if dot:
            sections.setdefault(section, {})[name] = value
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return describe(dataclasses.replace(config, **changed, **top), job.nodes, job.gpus, job.device, job.sizes)


def _seconds(job: Job) -> float:
    """A step on paper over its images: only ratios of it mean anything."""
    peak = job.device.peak(job.precision)
    operations = operations_of(job).total * job.config.batch_size + job.koleo_operations()
    computing = operations / (0.3 * peak if peak else _ASSUMED_FLOPS)
    exchanges = collectives(job)
    hidden = sum(each.seconds(job.device) for each in exchanges if each.hidden)
    exposed = sum(each.seconds(job.device) for each in exchanges if not each.hidden)
    return (max(computing, hidden) + exposed) / job.config.batch_size
