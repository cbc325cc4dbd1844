"""The masked patch loss against a loop over crops, and its corners."""

from __future__ import annotations

import math

import pytest
import torch

from dinoreg.data.masks import mask_tensors
from dinoreg.losses.ibot import ibot_loss

MASK = torch.tensor(
    [
        [1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def test_ibot_loss_equals_a_loop_over_crops_and_patches() -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.softmax(torch.randn(4, 5, 7, dtype=torch.float64), dim=-1)
    expected = torch.zeros((), dtype=torch.float64)
    for crop in range(4):
        hidden = [patch for patch in range(5) if MASK[crop, patch]]
        for patch in hidden:
            log_probs = torch.log_softmax(student[crop, patch] / 0.2, dim=-1)
            expected = expected - (teacher[crop, patch] * log_probs).sum() / len(hidden) / 4
    indices, weights = mask_tensors(MASK)
    loss = ibot_loss(student.flatten(0, 1)[indices], teacher.flatten(0, 1)[indices], weights.double(), 4, 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the weights are float32 thirds
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, student)[0], rtol=1e-6, atol=1e-9)


def test_unmasked_crops_count_in_the_denominator() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 7), torch.softmax(torch.randn(4, 7), dim=-1)
    _, weights = mask_tensors(MASK)
    with_unmasked = ibot_loss(logits, targets, weights, 4, 0.1)
    masked_only = ibot_loss(logits, targets, weights, 2, 0.1)
    torch.testing.assert_close(with_unmasked, masked_only / 2)


@pytest.mark.parametrize(("prototypes", "expected"), [(65536, 5.545), (131072, 5.892)])
def test_uniform_logits_give_the_known_loss_of_the_first_step(prototypes: int, expected: float) -> None:
    _, weights = mask_tensors(MASK)
    loss = ibot_loss(torch.zeros(4, prototypes), torch.full((4, prototypes), 1 / prototypes), weights, 4, 0.1)
    assert loss.item() == pytest.approx(0.5 * math.log(prototypes), rel=1e-5)
    assert loss.item() == pytest.approx(expected, abs=6e-4)


def test_a_batch_without_masked_patches_costs_nothing_and_can_be_differentiated() -> None:
    tokens = torch.randn(8, 3, requires_grad=True)
    last_layer = torch.randn(3, 5, requires_grad=True)
    indices, weights = mask_tensors(torch.zeros(2, 4, dtype=torch.bool))
    loss = ibot_loss(tokens[indices] @ last_layer, torch.zeros(0, 5), weights, 2, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert tokens.grad is not None
    assert last_layer.grad is not None
    assert tokens.grad.abs().max() == 0
    assert last_layer.grad.abs().max() == 0


def test_one_image_gives_a_finite_loss() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    _, weights = mask_tensors(mask)
    assert ibot_loss(torch.randn(2, 5), torch.full((2, 5), 0.2), weights, 2, 0.1).isfinite()
