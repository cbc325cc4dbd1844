"""A step, the loader, runs and evaluations on a CUDA device that counts and computes nothing (`tests/fake_cuda`).

PyTorch's CUDA code is real here, the numbers are not: what is asserted are launches, waits, copies, memory, messages.
"""

from __future__ import annotations

import torch

from tests.fake_cuda.fixture import counts_of, needs_fake_cuda, run
from tests.training import TINY

pytestmark = needs_fake_cuda

# Kernels and matrix products of a step without augmentation; these numbers only go down.
LAUNCHES = {
    ("vits14_reg4", 128): 1452 + 215,
    ("vitl16_short_reg4_in1k", 64): 2378 + 407,
    ("vitg14_reg4_in22k", 8): 3875 + 679,
}
SMALL = {**TINY, "device": "cuda", "precision": "bf16", "batch_size": 8}


def test_a_step_launches_no_more_than_it_did_and_neither_it_nor_the_loader_makes_the_host_wait() -> None:
    loaded = {**SMALL, "data.workers": 2, "data.prefetch": 2}
    found = run("smoke", config="vits14_reg4", overrides={"batch_size": 128}, loaded=loaded, devices=2)
    of_step = counts_of(found["step"]["counts"])
    assert of_step.waits == {}
    assert of_step.mallocs == 0
    if torch.__version__.startswith("2.10."):  # another release has other kernels
        assert of_step.launches <= LAUNCHES["vits14_reg4", 128]
    batches = found["batches"]
    of_batches = counts_of(batches["counts"])
    assert {wait.partition(" < ")[0] for wait in of_batches.waits} <= {"event"}  # a worker's, for its buffer's copies
    assert "pageable to device large" not in of_batches.copies
    assert of_batches.copies["pinned to device"] == 6 * 5  # crops of two sizes, mask, its indices and weights
    assert of_batches.devices == [1]  # those of worker threads, too, whose current device is 0
    assert len(set(batches["buffers"])) == 3
