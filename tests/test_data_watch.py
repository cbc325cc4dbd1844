from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoreg.data.decode import EncodedImage
from dinoreg.data.loader import Batch
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.train.health import WeightWatch
from dinoreg.train.metrics import DataWatch


def batch_of(ids: Sequence[int], checksums: Sequence[int] = (), hidden: Sequence[int] = (), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        global_crops=torch.randn(2 * len(ids), 3, 16, 16, generator=generator),
        local_crops=None,
        mask=torch.zeros(2 * len(ids), 20, dtype=torch.bool),
        mask_indices=torch.zeros(0, dtype=torch.int64),
        mask_weights=torch.zeros(0),
        hidden=np.array(hidden or [0] * (2 * len(ids))),
        sample_ids=np.array(ids),
        position=0,
        data_time=0.0,
        checksums=np.array(checksums, dtype=np.int64),
    )


class Second(Ranks):
    """The second of two processes, the first of which has seen nothing out of the ordinary."""

    def __init__(self) -> None:
        super().__init__(rank=1, world_size=2)

    def gather_rows(self, tensor: Tensor, group_size: int | None = None) -> Tensor:
        return torch.cat([torch.zeros_like(tensor), tensor])


def test_order_copies_and_masks_are_counted() -> None:
    watch = DataWatch((0.5,), (0.25,), ALONE)
    watch.observe(batch_of([4, 5, 9, 1], [11, 12, 11, 13], hidden=[10, 0, 0, 0, 4, 0, 0, 0], seed=1))
    watch.observe(batch_of([6, 7, 8, 4], [12, 14, 15, 11], seed=2))  # the last is image 4 once more, no copy of it
    seen = watch.summarise(batch_of([6, 7, 8, 4], seed=2))
    assert seen["in_order"] == pytest.approx(3 / 6)  # 4 5, 6 7, 7 8
    assert seen["copies"] == pytest.approx(2 / 8)  # 9 is 4's file, 6 is 5's
    assert seen["masked"] == pytest.approx(14 / 40)
    assert seen["stale_steps"] == 0
    watch.observe(batch_of([30, 20, 10, 0], seed=3))
    later = watch.summarise(batch_of([30, 20, 10, 0], seed=3))
    assert (later["in_order"], later["masked"]) == (0.0, 0.0)
    assert later["copies"] == seen["copies"]  # files are compared only at the start


def test_pixels_are_those_before_normalisation_on_a_range_of_0_to_1() -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    pixels = torch.linspace(0.0, 0.9, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16)
    crops = (pixels - mean[:, None, None]) / std[:, None, None]
    watch = DataWatch(mean.tolist(), std.tolist(), ALONE)
    batch = replace(batch_of([0, 1]), global_crops=crops)
    watch.observe(batch)
    seen = watch.summarise(batch)
    assert seen["pixel_low"] == pytest.approx(0.0, abs=1e-6)
    assert seen["pixel_high"] == pytest.approx(0.9, abs=1e-6)
    assert seen["pixel_limits"] == pytest.approx(float((pixels < 1 / 512).float().mean()), abs=1e-3)
    channels = [float(crops[:, channel].mean()) for channel in range(3)]
    assert seen["pixel_mean"] == pytest.approx(max(channels, key=abs), rel=1e-5)


def test_pixels_that_come_twice_are_found_across_lines_and_the_process_is_named() -> None:
    watch = DataWatch((0.5,), (0.25,), Second())
    for seed in (1, 2, 2):
        watch.observe(batch_of([1, 2], seed=seed))
    seen = watch.summarise(batch_of([1, 2], seed=2))
    assert (seen["stale_steps"], seen["stale_rank"]) == (1, 1)
    watch.observe(batch_of([3, 4], seed=2))  # other images, and yet the pixels of the last step
    assert watch.summarise(batch_of([3, 4], seed=2))["stale_steps"] == 1
    watch.observe(batch_of([3, 4], seed=3))
    assert watch.summarise(batch_of([3, 4], seed=3))["stale_steps"] == 0


def test_parts_that_never_moved_are_named_and_not_all_of_them() -> None:
    def networks() -> torch.nn.ModuleDict:
        backbone = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))})
        return torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Linear(3, 2)})

    student, teacher = networks(), networks()
    teacher.load_state_dict(student.state_dict())

    def after(**options: object) -> object:
        watch = WeightWatch(student, teacher, ALONE, **options)
        watch.before()
        return watch.after().get("frozen_parts")

    assert after() is None  # before the first step all are as they were
    with torch.no_grad():
        student["head"].bias[1] += 1e-7
        student["backbone"]["blocks"][2].weight[0, 0] += 1.0
    assert after() == "blocks.0, blocks.1"
    assert after(frozen=["backbone"]) is None
    assert after(frozen=["backbone", "head"]) is None  # as in a first phase of going on, where nothing learns yet


def test_files_have_one_checksum_where_they_are_equal_and_another_where_a_byte_differs() -> None:
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    large = random.integers(0, 256, (700, 700, 3), dtype=np.uint8)
    for pixels in (small, large):
        same, changed = pixels.copy(), pixels.copy()
        changed[-1, -1, -1] ^= 1
        of = [EncodedImage(each).checksum() for each in (pixels, same, changed)]
        assert of[0] == of[1] != of[2]
