"""The KoLeo regulariser against a search over all pairs, and where features coincide."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dinoreg.losses.koleo import koleo_loss


@pytest.mark.parametrize(("batch_size", "dim"), [(6, 4), (2, 3), (9, 384)])
def test_koleo_loss_equals_a_search_over_all_pairs(batch_size: int, dim: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(batch_size, dim, dtype=torch.float64, requires_grad=True)
    x = [feature / feature.norm() for feature in features]
    nearest = [min((x[i] - x[j]).norm() for j in range(batch_size) if j != i) for i in range(batch_size)]
    expected = -torch.stack(nearest).log().mean()
    loss = koleo_loss(features)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)  # eps = 1e-8 in the norm and in the log
    (grad,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, features)[0], rtol=1e-5, atol=1e-6)


def test_koleo_loss_of_random_directions_has_the_known_value() -> None:
    torch.manual_seed(0)
    assert koleo_loss(torch.randn(64, 384)).item() == pytest.approx(-0.28, abs=0.01)


def test_koleo_loss_ignores_the_length_of_features() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 4)
    torch.testing.assert_close(koleo_loss(features * torch.rand(6, 1).add(0.1)), koleo_loss(features))


def test_the_gradient_reaches_both_ends_of_a_pair() -> None:
    # 0 and 1 are each other's nearest; 2 has 1 as its nearest, and is nobody's.
    features = torch.tensor([[1.0, 0.0], [0.9, 0.3], [0.0, 1.0]], requires_grad=True)
    x = F.normalize(features, dim=-1)
    of_two = -torch.log((x[2] - x[1]).norm()) / 3
    of_the_others = -torch.log((x[0] - x[1]).norm()) * 2 / 3
    (from_two,) = torch.autograd.grad(of_two, features, retain_graph=True)
    (from_the_others,) = torch.autograd.grad(of_the_others, features)
    (grad,) = torch.autograd.grad(koleo_loss(features), features)
    assert from_two[1].norm() > 0.1
    torch.testing.assert_close(grad, from_two + from_the_others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_duplicates_are_finite_in_value_and_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 384).expand(4, 384).to(dtype).clone().requires_grad_()
    loss = koleo_loss(features)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(384) + 1e-8), rel=1e-3)
    loss.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_features_of_zero_length_are_finite() -> None:
    features = torch.zeros(3, 5, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_half_precision_features_are_compared_in_float32_even_under_autocast() -> None:
    torch.manual_seed(0)
    features = torch.randn(16, 32).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(features)
    torch.testing.assert_close(loss, koleo_loss(features.float()), rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [0, 1])
def test_a_lone_feature_costs_nothing_and_gets_a_gradient_of_zero(batch_size: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(batch_size, 5, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert torch.equal(features.grad, torch.zeros(batch_size, 5))


def test_two_views_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    first = torch.randn(6, 4, requires_grad=True)
    second = (first.detach() + 1e-3 * torch.randn(6, 4)).requires_grad_()
    loss = koleo_loss(first) + koleo_loss(second)
    assert koleo_loss(torch.cat([first, second])) > loss / 2 + 1  # together each finds its own twin
    (grad,) = torch.autograd.grad(loss, first)
    torch.testing.assert_close(grad, torch.autograd.grad(koleo_loss(first), first)[0])
