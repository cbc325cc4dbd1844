"""Prototype heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dinoreg.models.heads import PrototypeHead, WeightNormLinear, _ScaledRows
from dinoreg.runtime.errors import UserError


def test_last_layer_equals_torchs_weight_norm_in_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    ours = WeightNormLinear(5, 7)
    nn.init.uniform_(ours.weight_g, 0.5, 2.0)
    theirs = weight_norm(nn.Linear(5, 7, bias=False))
    theirs.load_state_dict(
        {
            "parametrizations.weight.original0": ours.weight_g.detach(),
            "parametrizations.weight.original1": ours.weight_v.detach(),
        }
    )
    x = torch.randn(3, 5)
    results = []
    for module in (ours, theirs):
        inputs = x.clone().requires_grad_()
        logits = module(inputs)
        (logits * torch.arange(21.0).view(3, 7).sin()).sum().backward()
        results.append([logits, inputs.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[0], results[1])


def test_rows_are_scaled_in_pieces_as_at_once_and_in_the_precision_of_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = WeightNormLinear(5, 11).double()
    nn.init.uniform_(layer.weight_g, 0.5, 2.0)
    x = torch.randn(3, 5, dtype=torch.float64)
    whole = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    monkeypatch.setattr("dinoreg.runtime.tiling.CPU_CHUNK", 5 * 4)  # pieces of 4, 4 and 3 rows
    parts = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda v, g: _ScaledRows.apply(v, g, v.dtype), (layer.weight_v, layer.weight_g))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer.float().weight()
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, layer.weight().bfloat16())


def test_head_equals_its_formula() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, 11, hidden_dim=9, bottleneck_dim=4)
    nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    x = torch.randn(5, 6)
    hidden = F.gelu(F.gelu(x @ head.mlp[0].weight.T) @ head.mlp[2].weight.T) @ head.mlp[4].weight.T
    for row, logits in zip(hidden, head(x)):
        for k in range(11):
            v, g = head.last_layer.weight_v[k], head.last_layer.weight_g[k, 0]
            cosine = (row @ v) / (row.norm() * v.norm())
            torch.testing.assert_close(logits[k], g * cosine)


def test_keys_and_shapes_are_the_published_ones() -> None:
    shapes = {k: tuple(v.shape) for k, v in PrototypeHead(6, 11, 9, 4).state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (9, 6),
        "mlp.0.bias": (9,),
        "mlp.2.weight": (9, 9),
        "mlp.2.bias": (9,),
        "mlp.4.weight": (4, 9),
        "mlp.4.bias": (4,),
        "last_layer.weight_g": (11, 1),
        "last_layer.weight_v": (11, 4),
    }
    single = PrototypeHead(6, 11, 9, 4, layers=1)
    assert sorted(single.state_dict()) == [
        "last_layer.weight_g",
        "last_layer.weight_v",
        "mlp.bias",
        "mlp.weight",
    ]
    assert single.mlp.weight.shape == (4, 6)
    assert sorted(PrototypeHead(6, 11, 9, 4, layers=2).mlp.state_dict()) == [
        "0.bias",
        "0.weight",
        "2.bias",
        "2.weight",
    ]


def test_every_parameter_is_plain_and_trained_and_lengths_start_at_one() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, 11, 9, 4, init_std=0.1)
    assert torch.equal(head.last_layer.weight_g, torch.ones(11, 1))
    assert head(torch.randn(50, 6)).abs().max() <= 1 + 1e-6
    head(torch.randn(3, 6)).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_linear_layers_start_with_the_requested_std() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(64, 5, 300, 16, init_std=0.07)
    assert head.mlp[2].weight.std().item() == pytest.approx(0.07, rel=0.02)
    assert head.mlp[2].bias.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_float32_parameters_and_gives_low_precision_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, 11, 9, 4, init_std=0.5)
    x = torch.randn(5, 6)
    exact = head(x)
    with torch.autocast("cpu", dtype):
        logits = head(x)
    assert logits.dtype == dtype
    assert (logits.float() - exact).abs().max() < 0.03
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())


def test_a_zero_token_gives_finite_logits_and_gradients() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, 11, 9, 4)
    logits = head(torch.zeros(2, 6))
    assert torch.equal(logits, torch.zeros(2, 11))
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_no_tokens_give_no_logits() -> None:
    assert PrototypeHead(6, 11, 9, 4)(torch.zeros(0, 6)).shape == (0, 11)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="head layers=0; expected at least 1"):
        PrototypeHead(6, 11, layers=0)
