"""The soft cross-entropy and DINO's loss against double loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinoreg.losses.dino import dino_loss, soft_cross_entropy


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _targets(rows: int, prototypes: int, seed: int = 7) -> Tensor:
    return torch.softmax(_random(rows, prototypes, seed=seed), dim=-1)


def _cross_entropy(q: Tensor, s: Tensor, student_temp: float) -> Tensor:
    """H(q, s) of one row, entry by entry."""
    total = sum(torch.exp(value / student_temp) for value in s)
    return -sum(q[k] * torch.log(torch.exp(s[k] / student_temp) / total) for k in range(len(s)))


def _literal(logits: Tensor, targets: Tensor, temp: float, weights: Tensor | None) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(logits)):
        weight = 1.0 if weights is None else weights[i]
        loss = loss + weight * _cross_entropy(targets[i % len(targets)], logits[i], temp)
    return loss


CASES = [  # rows of logits, rows of targets, weighted
    (5, 5, False),
    (5, 5, True),
    (6, 2, False),
    (6, 3, True),
    (1, 1, False),
]


@pytest.mark.parametrize(("rows", "num_targets", "weighted"), CASES)
@pytest.mark.parametrize("piece", [1, 14, 1 << 19])  # one row, two rows, everything at once
def test_soft_cross_entropy_equals_a_double_loop(
    rows: int, num_targets: int, weighted: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.runtime.tiling.CPU_CHUNK", piece)
    logits = _random(rows, 7).requires_grad_()
    targets = _targets(num_targets, 7) * 2  # mass 2, as the sum of two views
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    loss = soft_cross_entropy(logits, targets, 0.3, weights)
    expected = _literal(logits, targets, 0.3, weights)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss * 3, logits)
    (expected_grad,) = torch.autograd.grad(expected * 3, logits)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(("rows", "num_targets", "weighted"), CASES)
def test_soft_cross_entropy_passes_gradcheck(rows: int, num_targets: int, weighted: bool) -> None:
    logits = _random(rows, 7).requires_grad_()
    targets = _targets(num_targets, 7) * torch.linspace(0, 2, num_targets, dtype=torch.float64)[:, None]
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets, 0.5, weights), logits, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_soft_cross_entropy_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (_random(12, 4000) * 0.3).clamp(-1, 1).to(dtype)
    targets = _targets(12, 4000).float()
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = soft_cross_entropy(x, targets, 0.1)
    expected = soft_cross_entropy(truth, targets.double(), 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    (loss / 12).backward()
    (expected / 12).backward()
    assert x.grad is not None
    assert truth.grad is not None
    assert x.grad.dtype == dtype
    error = (x.grad.double() - truth.grad).norm() / truth.grad.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 2e-6}[dtype]


def test_tiny_gradients_of_float16_logits_survive_a_loss_scale() -> None:
    logits = torch.zeros(2, 60000, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(2, 60000)
    targets[:, 0] = 1
    (soft_cross_entropy(logits, targets, 0.1) * 1e-3 * 65536.0).backward()
    assert logits.grad is not None
    expected = 65.536 / 60000 / 0.1
    torch.testing.assert_close(logits.grad[:, 1:].float().mean().item(), expected, rtol=1e-3, atol=0)


def test_soft_cross_entropy_is_the_same_under_autocast() -> None:
    logits, targets = _random(6, 50).float(), _targets(6, 50).float()
    plain = soft_cross_entropy(logits, targets, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(soft_cross_entropy(logits, targets, 0.1), plain, rtol=0, atol=0)


def test_soft_cross_entropy_is_finite_for_large_logits() -> None:
    logits = (_random(3, 20) * 1000).float().requires_grad_()
    loss = soft_cross_entropy(logits, _targets(3, 20).float(), 0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("num_targets", [0, 3])
def test_soft_cross_entropy_of_no_rows_is_zero_and_still_part_of_the_graph(num_targets: int) -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.zeros(num_targets, 5), 0.1, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)


def test_soft_cross_entropy_gives_targets_no_gradient_and_keeps_no_graph_without_one() -> None:
    logits, targets = _random(4, 5), _targets(4, 5).requires_grad_()
    assert not soft_cross_entropy(logits, targets, 0.1).requires_grad
    loss = soft_cross_entropy(logits.requires_grad_(), targets, 0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], first, rtol=0, atol=0)
    assert targets.grad is None


@pytest.mark.parametrize(
    ("logits", "targets", "weights"),
    [
        ((4, 5), (4, 6), None),
        ((5, 5), (2, 5), None),
        ((4, 5), (0, 5), None),
        ((4, 5), (2, 5), 2),
    ],
)
def test_soft_cross_entropy_rejects_shapes_that_do_not_fit(
    logits: tuple[int, int], targets: tuple[int, int], weights: int | None
) -> None:
    with pytest.raises(RuntimeError, match=r"size|shape"):
        soft_cross_entropy(
            torch.zeros(logits),
            torch.zeros(targets),
            0.1,
            None if weights is None else torch.ones(weights),
        )


@pytest.mark.parametrize(("batch_size", "num_local"), [(3, 4), (1, 2), (2, 1), (1, 0), (3, 0)])
def test_dino_loss_equals_a_loop_over_all_pairs(batch_size: int, num_local: int) -> None:
    student_global = _random(2 * batch_size, 7).requires_grad_()
    student_local = _random(num_local * batch_size, 7, seed=1).requires_grad_()
    targets = _targets(2 * batch_size, 7)
    num_pairs = 2 + 2 * num_local
    expected_global = expected_local = torch.zeros((), dtype=torch.float64)
    for b in range(batch_size):
        for teacher_view in range(2):
            q = targets[teacher_view * batch_size + b]
            for view in range(2):
                if view != teacher_view:
                    s = student_global[view * batch_size + b]
                    expected_global = expected_global + _cross_entropy(q, s, 0.2) / num_pairs / batch_size
            for crop in range(num_local):
                s = student_local[crop * batch_size + b]
                expected_local = expected_local + _cross_entropy(q, s, 0.2) / num_pairs / batch_size
    global_loss, local_loss = dino_loss(student_global, student_local if num_local else None, targets, 0.2)
    torch.testing.assert_close(global_loss, expected_global)
    torch.testing.assert_close(local_loss, expected_local)
    (grad,) = torch.autograd.grad(global_loss, student_global)
    torch.testing.assert_close(grad, torch.autograd.grad(expected_global, student_global)[0])
    if num_local:
        (grad,) = torch.autograd.grad(local_loss, student_local)
        torch.testing.assert_close(grad, torch.autograd.grad(expected_local, student_local)[0])
    else:
        assert not local_loss.requires_grad
        assert torch.equal(dino_loss(student_global, student_local, targets, 0.2)[1], local_loss)


def test_swapping_the_teachers_views_changes_the_global_loss_only() -> None:
    student_global, student_local, targets = _random(6, 9), _random(12, 9, seed=1), _targets(6, 9)
    global_loss, local_loss = dino_loss(student_global, student_local, targets, 0.1)
    other_global, other_local = dino_loss(student_global, student_local, targets.roll(3, dims=0), 0.1)
    assert (global_loss - other_global).abs() > 0.1
    torch.testing.assert_close(local_loss, other_local)


@pytest.mark.parametrize(
    ("prototypes", "expected_local", "expected_global"), [(65536, 9.858, 1.232), (131072, 10.474, 1.309)]
)
def test_uniform_logits_give_the_known_losses_of_the_first_step(
    prototypes: int, expected_local: float, expected_global: float
) -> None:
    targets = torch.full((2, prototypes), 1 / prototypes)
    global_loss, local_loss = dino_loss(torch.zeros(2, prototypes), torch.zeros(8, prototypes), targets, 0.1)
    assert local_loss.item() == pytest.approx(16 / 18 * math.log(prototypes), rel=1e-5)
    assert local_loss.item() == pytest.approx(expected_local, abs=6e-4)
    assert global_loss.item() == pytest.approx(expected_global, abs=6e-4)


def test_dino_loss_rejects_rows_that_are_not_whole_images() -> None:
    with pytest.raises(ValueError, match="student_global"):
        dino_loss(torch.zeros(4, 5), None, torch.zeros(6, 5), 0.1)
    with pytest.raises(ValueError, match="student_global"):
        dino_loss(torch.zeros(3, 5), None, torch.zeros(3, 5), 0.1)
    with pytest.raises(ValueError, match="student_local"):
        dino_loss(torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(4, 5), 0.1)
