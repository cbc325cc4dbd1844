"""Images per second of one process: measured by a few real steps where the device is available, else estimated."""

import dataclasses
import gc
import statistics
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dinoreg.config.load import Config
from dinoreg.plan.job import Job
from dinoreg.plan.memory import memory_of, operations_of
from dinoreg.plan.step import random_batch, take_step
from dinoreg.runtime.device import DTYPES, keep_freed_memory, peak_memory
from dinoreg.train.parallelize import compile_blocks
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.tutor import load_tutor

# Share of a device's stated peak that a step's matrix products are assumed to run at, by the backbone's width.
# Published runs of this method: 31 to 39 % (ViT-L and g on A100, executed operations), 19 % (ViT-L on H100).
UTILISATION = ((384, 0.20), (768, 0.28), (None, 0.33))
# On a CPU, of the rate of a matrix products that are timed on the spot.
CPU_SHARE = 0.6

WARM_UP_STEPS = 2
MOST_STEPS = 10
PROBE_SECONDS = 10.0  # after the warm-up; a step that has begun is finished
QUICK_SECONDS = 1.0  # a CPU whose step should take longer than this is not probed unasked


@dataclass(frozen=True)
class Speed:
    """The speed of one process.

    images_per_second  without waiting for other processes or for data
    measured           whether steps were run; if not, `source` says what was assumed
    peak_memory        bytes that the measured steps allocated on CUDA; else None
    """

    images_per_second: float
    measured: bool
    source: str
    peak_memory: int | None = None


def utilisation_of(dim: int) -> float:
    """The assumed share (0 to 1) of a device's peak for a backbone of width `dim`."""
    return next(share for width, share in UTILISATION if width is None or dim <= width)


def estimate(job: Job, utilisation: float | None = None) -> Speed | None:
    """The speed according to the device's peak; None where that is unknown.

    utilisation  share of the peak, in (0, 1]; None: `utilisation_of` the width, on a CPU `CPU_SHARE` of the rate of a
                 matrix products that are timed on this machine
    """
    operations = operations_of(job).total + job.koleo_operations() / job.config.batch_size
    rate = job.device.peak(job.precision)
    if rate is not None:
        share = utilisation or utilisation_of(job.sizes.dim)
        by = "" if utilisation is None else " by you"
        source = f"estimate: {share:.0%} of {rate / 1e12:.0f} TFLOP/s, {job.precision}, assumed{by}"
    elif job.device.kind == "cpu":
        share, rate = utilisation or CPU_SHARE, _product_rate(DTYPES[job.precision], job.config.threads, job.sizes.dim)
        source = f"estimate: {share:.0%} of {rate / 1e9:.0f} GFLOP/s, the median of matrix products here"
    else:
        return None
    return Speed(share * rate / operations, False, source)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """A context with `count` CPU threads of PyTorch; None: unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _product_rate(dtype: torch.dtype, threads: int | None, dim: int) -> float:
    """FLOP/s of matrix products on this CPU, square ones and those of a layer of width `dim`: the median of several.

    The best would be that of a machine without other work, which this one may not be.
    """
    rates = []
    with _threads(threads):
        for rows, inner, columns in ((1024, 1024, 1024), (2048, dim, 4 * dim)):
            a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
            seconds = timeit.repeat(lambda a=a, b=b: a @ b, number=1, repeat=8)[1:]  # type: ignore[misc]
            rates += [2 * rows * inner * columns / each for each in seconds]
    return statistics.median(rates)


def probe(job: Job, device: torch.device) -> Speed | None:
    """Measure a few training steps on random pixels, on one process; None where the device runs out of memory.

    On a CPU the batch is reduced so that a step takes a few seconds; the speed hardly depends on it.
    """
    job = job.alone()
    config = job.config
    if device.type == "cpu":
        keep_freed_memory()
        guess = estimate(job)
        assert guess is not None
        images = max(2, min(config.batch_size, int(3 * QUICK_SECONDS * guess.images_per_second)))
        config = dataclasses.replace(config, batch_size=images, optim=dataclasses.replace(config.optim, accumulate=1))
    try:
        return _measure(config, DTYPES[job.precision], device)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def worth_probing(job: Job) -> bool:
    """Whether to probe by default: if one process has enough memory and, on a CPU, a step takes at most a second."""
    single = job.alone()
    if job.device.kind != "cuda":
        guess = estimate(single)
        if guess is None or single.config.batch_size / guess.images_per_second > QUICK_SECONDS:
            return False
    return memory_of(single).fits


def _measure(config: Config, dtype: torch.dtype, device: torch.device) -> Speed:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with _threads(config.threads), torch.random.fork_rng(devices=[device] if cuda else []):
        tutor = load_tutor(config, device, dtype)
        student, teacher = build_networks(config, tutor)
        anchor = build_networks(config)[1].backbone if config.loss.anchored else None
        state = TrainState(config, student, teacher, device, dtype, anchor, tutor=tutor)
        if config.model.compile:
            compile_blocks(state.student, state.teacher)
        batch = random_batch(config, student.backbone.patch_size, device, tutor)
        times: list[float] = []
        while len(times) < WARM_UP_STEPS + MOST_STEPS and sum(times[WARM_UP_STEPS:]) < PROBE_SECONDS:
            started = time.perf_counter()
            take_step(state, batch)
            if cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    measured = times[WARM_UP_STEPS:]
    return Speed(
        images_per_second=config.batch_size / statistics.median(measured),
        measured=True,
        source=f"measured: {len(measured)} steps of {config.batch_size} images on one process here",
        peak_memory=peak_memory(device) if cuda else None,
    )
