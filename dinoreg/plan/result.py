"""The result of planning a run: as JSON, and in words on one screen of a terminal or in a notebook."""

import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.plan import devices
from dinoreg.plan.advice import Remedy
from dinoreg.plan.devices import gib
from dinoreg.plan.job import Job
from dinoreg.plan.memory import Checkpoint, Memory, Operations
from dinoreg.plan.recorder import PARTS
from dinoreg.plan.speed import Speed
from dinoreg.plan.traffic import Collective, Step, step_of
from dinoreg.runtime.durations import about
from dinoreg.runtime.errors import reworded
from dinoreg.runtime.templates import render
from dinoreg.train.outlook import FEW_BATCHES, Outlook, rounded
from dinoreg.train.probes import BATCH_SIZE as PROBE_BATCH


@dataclass(frozen=True)
class Run:
    """Totals of the run; None where they depend on something unknown.

    steps              optimizer steps
    images             of all processes, as images_per_second is
    seconds            of the run, without probes and checkpoints
    cores_per_process  CPU cores that one process needs so that its device never waits for images
    loading            seconds in which one core prepares an image of the data set; None: not measured
    waiting            share (0 to 1) of a step that waits for images, on this machine
    """

    steps: int
    images: int
    epochs: float | None
    images_per_second: float | None
    seconds: float | None
    cores_per_process: float | None
    loading: float | None = None
    waiting: float | None = None


@dataclass(frozen=True)
class Stage:
    """The cost of a stage of the run, in which crops have one size.

    job         with the crops of the stage
    operations  per image
    speed       of a single process; None where nothing is known of the device
    loading     seconds in which one core prepares an image; None: not measured
    """

    job: Job
    steps: int
    memory: Memory
    operations: Operations
    speed: Speed | None
    loading: float | None

    @property
    def seconds(self) -> float | None:
        """Seconds of its steps, without waiting for data; None where unknown."""
        if self.speed is None:
            return None
        each = step_of(self.job, self.job.config.batch_size / self.speed.images_per_second).seconds
        return None if each is None else self.steps * each

    def as_dict(self) -> dict[str, Any]:
        """Its figures as JSON values."""
        crops = self.job.config.crops
        return {
            "steps": self.steps,
            "global_size": crops.global_size,
            "local_size": crops.local_size,
            "operations_per_image": self.operations.total,
            "needed": self.memory.needed,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, repr=False)
