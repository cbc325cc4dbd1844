"""The stream of batches: sampling, decoding and cropping in threads, augmentation on the device.

What a batch holds is a function of the settings, the seed and the sampler's position alone. Positions count
samples since the start of the run, so a run continues exactly from a saved position, with any number of
workers.

Threads, not processes: decoding and resampling release the interpreter lock, and threads write straight into
the batch's (pinned) memory, where processes would pay for every crop's way between them.
"""

from __future__ import annotations

import collections
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dinoreg.config.schema import DataConfig
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.data import augment as photometric
from dinoreg.data import crops as geometry
from dinoreg.data.decode import BadImage
from dinoreg.data.masks import block_masks, mask_tensors
from dinoreg.data.rng import uniforms
from dinoreg.data.sampler import Sampler
from dinoreg.data.source import ChosenSource, Source
from dinoreg.runtime.environment import DATA_THREADS, usable_cores
from dinoreg.runtime.errors import RunError, UserError

BAD_ALLOWANCE = 10  # bad images that never end a run, unless none at all are allowed
_TIMED = 16  # images that tell how long one takes
_CHECKED = 4096  # images of a process that are compared with one another, file by file
_ATTEMPTS = 1000  # substitutes tried for one bad image
_LISTED = 100  # bad images named when a run ends over them
_SLICE = 0.2  # seconds after which a wait looks up
_LEAVE = 2.0  # seconds that workers have to end their image when a loader is closed
T = TypeVar("T")
_MOST_WORKERS = 16  # unless data.workers says otherwise
_CROP_STREAM, _COLOUR_STREAM, _SENSOR_STREAM, _CHANNEL_STREAM = 1, 2, 3, 4  # uses of the seed
# A batch is shared out in parts. Where workers compute floats their number is fixed, because a mean's rounding may
# depend on the company of a crop; larger parts mean fewer, longer operations and less waiting for the interpreter lock.
_PARTS_ON_CPU = 8
_PARTS_PER_WORKER = 4


