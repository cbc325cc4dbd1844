"""Closed-form counts of operations against those that fvcore and PyTorch count on the real code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinoreg.plan.devices import find_device
from dinoreg.plan.flops import Encoder, head, step
from dinoreg.plan.job import describe
from dinoreg.plan.operations import check_operations
from dinoreg.plan.speed import random_batch
from dinoreg.train.schedules import Now
from dinoreg.train.state import build_networks, build_state
from dinoreg.train.step import train_step
from tests.training import tiny_config


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.name": "vits14_reg4", "crops.global_size": 224, "crops.local_size": 98},
        {"model.name": "vitb16_reg0", "model.depth": 3, "crops.global_size": 96, "crops.local_size": 48},
        {"model.name": "vitg14_reg4", "model.depth": 2, "crops.global_size": 98, "crops.num_local": 0},
        {"head.layers": 1, "head.bottleneck_dim": 24},
        {"head.separate": True, "head.ibot_prototypes": 31, "head.ibot_bottleneck_dim": 8, "model.ffn_ratio": 3.0},
    ],
    ids=lambda overrides: overrides.get("model.name", "tiny"),
)
def test_fvcore_counts_the_same_on_the_real_networks(overrides: dict[str, Any]) -> None:
    sizes = {} if "model.name" not in overrides else {"model.dim": None, "model.heads": None}
    if "model.name" in overrides and "model.depth" not in overrides:
        sizes["model.depth"] = None
    config = tiny_config(**{**sizes, **overrides})
    checks = check_operations(describe(config, 1, 1, find_device("h100")))
    assert len(checks) == 2 + bool(config.crops.num_local) + config.head.separate
    for check in checks:
        assert check.formula == check.counted
        assert check.agrees


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.drop_path": 0.0, "loss.koleo_weight": 0.0},
        {"model.ffn": "swiglu", "crops.num_local": 0},
        {"head.separate": True, "head.ibot_prototypes": 16},
        {"optim.accumulate": 2},
        {"model.checkpointing": True, "model.drop_path_uniform": False, "model.layerscale": 1e-5},
    ],
    ids=lambda overrides: ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as it is",
)
def test_pytorch_counts_the_same_in_a_whole_training_step(overrides: dict[str, Any]) -> None:
    masks = {"mask.probability": 1.0, "mask.ratio": [0.5, 0.5], "mask.min_patches": 1}
    config = tiny_config(**{**masks, "model.attention": "plain", "batch_size": 4, **overrides})
    state = build_state(config, *build_networks(config), torch.device("cpu"), torch.float32)
    batch = random_batch(config, state.student.backbone.patch_size, torch.device("cpu"))
    now = Now(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temp=0.1)
    options = {"loss": config.loss, "clip_grad": 1.0, "accumulate": config.optim.accumulate, "seed": 0}
    with FlopCounterMode(display=False) as counter:
        train_step(state, batch, now, dtype=torch.float32, **options)
    job = describe(config, 1, 1, find_device("h100"))
    assert len(batch.mask_indices) == job.masked_patches(4)
    assert counter.get_total_flops() == pytest.approx(4 * job.flops().total + job.koleo_flops(), rel=1e-9)


def test_what_is_added_to_a_step_is_counted_apart() -> None:
    encoder = Encoder(64, 2, 8)
    plain = step(encoder, global_size=32, local_size=16, num_local=3, prototypes=10)
    sizes = {"global_size": 32, "local_size": 16, "num_local": 3, "prototypes": 10}
    forward = 2 * encoder.blocks(32) + 3 * encoder.blocks(16)
    assert step(encoder, **sizes, checkpointing=True).again == forward
    assert step(encoder, **sizes, anchor=True).again == 2 * encoder.forward(32)
    half = step(encoder, **sizes, kept_share=(0.5, 1.0))
    assert half.dropped == 3 * 0.5 * 2 * encoder.blocks(32)
    assert half.total == plain.total - half.dropped


def test_a_head_of_one_layer_is_two_products() -> None:
    assert head(48, 100, 16, hidden_dim=999, layers=1) == 2 * (48 * 16 + 16 * 100)
