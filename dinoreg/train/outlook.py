"""What a run is in for, in words: its images and passes against the batch, its time, and the better command."""

import math
import time
from dataclasses import dataclass, field, replace

import torch

from dinoreg.data.statistics import FEW_IMAGES
from dinoreg.runtime.durations import about
from dinoreg.runtime.printable import enumerated
from dinoreg.train.logger import SilentLog

# Worth a word: fewer batches of images from scratch, more passes over them, more seconds.
FEW_BATCHES, MANY_PASSES, LONG = 20, 2000, 7 * 86_400.0
# A run that is advised instead: passes, seconds, the smallest batch, and the fewest steps that are worth it.
_PASSES, _SECONDS, _BATCH, _STEPS = 500, 86_400.0, 8, 1000


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before or soon after its start.

    images   in the data set
    batch    images a step, over all processes
    steps    of the run, or to its end
    seconds  of these steps; None: unknown
    device   as in "on this CPU"
    model    its name
    own      whether it starts from weights
    processes  that share a batch
    """

    images: int
    batch: int
    steps: int
    seconds: float | None = None
    device: str = "this CPU"
    model: str = ""
    own: bool = False
    processes: int = 1

    @property
    def passes(self) -> float:
        """How often an image is seen, on average."""
        return self.steps * self.batch / self.images

    @property
    def is_long(self) -> bool:
        """Whether it takes more than `LONG` seconds."""
        return self.seconds is not None and self.seconds > LONG

    def doubts(self) -> list[str]:
        """What speaks against the run as it is, a clause each; [] for nothing."""
        found = [f"{about(self.seconds)} on {self.device}"] if self.seconds is not None and self.is_long else []
        enough = 2 * self.batch if self.own else max(2 * self.batch, min(FEW_BATCHES * self.batch, FEW_IMAGES))
        few = self.images < enough
        again = " (so each several times in one)" if self.images < self.batch else ""
        batches = f" in batches of {self.batch:,}{again}" if few else ""
        if self.passes > MANY_PASSES:
            found.append(f"{rounded(self.passes)} passes over {self.images:,} images{batches}")
        elif few:
            found.append(f"only {self.images:,} images{batches}")
        return found

    def better(self) -> str:
        """What to do instead, with the keys of the command; "" where there are no doubts."""
        if not self.doubts():
            return ""
        found, batch = [], self.batch if self.images >= 2 * self.batch else min(self.batch, batch_for(self.images))
        steps = [_PASSES * self.images / batch] if self.passes > MANY_PASSES else []
        if self.seconds is not None and self.is_long:
            steps.append(_SECONDS * self.steps / self.seconds * self.batch / batch)
        keys = [f"steps={_floor(min(steps))}"] if steps and _STEPS <= min(steps) < self.steps else []
        keys += [f"batch_size={batch // self.processes}"] if self.processes <= batch < self.batch else []
        found += [" ".join(keys)] if keys else []
        if self.images < FEW_IMAGES and not self.own:
            found.append("public weights (continue_vits14_reg4 init=FILE)")
        if self.is_long and "CPU" in self.device:
            found += ["a GPU"] if self.model.startswith("vitt") else ["model.name=vitt14_reg4", "a GPU"]
        elif self.is_long:
            found.append("more GPUs")
        return enumerated(found, "or") or "more images"

    def advice(self) -> str:
        """Doubts and what to do in one line; "" for a run without doubts."""
        doubts = self.doubts()
        return f"{' and '.join(doubts)}; better: {self.better()}" if doubts else ""


def batch_for(images: int) -> int:
    """The largest power of two of which so few images still make two batches, at least a batch that can train.

    Smaller ones learn less from as many images seen: docs/results/small-runs.md, section 7.
    """
    return max(_BATCH, 2 ** int(math.log2(max(1, images / 2))))


def rounded(value: float) -> str:
    """A number with three significant digits and commas, as 23,500; below 100 with one decimal, as 1.6."""
    return f"{value:.1f}".removesuffix(".0") if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def _floor(value: float) -> int:
    """The largest number of one significant digit that is not above `value`."""
    digit = 10 ** int(math.log10(value))
    return int(value // digit * digit)


@dataclass
class Pace:
    """Says after the first two steps of a start how long the run will take, and once more if that is very long.

    outlook    of the whole run
    last_step  with which it ends, or its present stage
    """

    outlook: Outlook
    last_step: int
    log: SilentLog
    device: torch.device
    since: float = field(default_factory=time.perf_counter)
    steps: list[tuple[float, float]] = field(default_factory=list)  # seconds, and those spent waiting for images

    def after(self, step: int, data_time: float) -> None:
        """Note the end of a step that waited `data_time` seconds for images; waits for the device in the first two."""
        self.log.progress(step)
        if len(self.steps) == 2:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.steps.append((now - self.since, data_time))
        self.since = now
        if len(self.steps) < 2:
            return
        each, waiting = min(self.steps)
        left = each * (self.last_step - step)
        if left > 300:  # the end of a shorter run is seen soon enough
            share = f", {waiting / each:.0%} of it waiting for images" if waiting > each / 10 else ""
            end = "the end" if self.last_step == self.outlook.steps else f"step {self.last_step}"
            self.log.say(f"step {step}/{self.outlook.steps}: {each:.3g} s a step{share}; about {about(left)} to {end}")
        ahead = replace(self.outlook, steps=self.last_step - step, seconds=left)
        if ahead.is_long and not self.outlook.doubts():
            self.log.say(f"advice: {ahead.advice()}")
