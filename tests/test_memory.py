"""A training step on fake tensors holds and frees what the real one does, byte for byte, and grows as the plan says."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

import dinoreg.plan.memory as plan_memory
from dinoreg.config.load import Config
from dinoreg.distributed.process_group import ALONE, simulated_session
from dinoreg.plan.devices import find_device
from dinoreg.plan.job import Job, describe
from dinoreg.plan.memory import step_peaks
from dinoreg.plan.recorder import BACKWARD_END, KOLEO, STUDENT, TEACHER, UPDATE
from dinoreg.plan.step import random_batch
from dinoreg.plan.trace import Trace, record_step, trace_job, trace_step
from dinoreg.runtime.device import DTYPES
from dinoreg.train.state import TrainState, build_networks
from tests.training import tiny_config

CPU = torch.device("cpu")
# Every crop has the same number of hidden patches: what a process sees is then known exactly.
EVEN_MASKS = {"mask.probability": 1.0, "mask.ratio": [0.3, 0.3], "mask.min_patches": 1}


def small(**overrides: Any) -> Config:
    return tiny_config(
        **{
            **EVEN_MASKS,
            "batch_size": 4,
            "model.attention": "sdpa",
            "model.depth": 3,
            "head.prototypes": 1000,
            **overrides,
        }
    )


def job_of(config: Config, processes: int = 1) -> Job:
    return describe(config, 1, processes, dataclasses.replace(find_device("h100"), kind="cpu"))


def real_step(config: Config, precision: str, processes: int = 1) -> tuple[Trace, tuple[int, ...]]:
    """The record of a step on real tensors, and the masked patches of each of its micro-batches."""
    with simulated_session(processes) if processes > 1 else contextlib.nullcontext(ALONE) as ranks:
        state = TrainState(config, *build_networks(config), CPU, DTYPES[precision], ranks=ranks)
        batch = random_batch(config, state.student.backbone.patch_size, CPU)
        parts = config.optim.accumulate
        masked = (len(batch.mask_indices) // parts,) * parts
        return record_step(config, state, batch), masked


MODES = [
    {},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"model.drop_path": 0.0, "precision": "bf16"},
    {"model.checkpointing": True, "precision": "bf16"},
    {"optim.accumulate": 2},
    {"model.ffn": "swiglu", "head.separate": True, "crops.num_local": 0},
    {"loss.centering": "sinkhorn", "head.prototypes": 20000},
    {"model.attention": "plain", "batch_size": 1},
    {"model.name": "vitt8_reg4_rope", "precision": "bf16"},
    {"loss.paka_weight": 1.0},
]


def name_of(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as it is"


@pytest.mark.parametrize("overrides", MODES, ids=name_of)
def test_a_step_on_fake_tensors_holds_what_the_real_one_does(overrides: dict[str, Any]) -> None:
    config = small(**overrides)
    real, masked = real_step(config, config.precision)
    fake = trace_step(config, config.precision, 1, "cpu", masked)
    assert fake.peaks == real.peaks
    assert fake.operations == real.operations


@pytest.mark.parametrize(
    "overrides",
    [{}, {"parallel.reshard": True, "precision": "bf16"}, {"parallel.shard": 2, "loss.koleo_ranks": 2}],
    ids=name_of,
)
def test_a_sharded_step_on_fake_tensors_gathers_and_frees_what_the_real_one_does(overrides: dict[str, Any]) -> None:
    config = small(**{"parallel.strategy": "fsdp", **overrides})
    real, masked = real_step(config, config.precision, processes=4)
    assert trace_step(config, config.precision, 4, "cpu", masked).peaks == real.peaks


def test_every_part_of_a_step_is_told_apart() -> None:
    config = small(**{"precision": "bf16", "loss.centering": "softmax"})
    job = job_of(config)
    peaks = step_peaks(job)
    weights = 4 * job.sizes.student
    for parts in peaks.values():
        assert parts["student weights"] == parts["teacher weights"] == weights
        assert parts["AdamW moments"] == 2 * weights + 4 * sum(1 for _ in build_networks(config)[0].parameters())
    crops = 4 * 4 * 3 * (2 * 32**2 + 2 * 16**2)
    assert crops < peaks[TEACHER]["crops"] < 1.1 * crops  # with masks
    assert peaks[UPDATE]["gradients"] == weights
    assert "gradients" not in peaks[STUDENT]
    assert peaks[KOLEO]["similarities for KoLeo"] == 4 * 2 * 4 * 4
    stored = {
        "activations of the backbone",
        "activations of the heads",
        "weights in low precision",
        "logits and targets",
    }
    assert stored <= peaks[STUDENT].keys()
    assert "activations of the heads" not in peaks[BACKWARD_END]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ({"model.depth": 7}, 1),
        ({"model.depth": 7, "model.checkpointing": True, "optim.accumulate": 2}, 1),
        ({"model.depth": 4, "optim.accumulate": 4}, 1),
        ({"model.depth": 6, "parallel.strategy": "fsdp"}, 4),
        ({"model.depth": 6, "optim.accumulate": 4, "parallel.strategy": "ddp"}, 4),
    ],
    ids=str,
)
def test_few_blocks_and_micro_batches_extended_are_many(
    overrides: dict[str, Any], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(small(**overrides), processes)
    extended = step_peaks(job)
    monkeypatch.setattr(plan_memory, "BLOCKS", (3, 100))
    monkeypatch.setattr(plan_memory, "MICRO_BATCHES", (2, 100))
    whole = step_peaks(job)
    assert extended.keys() == whole.keys()
    for moment, parts in whole.items():  # scalars of the first micro-batch do not multiply
        assert sum(extended[moment].values()) == pytest.approx(sum(parts.values()), abs=16)


def test_sharding_divides_the_state_and_leaves_the_activations() -> None:
    config = small(**{"parallel.strategy": "fsdp"})
    alone, sharded = job_of(config), job_of(config, processes=8)
    one, eighth = step_peaks(alone)[STUDENT], step_peaks(sharded)[STUDENT]
    assert eighth["student weights"] == eighth["teacher weights"] == 4 * sharded.padded() // 8
    assert one["student weights"] == 4 * alone.sizes.student
    assert eighth["activations of the heads"] == one["activations of the heads"]
    assert eighth["gathered weights"] == 4 * sharded.padded()  # they stay until the backward pass


def test_micro_batches_hold_the_activations_of_their_own_images() -> None:
    whole, half = job_of(small(**{"batch_size": 8, "optim.accumulate": 2})), job_of(small(**{"batch_size": 4}))
    name = "activations of the backbone"
    (masked,) = set(plan_memory._masked(whole, 2))
    tokens = 4 * (2 + 2) + masked  # of the micro-batch before, whose class tokens are still at hand
    assert step_peaks(whole)[STUDENT][name] == step_peaks(half)[STUDENT][name] + tokens * 32 * 4
    assert step_peaks(whole)[STUDENT]["gradients"] == 4 * whole.sizes.student


def test_checkpointing_keeps_the_inputs_of_the_blocks_alone() -> None:
    overrides = {"model.drop_path": 0.0, "model.checkpointing": True}
    name = "activations of the backbone"
    three = step_peaks(job_of(small(**overrides)))[STUDENT][name]
    four = step_peaks(job_of(small(**overrides, **{"model.depth": 4})))[STUDENT][name]
    tokens = 4 * (2 * (1 + 4 + 16) + 2 * (1 + 4 + 4))
    assert four - three == tokens * 32 * 4
    assert three < step_peaks(job_of(small(**{"model.drop_path": 0.0})))[STUDENT][name]


def test_copies_of_the_state_hold_gradients_in_buckets_all_the_time() -> None:
    config = small(**{"parallel.strategy": "ddp"})
    job = job_of(config, processes=4)
    assert {parts["gradients"] for parts in step_peaks(job).values()} == {4 * job.sizes.student}
    split = job_of(small(**{"parallel.strategy": "ddp", "optim.accumulate": 2}), processes=4)
    assert step_peaks(split)[UPDATE]["gradients"] == 2 * 4 * job.sizes.student


def test_a_trace_leaves_random_numbers_and_process_groups_alone() -> None:
    before = torch.get_rng_state()
    job = job_of(small(**{"parallel.strategy": "fsdp", "seed": 5}), processes=2)
    trace_job(job, 3, (8,))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.distributed.is_initialized()
