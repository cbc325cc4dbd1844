"""Operations of a step on fake tensors against PyTorch's counter on the real step, and against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinoreg.plan.devices import find_device
from dinoreg.plan.job import describe
from dinoreg.plan.memory import Operations, operations_of
from dinoreg.plan.step import random_batch
from dinoreg.plan.trace import trace_job
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.step import train_step
from tests.training import tiny_config


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.drop_path": 0.0, "loss.koleo_weight": 0.0},
        {"model.ffn": "swiglu", "crops.num_local": 0},
        {"head.separate": True, "head.ibot_prototypes": 16},
        {"optim.accumulate": 2, "loss.paka_weight": 1.0},
        {"model.checkpointing": True, "model.drop_path_uniform": False, "model.layerscale": 1e-5},
        {"model.depth": 7},
    ],
    ids=lambda overrides: ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as it is",
)
def test_pytorch_counts_the_same_in_a_whole_training_step(overrides: dict[str, Any]) -> None:
    masks = {"mask.probability": 1.0, "mask.ratio": [0.5, 0.5], "mask.min_patches": 1}
    config = tiny_config(**{**masks, "model.attention": "plain", "batch_size": 4, **overrides})
    state = TrainState(config, *build_networks(config), torch.device("cpu"), torch.float32)
    batch = random_batch(config, state.student.backbone.patch_size, torch.device("cpu"))
    now = Now(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temp=0.1)
    with FlopCounterMode(display=False) as counter:
        train_step(state, batch, now)
    job = describe(config, 1, 1, find_device("h100"))
    assert len(batch.mask_indices) == job.masked_patches(4)
    expected = 4 * operations_of(job).total + job.koleo_operations()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_masks_of_one_size_in_all_parts_of_a_batch_are_planned() -> None:
    masks = {"crops.global_size": 48, "mask.probability": 0.9, "mask.ratio": [0.1, 0.1], "batch_size": 8}
    job = describe(tiny_config(**masks, **{"optim.accumulate": 4}), 1, 1, find_device("h100"))
    usual = job.masked_patches(job.micro_batch_size)
    step = trace_job(job, 2, (usual,) * 4).operations
    found = operations_of(job)
    for kind in Operations.__dataclass_fields__:
        assert 8 * getattr(found, kind) == pytest.approx(step.get(kind, 0), rel=1e-9)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_a_step_takes_the_matrix_products_that_one_counts_by_hand(attention: str) -> None:
    config = tiny_config(**{"batch_size": 4, "model.drop_path": 0.0, "model.attention": attention})
    dim, depth, hidden, images, masked = 32, 2, 128, 4, 10
    crops = [(2 * images, 16), (2 * images, 4)]  # (crops, patches)
    backbone = [0, 0]  # on the global crops, on all
    attended = 0
    for last, (count, patches) in enumerate(crops):
        tokens = 1 + 4 + patches
        embedding = 2 * count * patches * (3 * 8 * 8) * dim
        projections = 2 * count * tokens * (3 * dim * dim + dim * dim)
        ffn = 2 * count * tokens * 2 * dim * hidden
        attention_products = 2 * (2 * count * tokens * tokens * dim)
        forward = depth * (projections + attention_products) + (depth - 1) * ffn
        backbone[1] += 3 * forward + 2 * embedding  # there is no gradient of the pixels
        attended += 3 * depth * attention_products
        if last == 0:
            backbone[0] = forward + embedding
            attended += depth * attention_products
    # Positions of 4 x 4 patches resampled to the 2 x 2 of local crops, rows first, and the gradient of the positions.
    columns = 2 * (2 * dim) * 4 * 2
    backbone[1] += 2 * (2 * 2 * 4 * (4 * dim) + columns)
    attended += 2 * columns  # as a batch of matrices
    ffn = 2 * 2 * dim * hidden  # the last block's, of the tokens that a loss looks at
    backbone[0] += (2 * images + masked) * ffn
    backbone[1] += 3 * (4 * images + masked) * ffn
    head = 2 * (32 * 40 + 40 * 40 + 40 * 16 + 16 * 24)
    heads = (2 * images + masked) * head + 3 * (4 * images + masked) * head

    counted = trace_job(describe(config, 1, 1, find_device("h100")), depth, (masked,)).operations
    assert counted == {
        "teacher": backbone[0],
        "student": backbone[1],
        "heads": heads,
        "attention": attended,
        "KoLeo": 2 * 2 * images**2 * dim,
    }


def test_what_is_added_to_a_step_is_counted_apart() -> None:
    def operations(**overrides: Any) -> Any:
        even = {"mask.probability": 1.0, "mask.ratio": [0.5, 0.5], "mask.min_patches": 1}
        usual = {"batch_size": 4, "model.drop_path": 0.0, "model.layerscale": 1.0}
        config = tiny_config(**{**even, **usual, **overrides})
        return operations_of(describe(config, 1, 1, find_device("h100")))

    plain = operations()
    assert plain.again == 0
    again = operations(model__checkpointing=True)
    embedding = 2 * (2 * 16 + 2 * 4) * 192 * 32
    resampling = (2 * 2 * 4 * (4 * 32) + 2 * (2 * 32) * 4 * 2) / 4  # of positions, once for the 4 images
    assert again.again == pytest.approx((plain.student - 2 * embedding - 2 * resampling) / 3)
    assert (again.student, again.teacher, again.heads) == (plain.student, plain.teacher, plain.heads)
    forward = (plain.student - 2 * resampling + embedding) / 3
    assert operations(optim__accumulate=2).again == pytest.approx(forward + 2 * resampling)  # in each half
    assert operations(model__drop_path=0.5).student < 0.65 * plain.student
    assert operations(init="weights", loss__anchor_weight=1.0).again > plain.teacher