@dataclass(frozen=True)
class Views:
    """What a batch makes of an image: its crops, their colours, and the patches hidden from the student.

    raises UserError for settings that do not fit together
    """

    crops: CropSettings
    augment: AugmentSettings
    mask: MaskSettings
    patch_size: int
    in_channels: int = 3  # of a crop
    clean_size: int | None = None  # at which the global crops are cut once more, undistorted
    related: bool = False  # whether it is told where the local crops lie in the global ones
    bag_of: int = 0  # channels of an image, of which its crops show one, drawn anew in every epoch; 0: they show all

    def __post_init__(self) -> None:
        local_size = self.crops.local_size if self.crops.num_local else 0
        sizes = {"crops.global_size": self.crops.global_size, "crops.local_size": local_size}
        for key, size in {**sizes, "loss.gram_size": self.clean_size or 0}.items():
            if size % self.patch_size:
                raise UserError(f"{key}={size} is not divisible by the patch size {self.patch_size}")
        for name, values in (("mean", self.augment.mean), ("std", self.augment.std)):
            if len(values) not in (1, self.in_channels):
                raise UserError(f"augment.{name} has {len(values)} values, expected 1 or {self.in_channels} (channels)")

    @property
    def sizes(self) -> list[int]:
        """Pixels a side of every view of an image, the two global ones first."""
        return [self.crops.global_size] * 2 + [self.crops.local_size] * self.crops.num_local

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(crops of an image, pixels a side) of the global crops, of any local ones, and of those cut once more."""
        groups = [(2, self.crops.global_size), (self.crops.num_local, self.crops.local_size)]
        return [(count, size) for count, size in (*groups, (2, self.clean_size or 0)) if count and size]


def num_workers(workers: int | None, device: torch.device) -> int:
    """Threads that read images: `data.workers`, or one per core (per two cores when the step runs on the CPU)."""
    if workers is not None:
        return workers
    cores = usable_cores()
    # On a CPU the step wants the cores as well.
    return min(max(1, cores // 2) if device.type == "cpu" else cores, _MOST_WORKERS)


@dataclass
class Batch:
    """What one step trains on; tensors on the device. Rows are crop-major: all of view 1, then view 2, ..."""

    global_crops: Tensor  # (2B, C, H, W) float32, augmented and normalised
    local_crops: Tensor | None  # (L*B, C, h, w); None without local crops
    mask: Tensor  # (2B, N) bool, True = hidden
    mask_indices: Tensor  # (M,) int64 into the 2B*N flattened patches
    mask_weights: Tensor  # (M,) float32, 1 / (masked patches of that crop)
    hidden: np.ndarray  # (2B,) int64, the masked patches of each crop; on the host
    sample_ids: np.ndarray  # (B,) int64, the images that were used
    position: int  # the sampler's position after this batch
    data_time: float  # seconds the consumer spent in asking for it
    checksums: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (B,) of their files; early on only
    clean_crops: Tensor | None = None  # (2B, C, H', W') the global crops once more: mirrored and normalised alone
    places: Tensor | None = None  # (2, L, B, 2, 3) where the local crops lie in the global ones, see `crops.places`


@dataclass
class _Job:
    """One batch in the making; what has no default is set when the batch is planned."""

    position: int
    planned: Future[list[Future[None]]] = field(init=False)
    groups: list[Tensor] = field(init=False)  # of `Views.groups`: (2B, C, H, W), (L*B, C, h, w), (2B, C, H', W')
    crops: list[list[Tensor]] = field(init=False)  # (1, C, h, w) views of them, by image and view
    ids: np.ndarray = field(init=False)  # (B,)
    epochs: np.ndarray = field(init=False)  # (B,)
    boxes: np.ndarray = field(init=False)  # (B, V, TRIES, 4)
    channels: np.ndarray = field(init=False)  # (B,) int64, of a bag the one that crops show
    colours: list[np.ndarray] = field(init=False)  # photometric parameters of each group of crops
    masks: list[Tensor] = field(init=False)  # mask, mask_indices and mask_weights of the batch
    hidden: np.ndarray = field(init=False)  # masked patches of each crop
    cut: np.ndarray = field(init=False)  # (B, V, 4) boxes as they were cut, of related views
    turns: np.ndarray = field(init=False)  # (B, V, 2, 2) how they are mirrored and turned, likewise
    checksums: np.ndarray = field(init=False)  # (B,), or (0,) once enough images have been compared
    augmented: list[Tensor] = field(init=False)  # on a CPU: float32 crops of each group
    bad: dict[str, str] = field(default_factory=dict)  # name -> reason


def _start_pool(workers: int) -> tuple[ThreadPoolExecutor, list[threading.Thread]]:
    """Threads that compute with one thread each: the pool and its threads."""
    # A thread's own number of compute threads can only be set through a call that also changes the
    # default of threads to come; so all workers make it first, then the old default is put back.
    num_threads = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    threads = []

    def compute_alone() -> None:
        threads.append(threading.current_thread())
        torch.get_num_threads()  # initialises this thread's count, which would undo a call before it
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(workers, DATA_THREADS, initializer=compute_alone)
    for _ in range(workers):
        pool.submit(int)  # starts one more thread, since those before wait for all
    ready.wait()
    torch.set_num_threads(num_threads)
    return pool, threads


@dataclass
class _Engine:
    """Plans and fills jobs. It does not know the loader, so that an abandoned loader can be collected."""

    source: Source
    views: Views
    options: DataConfig
    batch_size: int
    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.uint8  # of crops as they are cut

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.source.groups(), self.seed)
        self.known_bad: dict[int, str] = {}  # by sample id; spares reading a bad file in every epoch
        self.on_wait: Callable[[float], None] = lambda seconds: None
        self.stopping = False
        workers = max(1, num_workers(self.options.workers, self.device))
        self.pool, self.threads = _start_pool(workers)
        num_parts = _PARTS_ON_CPU if self.device.type == "cpu" else _PARTS_PER_WORKER * workers
        size = -(-self.batch_size // num_parts)
        self.parts = [(first, min(first + size, self.batch_size)) for first in range(0, self.batch_size, size)]

    def stop(self) -> None:
        self.stopping = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        # An abandoned loader may be collected in a worker, which cannot wait for itself; a read may never end.
        until = time.monotonic() + _LEAVE
        for thread in self.threads if threading.current_thread() not in self.threads else ():
            thread.join(max(0.0, until - time.monotonic()))

    def start(self, job: _Job) -> None:
        """Have the workers prepare a job."""
        job.planned = self.pool.submit(self._plan_and_share, job)

    def finish(self, job: _Job) -> None:
        """Wait for a job; raises what a worker raised."""
        for part in self._wait_for(job.planned):
            self._wait_for(part)

    def _wait_for(self, future: Future[T]) -> T:
        started = time.monotonic()
        while not future.done() and not wait([future], _SLICE).done:
            self.on_wait(time.monotonic() - started)
        return future.result()

    def _plan_and_share(self, job: _Job) -> list[Future[None]]:
        self._plan(job)
        return [self.pool.submit(self._fill, job, first, last) for first, last in self.parts]

    def _plan(self, job: _Job) -> None:
        """Make room for a batch and draw everything random that it needs: ids, boxes, colour changes, masks."""
        batch, num_views, mask = self.batch_size, len(self.views.sizes), self.views.mask
        # Pinned memory is PyTorch's own, which hands it out again when the device has read it. Channels lie innermost.
        pinned, channels = self.device.type == "cuda", self.views.in_channels
        job.groups = [
            torch.empty(count * batch, size, size, channels, dtype=self.dtype, pin_memory=pinned).permute(0, 3, 1, 2)
            for count, size in self.views.groups
        ]
        rows = [row for group in job.groups for row in group.split(1)]  # crop-major
        job.crops = [rows[image::batch] for image in range(batch)]
        job.ids, job.epochs = self.sampler.at(job.position + self.rank * batch + np.arange(batch))

        def numbers(stream: int, count: int) -> np.ndarray:
            return uniforms(self.seed, stream, job.epochs, job.ids, num_views, count)

        job.boxes = geometry.relative_boxes(numbers(_CROP_STREAM, geometry.NUMBERS_PER_VIEW), self.views.crops)
        job.channels = (numbers(_CHANNEL_STREAM, 1)[:, 0, 0] * self.views.bag_of).astype(np.int64)
        augment, of_sensor = self.views.augment, None
        if augment.of_sensor:
            of_sensor = numbers(_SENSOR_STREAM, photometric.SENSOR_NUMBERS + self.views.in_channels)
        drawn = numbers(_COLOUR_STREAM, photometric.NUMBERS_PER_VIEW)
        colours = photometric.draw_photometric(drawn, augment, of_sensor)
        job.colours = np.split(colours.swapaxes(0, 1).reshape(num_views * batch, -1), [2 * batch])  # crop-major
        if self.views.related:
            job.cut, job.turns = np.zeros((batch, num_views, 4)), photometric.orientations(colours)
        if self.views.clean_size is not None:
            mirrored = np.zeros_like(job.colours[0])
            flips = [photometric.P.HFLIP, photometric.P.VFLIP, photometric.P.TURN]
            mirrored[:, flips] = job.colours[0][:, flips]
            job.colours = [*job.colours[: len(job.groups) - 1], mirrored]
        step = job.position // (batch * self.world_size)
        grid = (self.views.crops.global_size // self.views.patch_size,) * 2
        # The crop's number does not depend on the processes, unless each spreads the hidden shares over its own crops.
        own, others = (self.rank, 1) if mask.by_process else (0, self.world_size)
        images, first = batch * others, (self.rank - own) * batch
        hidden = [
            block_masks(self.seed, step, 2 * images, grid, mask, view * images + first, batch, process=own)
            for view in range(2)
        ]
        crop_mask = torch.from_numpy(np.concatenate(hidden))
        job.masks, job.hidden = [crop_mask, *mask_tensors(crop_mask)], crop_mask.sum(dim=1).numpy()
        checked = job.position < _CHECKED * self.world_size and not job.epochs.any()
        job.checksums = np.zeros(batch * checked, dtype=np.int64)
        job.augmented = []
        if pinned:
            job.masks = [tensor.pin_memory() for tensor in job.masks]
        elif self.device.type == "cpu":
            job.augmented = [torch.empty(crops.shape) for crops in job.groups]

    def _fill(self, job: _Job, first: int, last: int) -> None:
        """Crop images first..last of a batch; on a CPU augment their crops too, a cache-sized part at a time."""
        for row in range(first, last):
            if self.stopping:
                return
            self._fill_row(job, row)
        for pixels, colours, out in zip(job.groups, job.colours, job.augmented):
            rows = np.arange(len(pixels)).reshape(-1, self.batch_size)[:, first:last].ravel()  # crop-major
            photometric.augment(pixels, colours, self.views.augment, out, rows)

    def _fill_row(self, job: _Job, row: int) -> None:
        original, epoch = int(job.ids[row]), int(job.epochs[row])
        sample = original
        for attempt in range(_ATTEMPTS):
            reason = self.known_bad.get(sample)
            if reason is None:
                try:
                    self._crop_image(job, row, sample)
                    job.ids[row] = sample
                    return
                except BadImage as error:
                    reason = self.known_bad[sample] = str(error)
            job.bad[self.source.name(sample)] = reason
            sample = self.sampler.substitute(epoch, original, attempt)
        name = self.source.name(original)
        raise RunError(f"data: no usable image found in {_ATTEMPTS} tries in place of {name} ({reason})")

    def _crop_image(self, job: _Job, row: int, sample: int) -> None:
        options, channels = self.options, self.views.bag_of or self.views.in_channels
        image = self.source.image(sample, channels, options.max_pixels, options.reference_decode)
        if len(job.checksums):
            job.checksums[row] = image.checksum()
        boxes = geometry.place_boxes(job.boxes[row], image.height, image.width, self.views.crops.ratio)
        sizes, again = self.views.sizes, 0 if self.views.clean_size is None else 2
        boxes += boxes[:again]
        reduction = 1
        if options.reduced_decode and image.format == "JPEG":
            reduction = geometry.reduction_for(boxes, [*sizes, *[self.views.clean_size or 0] * again])
        pixels = image.pixels(reduction)
        if self.views.bag_of:
            pixels = pixels[job.channels[row]][None]
        if reduction > 1:
            height, width = pixels.shape[1:]
            boxes = [geometry.reduce_box(box, reduction, height, width) for box in boxes]
        if self.views.related:
            job.cut[row] = boxes[: len(sizes)]
        for box, out in zip(boxes, job.crops[row]):
            geometry.cut_crop(pixels, box, out)


def seconds_per_image(source: Source, views: Views, reading: DataConfig, augmented: bool) -> float:
    """Seconds in which one worker reads, decodes and crops an image; the mean over some from all over a source.

    augmented  with the changes of colour, which are a worker's where the step runs on the CPU
    raises     RunError where none of them can be used
    """
    indices = np.unique(np.linspace(0, len(source) - 1, _TIMED).astype(np.int64))
    chosen, device = ChosenSource(source, indices), torch.device("cpu" if augmented else "meta")
    engine = _Engine(chosen, views, replace(reading, workers=1), len(indices), 0, device)
    seconds = []
    try:
        for _ in range(2):  # the first time pays for what is loaded only once
            started = time.perf_counter()
            job = _Job(0)
            engine.start(job)
            engine.finish(job)
            seconds.append((time.perf_counter() - started) / len(indices))
    finally:
        engine.stop()
    return min(seconds)


class BatchLoader:
    """An endless iterator of batches; also a context manager, which stops its workers.

    A bad image is replaced by another one that depends on its place alone, and listed once in `bad` (name ->
    reason). More than 10 bad images that are also more than `max_bad_fraction` of the images seen end the
    run with RunError; with a fraction of 0 the first one does.
    """

    def __init__(
        self,
        source: Source,
        views: Views,
        reading: DataConfig,
        *,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        deep: bool = False,
    ) -> None:
        """Start the workers; they prepare nothing before the first batch is asked for.

        reading     workers (0: one, which reads when a batch is asked for), prefetch, max_bad_fraction and max_pixels
                    count
        batch_size  images B of this process; all processes together advance by B * world_size
        position    where to start, a multiple of B * world_size
        deep        keep crops as floats, for data sets of more than eight bits; else they are rounded to bytes
        raises      UserError for a batch size below 1
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1")
        self.source, self.views, self.device = source, views, torch.device(device)
        self.batch_size, self.max_bad_fraction = batch_size, reading.max_bad_fraction
        self.bad: dict[str, str] = {}
        self._stride = batch_size * world_size
        self.position = self._submitted = position  # samples drawn with the last batch, by all processes together
        pixels = torch.float32 if deep else torch.uint8
        self._engine = _Engine(source, views, reading, batch_size, seed, self.device, rank, world_size, pixels)
        self._finalizer = weakref.finalize(self, self._engine.stop)  # also runs when the interpreter exits
        self._ahead = 0 if reading.workers == 0 else reading.prefetch
        self._jobs: collections.deque[_Job] = collections.deque()

    def __iter__(self) -> BatchLoader:
        return self

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. No batch can be asked for afterwards."""
        self._finalizer()

    def when_waiting(self, call: Callable[[float], None]) -> BatchLoader:
        """Have `call`, with the seconds so far, called five times a second while a batch is waited for.

        What it raises ends the wait.
        """
        self._engine.on_wait = call
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise RunError("data: the loader is closed")
        started = time.perf_counter()
        self._submit(max(1, self._ahead))
        job = self._jobs.popleft()
        try:
            self._engine.finish(job)
        except BaseException:
            self.close()
            raise
        position = job.position + self._stride
        self._count_bad(job, position)
        batch = self._deliver(job, position)
        self.position = position
        self._submit(self._ahead)  # the workers go on while the caller computes
        batch.data_time = time.perf_counter() - started
        return batch

    def _submit(self, ahead: int) -> None:
        while len(self._jobs) < ahead:
            job = _Job(self._submitted)
            self._submitted += self._stride
            self._jobs.append(job)
            self._engine.start(job)

    def _deliver(self, job: _Job, position: int) -> Batch:
        """The batch on the device; there the crops are augmented, without waiting for it."""
        crops = job.augmented or [
            photometric.augment(self._send(pixels), colours, self.views.augment)
            for pixels, colours in zip(job.groups, job.colours)
        ]
        mask, mask_indices, mask_weights = map(self._send, job.masks)
        local_crops = crops[1] if self.views.crops.num_local else None
        return Batch(
            crops[0],
            local_crops,
            mask,
            mask_indices,
            mask_weights,
            job.hidden,
            job.ids,
            position,
            data_time=0,
            checksums=job.checksums,
            clean_crops=None if self.views.clean_size is None else crops[-1],
            places=self._send(torch.from_numpy(geometry.places(job.cut, job.turns))) if self.views.related else None,
        )

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _count_bad(self, job: _Job, position: int) -> None:
        self.bad.update(job.bad)
        seen = min(position + len(self.bad), len(self.source))  # a bad image is seen besides the one that replaced it
        allowed = max(BAD_ALLOWANCE, self.max_bad_fraction * seen) if self.max_bad_fraction > 0 else 0
        if len(self.bad) <= allowed:
            return
        self.close()
        names = [f"  {name}: {reason}" for name, reason in list(self.bad.items())[:_LISTED]]
        if len(self.bad) > _LISTED:
            names.append(f"  and {len(self.bad) - _LISTED} more")
        raise RunError(
            f"data: {len(self.bad)} bad images among {seen} seen, more than "
            f"data.max_bad_fraction={self.max_bad_fraction} allows:\n" + "\n".join(names)
        )
