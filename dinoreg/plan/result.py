"""What a plan holds: everything that can be known about a run before it starts, and as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.plan.advice import Remedy
from dinoreg.plan.job import Job
from dinoreg.plan.memory import Memory
from dinoreg.plan.operations import Operations
from dinoreg.plan.speed import Speed
from dinoreg.plan.traffic import Collective
from dinoreg.runtime.errors import UserError

# Images of 500 x 375 pixels that one core decodes and crops in a second (docs/results/benchmarks.md).
IMAGES_PER_CORE = 480.0


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

    operations  of one image
    speed       of one process alone; None where nothing is known of the device
    exchanges   what processes send one another in a step
    num_steps   of the run            num_images  in the data set, where that is known
    advice      what to change when it does not fit, the best first
    notes       sentences
    """

    job: Job
    memory: Memory
    operations: Operations
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

    @property
    def operations_per_step(self) -> float:
        """Floating-point operations of a step on all processes."""
        return self.operations.total * self.job.global_batch_size + self.koleo_operations

    @property
    def koleo_operations(self) -> float:
        """Of `operations_per_step`, KoLeo's search for neighbours."""
        return self.job.koleo_operations() * self.job.world_size

    def as_dict(self) -> dict[str, Any]:
        """Every figure, fit for JSON. Bytes, seconds and operations are plain numbers."""
        job, sizes, operations = self.job, self.job.sizes, self.operations
        crops = job.config.crops
        tokens = {"global": sizes.tokens(crops.global_size)}
        if crops.num_local:
            tokens["local"] = sizes.tokens(crops.local_size)
        return {
            "job": self._job_figures(),
            "fits": self.fits,
            "parameters": {
                "backbone": sizes.backbone,
                **{name: head.unit.parameters for name, head in sizes.heads.items()},
                "student": sizes.student,
                "teacher": sizes.student,
            },
            "tokens": tokens,
            "operations_per_image": {**dataclasses.asdict(operations), "total": operations.total},
            "operations_per_step": self.operations_per_step,
            "operations_koleo": self.koleo_operations,
            "memory": self._memory_figures(),
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

    def _job_figures(self) -> dict[str, Any]:
        job, config = self.job, self.job.config
        return {
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
        }

    def _memory_figures(self) -> dict[str, Any]:
        memory = self.memory
        return {
            "available": memory.available,
            "needed": memory.needed,
            "allocated": memory.allocated,
            "context": memory.context,
            "fragments": memory.fragments,
            "peak": memory.peak.name,
            "moments": {moment.name: {**moment.parts, "total": moment.total} for moment in memory.moments},
            "host_crops": memory.host,
            "host_checkpoint": self.checkpoint.copy,
        }

    def write(self, path: str | Path) -> Path:
        """Every figure to a JSON file; UserError where it cannot be written."""
        path = Path(path)
        try:
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"out={path}: cannot be written ({error.strerror})") from None
        return path