class Plan:
    """The predicted cost of a run.

    job         of the stage that needs most memory, as `memory`; a run whose crops have one size has one stage
    operations  per image, the mean over all stages
    speed       of a single process; None where nothing is known of the device
    exchanges   the collectives of a step
    num_images  in the data set; None where unknown
    advice      changes with which it fits, the best first; empty where it fits
    notes       sentences for the user
    """

    job: Job
    memory: Memory
    operations: Operations
    speed: Speed | None
    exchanges: tuple[Collective, ...]
    step: Step
    run: Run
    checkpoint: Checkpoint
    num_images: int | None
    advice: tuple[Remedy, ...]
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]

    def __repr__(self) -> str:
        first = "".join(f" {remedy}" for remedy in self.advice[:1])
        return f"<plan of {self.job.config.model.name}: {self.verdict}{first}>"

    def _repr_html_(self) -> str:
        quiet: dict[str, Any] = {"file": io.StringIO(), "force_jupyter": False}  # where it would display each line
        self.show(console := Console(record=True, width=110, soft_wrap=True, highlight=False, **quiet))
        return console.export_html(code_format="<pre>{code}</pre>", inline_styles=True)

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory of one device."""
        return self.memory.fits

    @property
    def outlook(self) -> Outlook:
        """What the run is in for; without a known number of images nothing is held against theirs."""
        job, config = self.job, self.job.config
        images = self.num_images or max(self.run.images, FEW_BATCHES * job.global_batch_size)
        device = "this CPU" if self.memory.on_cpu else f"{job.world_size} x {job.device.name}"
        own = config.init is not None
        name, processes = config.model.name, job.world_size
        return Outlook(images, job.global_batch_size, self.run.steps, self.run.seconds, device, name, own, processes)

    @property
    def verdict(self) -> str:
        """The whole run in a sentence: memory, and if that is enough, time and passes or what speaks against it."""
        memory, outlook = self.memory, self.outlook
        spare = memory.available - memory.needed
        if not self.fits:
            return f"It does not fit: {gib(-spare)} too much. It does with:"
        if advice := outlook.advice():
            return f"It fits, but {advice}."
        parts = [f"It fits, {gib(spare)} to spare" if memory.available else "It fits"]
        parts += [about(self.run.seconds)] if self.run.seconds is not None else []
        parts += [f"{rounded(outlook.passes)} passes over {self.num_images:,} images"] if self.num_images else []
        return ", ".join(parts) + "."

    @property
    def operations_per_step(self) -> float:
        """Floating-point operations of a step, on all processes."""
        return self.operations.total * self.job.global_batch_size + self.job.koleo_operations() * self.job.world_size

    def as_dict(self) -> dict[str, Any]:
        """Every figure as JSON values: memory in bytes, times in seconds, operations in floating-point operations."""
        job, sizes, memory = self.job, self.job.sizes, self.memory
        return {
            "job": job.as_dict(),
            "fits": self.fits,
            "verdict": self.verdict,
            "parameters": {**sizes.parameters, "student": sizes.student, "teacher": sizes.student},
            "operations_per_image": {**asdict(self.operations), "total": self.operations.total},
            "operations_per_step": self.operations_per_step,
            "operations_koleo": job.koleo_operations() * job.world_size,
            "memory": {
                **asdict(memory),
                "needed": memory.needed,
                "allocated": memory.allocated,
                "moments": {name: {**parts, "total": sum(parts.values())} for name, parts in memory.moments.items()},
            },
            "speed": None if self.speed is None else asdict(self.speed),
            "exchanges": [
                {**asdict(each), "sent": each.sent, "seconds": each.seconds(job.device)} for each in self.exchanges
            ],
            "links": {"local": job.device.local_link, "between": job.device.link},
            "step": asdict(self.step),
            "run": asdict(self.run),
            "stages": [stage.as_dict() for stage in self.stages],
            "checkpoint": asdict(self.checkpoint),
            "advice": [
                {"overrides": remedy.overrides, "needed": remedy.memory.needed, "slower": remedy.slower}
                for remedy in self.advice
            ],
            "notes": list(self.notes),
        }

    def write(self, path: str | Path) -> Path:
        """Write `as_dict` to a JSON file and return its path; UserError where it cannot be written."""
        path = Path(path)
        with reworded(f"out={path}: cannot be written", OSError):
            write_atomic(path, json.dumps(self.as_dict(), indent=1) + "\n")
        return path

    def show(self, console: Console | None = None) -> None:
        """Print a plan to the console: memory, speed, traffic, time, notes, and changes with which it fits."""
        console = console or Console(soft_wrap=True, highlight=False)
        headline, *sections = re.split(r"\n{2,}", self._text())
        console.print(headline, style="bold")
        for section in sections:
            title, *lines = section.splitlines()
            rows = [[cell.strip() for cell in line.split("|")] for line in lines]
            names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
            console.print(f"\n[bold]{title}[/bold]")
            for name, figure, words in rows:
                style = "bold" if name in ("needed", "in all") else ""
                console.print(f"  {name:<{names}}  {figure:>{figures}}  {words}".rstrip(), style=style, markup=False)
        if self.notes:
            console.print()
        for note in self.notes:
            console.print(f"  {note}", style="yellow", markup=False)
        console.print()
        style = "bold red" if not self.fits else "yellow" if self.outlook.doubts() else "green"
        console.print(self.verdict, style=style, markup=False, soft_wrap=not console.is_terminal)
        for remedy in self.advice:
            text = f"  {remedy}   {gib(remedy.memory.needed)}, {_slower(remedy.slower)}"
            if "batch_size" in remedy.overrides:
                text += f", a global batch of {remedy.overrides['batch_size'] * self.job.world_size}"
            console.print(text, markup=False)

    def _text(self) -> str:
        """The headline and the sections, with a blank line between."""
        parts, moments = self.memory.moments[self.memory.peak], self.memory.moments.values()
        most_gradients = max(each.get("gradients", 0) for each in moments)
        held = {part: parts.get(part, 0) for part in PARTS if part in parts or (part == "gradients" and most_gradients)}
        kinds = {name: getattr(self.operations, name) for name in ("student", "teacher", "heads", "again", "tutor")}
        tutor = self.job.sizes.tutor
        text = render(
            "plan/templates/plan.txt.j2",
            plan=self,
            shares=[f"{name} {count / 1e9:.4g}" for name, count in kinds.items() if count],
            tutor_parameters=sum(p.numel() for p in tutor.network.parameters()) if tutor else 0,
            prototypes=self.job.sizes.prototypes.values(),
            held=held,
            most_gradients=most_gradients,
            PROBE_BATCH=PROBE_BATCH,
            size=decimal,
            devices=devices,
            **{each.__name__: each for each in (gib, about, moment, number, millions, rounded)},
        )
        return text.strip()


# ------------------------------------------------------------------------------------------------------------
# Numbers


def moment(seconds: float) -> str:
    """A short duration in s or ms: 1.23 s, 45.6 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def number(value: float) -> str:
    """A number with thousands separators, or with three digits below 100: 12,345 or 1.23."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def millions(count: int) -> str:
    """A count in millions or thousands: 1.2 M, 34.5 k."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def _slower(share: float) -> str:
    return f"{abs(share):.0%} {'slower' if share >= 0 else 'quicker'}" if abs(share) >= 0.005 else "as quick"
