"""Images a second of one process: measured by a few real steps where the device is at hand, else an estimate."""

import dataclasses
import gc
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoreg.config.load import Config
from dinoreg.config.schema import ParallelConfig
from dinoreg.data.loader import Batch
from dinoreg.data.masks import block_masks, mask_tensors
from dinoreg.plan.job import Job
from dinoreg.plan.memory import memory_of
from dinoreg.plan.operations import operations_of
from dinoreg.runtime.device import DTYPES, keep_freed_memory, peak_memory
from dinoreg.train.parallelize import compile_backbones
from dinoreg.train.schedules import Now
from dinoreg.train.state import build_networks, build_state
from dinoreg.train.step import train_step

logger = logging.getLogger(__name__)

# Share of a device's stated peak that a step's matrix products are assumed to run at, by the backbone's width.
# Published runs of this method: 31 to 39 % (ViT-L and g on A100, executed operations), 19 % (ViT-L on H100).
UTILISATION = ((384, 0.20), (768, 0.28), (None, 0.33))
# On a CPU, of the rate of a matrix product that is timed on the spot.
CPU_SHARE = 0.6

WARM_UP_STEPS = 2
MOST_STEPS = 10
PROBE_SECONDS = 10.0  # after the warm-up; a step that has begun is finished
QUICK_SECONDS = 1.0  # a CPU whose step should take longer than this is not probed unasked


@dataclass(frozen=True)
class Speed:
    """How fast one process computes.

    images_per_second  of one process, without waiting for others or for data
    measured           whether steps were run; else `source` says what was assumed
    batch_size         that was measured
    peak_memory        bytes that the measured steps allocated (CUDA), or None
    """

    images_per_second: float
    measured: bool
    source: str
    batch_size: int
    peak_memory: int | None = None


def utilisation_of(dim: int) -> float:
    """The assumed share of the peak for a backbone of that width."""
    return next(share for width, share in UTILISATION if width is None or dim <= width)


def estimate(job: Job, utilisation: float | None = None) -> Speed | None:
    """From the device's peak; None where that is not known.

    utilisation  share of the peak; None: `utilisation_of` the width, on a CPU CPU_SHARE of what is timed here
    """
    operations = operations_of(job).total + job.koleo_operations() / job.config.batch_size
    peak = job.device.peak(job.precision)
    if peak is None and job.device.kind == "cpu":
        share = utilisation or CPU_SHARE
        rate = _product_rate(DTYPES[job.precision], job.config.threads)
        source = f"estimate: {share:.0%} of {rate / 1e9:.0f} GFLOP/s, the rate of a matrix product here"
        return Speed(share * rate / operations, False, source, job.config.batch_size)
    if peak is None:
        return None
    share = utilisation or utilisation_of(job.sizes.dim)
    source = f"estimate: {share:.0%} of {peak / 1e12:.0f} TFLOP/s, {job.precision}, assumed" + (
        "" if utilisation is None else " by you"
    )
    return Speed(share * peak / operations, False, source, job.config.batch_size)


def _product_rate(dtype: torch.dtype, threads: int | None) -> float:
    """FLOP/s of a matrix product of 1024 x 1024 on this CPU, the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        return 2 * 1024**3 / min(times)
    finally:
        torch.set_num_threads(before)


def probe(job: Job, device: torch.device) -> Speed | None:
    """Train for a few steps on random pixels; None where the device runs out of memory.

    On a CPU the batch is as large as a step of a few seconds allows: its rate hardly depends on it.
    """
    job = alone(job)
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
        logger.warning("the probe ran out of memory")
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def alone(job: Job) -> Job:
    """The same job on one process."""
    config = dataclasses.replace(
        job.config, parallel=ParallelConfig(), loss=dataclasses.replace(job.config.loss, koleo_ranks=None)
    )
    return dataclasses.replace(job, config=config, nodes=1, gpus=1)


def worth_probing(job: Job) -> bool:
    """Whether to probe unasked: on CUDA where one process can hold the run, on a CPU where a step takes moments."""
    single = alone(job)
    if not memory_of(single).fits:
        return False
    if job.device.kind == "cuda":
        return True
    guess = estimate(single)
    return guess is not None and single.config.batch_size / guess.images_per_second <= QUICK_SECONDS


def _measure(config: Config, dtype: torch.dtype, device: torch.device) -> Speed:
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            student, teacher = build_networks(config)
            anchor = None
            if config.loss.anchor_weight > 0:
                anchor = build_networks(config)[1].backbone
            state = build_state(config, student, teacher, device, dtype, anchor)
            if config.model.compile:
                compile_backbones(state.student, state.teacher)
            batch = random_batch(config, student.backbone.patch_size, device)
            now = Now(lr=1e-5, last_layer_lr=1e-5, weight_decay=0.04, momentum=0.99, teacher_temp=0.05)

            def step() -> None:
                train_step(
                    state,
                    batch,
                    now,
                    loss=config.loss,
                    dtype=dtype,
                    clip_grad=config.optim.clip_grad,
                    accumulate=config.optim.accumulate,
                    seed=0,
                )
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            for _ in range(WARM_UP_STEPS):
                step()
            times: list[float] = []
            while len(times) < MOST_STEPS and sum(times) < PROBE_SECONDS:
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return Speed(
        images_per_second=config.batch_size / float(np.median(times)),
        measured=True,
        source=f"measured: {len(times)} steps of {config.batch_size} images on one process here",
        batch_size=config.batch_size,
        peak_memory=peak_memory(device) if device.type == "cuda" else None,
    )


def random_batch(config: Config, patch_size: int, device: torch.device) -> Batch:
    """A batch of random pixels with the masks that a run of one process draws."""
    crops, count = config.crops, config.batch_size
    grid = (crops.global_size // patch_size,) * 2
    hidden = block_masks(0, 0, 2 * count, grid, config.mask)
    indices, weights = mask_tensors(hidden)

    def pixels(rows: int, size: int) -> Tensor:
        return torch.randn(rows, config.model.in_channels, size, size).to(device)

    return Batch(
        global_crops=pixels(2 * count, crops.global_size),
        local_crops=pixels(crops.num_local * count, crops.local_size) if crops.num_local else None,
        mask=torch.from_numpy(hidden).to(device),
        mask_indices=indices.to(device),
        mask_weights=weights.to(device),
        sample_ids=np.arange(count),
        position=count,
        data_time=0.0,
    )
