"""Rotary positions: the literal formula, groups together as each alone, distortions, and a run that is resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import loss_trace, stopped_after, tiny_config

from dinoreg.models.registry import build, parse_name
from dinoreg.models.rope import Rope, turn_groups
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.train import loop
from dinoreg.visualize.attention import attention_rows


def rotary(**options: Any) -> RegisterViT:
    """A small model whose positions show in its output."""
    torch.manual_seed(2)
    arguments: dict[str, Any] = {
        "image_size": (24, 32), "patch_size": 8, "dim": 48, "depth": 2, "heads": 3, "layerscale": 1.0, "init_std": 0.3,
        "rope_base": 100.0, "key_bias": False, "norm_eps": 1e-5,
    }  # fmt: skip
    model = RegisterViT(**(arguments | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_token", "_tokens", "bias")):
                parameter.normal_(std=0.5)
    return model.eval()


def turned_literally(vector: list[float], row: int, column: int, grid: tuple[int, int], base: float) -> list[float]:
    """One query or key: channel i and the one half a head further turn by an angle."""
    width = len(vector)
    out = list(vector)
    for i in range(width // 2):
        axis, number = divmod(i, width // 4)
        place = 2 * ((row, column)[axis] + 0.5) / grid[axis] - 1
        angle = 2 * math.pi * place / base ** (4 * number / width)
        a, b = vector[i], vector[i + width // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_queries_and_keys_of_patches_turn_by_the_literal_formula_and_nothing_else_does() -> None:
    grid, first, heads, width, base = (3, 2), 3, 2, 12, 50.0
    qkv = torch.randn(2 * 9, 3, heads, width)
    tables = Rope(base).tables([grid], first, width, qkv, training=True)
    found = turn_groups(qkv, ((2, 9),), tables).unflatten(0, (2, 9))
    expected = qkv.unflatten(0, (2, 9)).clone()
    for image in range(2):
        for patch in range(6):
            for kind in range(2):
                for head in range(heads):
                    vector = expected[image, first + patch, kind, head].tolist()
                    turned = torch.tensor(turned_literally(vector, *divmod(patch, 2), grid, base))
                    expected[image, first + patch, kind, head] = turned
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert torch.equal(found[:, :first], qkv.unflatten(0, (2, 9))[:, :first])
    assert torch.equal(found[:, :, 2], qkv.unflatten(0, (2, 9))[:, :, 2])


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_together_are_as_each_alone(backend: str, dtype: torch.dtype) -> None:
    model = rotary(attention=backend)
    groups = [torch.randn(2, 3, 24, 32), torch.randn(3, 3, 16, 8), torch.randn(1, 3, 40, 24)]
    hidden = torch.rand(2, 12) < 0.4
    chosen = [torch.tensor([3, 15]), torch.tensor([0, 5]), torch.empty(0, dtype=torch.int64)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        together = model(groups, [hidden, None, None])
        selected = model(groups, [hidden, None, None], chosen)
        for group, mask, tokens, some, index in zip(groups, [hidden, None, None], together, selected, chosen):
            alone = model(group, mask)
            close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.1}
            torch.testing.assert_close(tokens, alone, **close)
            torch.testing.assert_close(some.cls, alone.cls, **close)
            torch.testing.assert_close(some.patches, alone.patches.flatten(0, 1)[index], **close)


def test_positions_matter_and_no_tensor_holds_them() -> None:
    model = rotary()
    assert not [name for name in model.state_dict() if "pos" in name]
    images = torch.randn(1, 3, 24, 32)
    moved = images.roll(8, dims=2)
    ours, theirs = model(images).patches.unflatten(1, (3, 4)), model(moved).patches.unflatten(1, (3, 4))
    assert (ours.roll(1, dims=1) - theirs).abs().max() > 1e-2
    rebuilt = RegisterViT(**model.architecture())
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(images).cls, model(images).cls)


def test_views_have_the_attention_that_the_model_computes_with() -> None:
    model = rotary()
    images = torch.randn(2, 3, 32, 16)
    for layer in range(2):
        weights = model.attention(images, layer)
        x = model._run(model._begin([images]), layer).unflatten(0, (2, -1))
        block: Any = model.blocks[layer]
        _, _, v = model.qkv(images, layer)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        shapes = ((2, x.shape[1]),)
        tables = model.rope_tables([images])
        used = block.attn(block.norm1(x).flatten(0, 1), shapes, ("sdpa",), tables)
        torch.testing.assert_close(block.attn.proj(mixed).flatten(0, 1), used, rtol=0, atol=1e-5)
        rows = attention_rows(model, images, [layer])[0]
        torch.testing.assert_close(rows, weights[:, :, :5], rtol=0, atol=1e-6)


def test_keys_without_a_bias_have_none_and_its_place_gets_no_gradient() -> None:
    model = rotary()
    attention: Any = model.blocks[0].attn
    x = torch.randn(5, 48)
    q, k, _ = attention.project(x).unbind(1)
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    torch.testing.assert_close(k.flatten(1), x @ weights[1].T, rtol=0, atol=1e-5)
    torch.testing.assert_close(q.flatten(1), x @ weights[0].T + biases[0], rtol=0, atol=1e-5)
    (model.train()(torch.randn(1, 3, 16, 16)).cls @ torch.randn(48)).sum().backward()
    gradient = attention.qkv.bias.grad.chunk(3)
    assert not gradient[1].any()
    assert gradient[0].any()
    assert gradient[2].any()


def test_a_training_pass_distorts_places_by_the_seed_and_within_the_bounds_and_evaluation_does_not() -> None:
    x, place = torch.zeros(1), (5, 3)
    rope = Rope(100.0, shift=0.2, jitter=1.5, rescale=2.0)
    plain = Rope(100.0).tables([place], 0, 16, x, training=False)[0]
    assert torch.equal(rope.tables([place], 0, 16, x, training=False)[0], plain)

    def places(table: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows and columns, from the angles of the longest period: it is so long that none wraps around."""
        angles = torch.atan2(table[1, :, 0, 0, 8:], table[0, :, 0, 0, :8]).unflatten(0, place)
        period = 100 ** (3 / 4)
        return angles[:, 0, 3] * period / (2 * math.pi), angles[0, :, 7] * period / (2 * math.pi)

    rows, columns = places(plain)
    torch.testing.assert_close(rows, torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]), rtol=0, atol=1e-5)
    torch.testing.assert_close(columns, torch.tensor([-2 / 3, 0.0, 2 / 3]), rtol=0, atol=1e-5)
    factors, shifts = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        table = rope.tables([place], 0, 16, x, training=True)[0]
        torch.manual_seed(seed)
        assert torch.equal(rope.tables([place], 0, 16, x, training=True)[0], table)
        rows, columns = places(table)
        factors.append([float(rows[1] - rows[0]) / 0.4, float(columns[1] - columns[0]) * 1.5])
        shifts.append([float(rows[2]) / factors[-1][0], float(columns[1]) / factors[-1][1]])
    found = torch.tensor(factors).log()
    assert found.abs().max() < math.log(3.0) + 1e-4
    assert found.abs().max() > math.log(2.0)
    assert found.mean().abs() < 0.1  # as often larger as smaller
    between = (found[:, 0] - found[:, 1]).abs()  # one factor for both axes, and one for each
    assert 0.5 < between.max() < 2 * math.log(1.5) + 1e-4
    assert 0.15 < torch.tensor(shifts).abs().max() < 0.2 + 1e-4


def test_names_of_dinov3_mean_its_models() -> None:
    aliases = (
        ("dinov3_vits16plus", "facebook/dinov3-vits16plus-pretrain-lvd1689m", "vit_small_plus_patch16_dinov3.lvd1689m"),
        ("dinov3_vitl16", "dinov3-vitl16-pretrain-sat493m", "vit_large_patch16_dinov3_qkvb.lvd1689m"),
        ("dinov3_vit7b16", "facebook/dinov3-vit7b16-pretrain-lvd1689m", "vit_7b_patch16_dinov3"),
    )
    for first, *others in aliases:
        assert all(parse_name(other) == parse_name(first) for other in others)
    millions = {}
    with torch.device("meta"):
        for name in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus"):
            model = build(f"{name}_reg4_rope")
            millions[name] = round(sum(p.numel() for p in model.parameters()) / 1e6)
            assert (model.rope, model.key_bias, model.norm_eps) == (Rope(100.0, rescale=2.0), False, 1e-5)
    # arXiv 2508.10104, table 3: 21, 29, 86, 300 and 840 million
    assert millions == {"vits16": 22, "vits16plus": 29, "vitb16": 86, "vitl16": 303, "vith16plus": 841}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 18}, "dim=18 does not divide into heads=3 of whole fours"),
        ({"rope_jitter": 0.5}, "rope_jitter=0.5 is out of range"),
        ({"rope_base": math.inf}, "rope_base=inf is out of range"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rotary(**options)


RUN = {"model__name": "vitt8_reg4_rope", "model__rope_jitter": 1.5, "model__rope_shift": 0.1}


def test_a_resumed_run_with_rotary_positions_repeats_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    loop.pretrain(tiny_config(tmp_path / "whole", checkpoint__every=3, **RUN))
    with stopped_after(5, tmp_path / "parts"):
        loop.pretrain(tiny_config(tmp_path / "parts", checkpoint__every=3, **RUN))
    loop.pretrain(tiny_config(tmp_path / "parts", checkpoint__every=3, resume=True, **RUN))
    assert loss_trace(tmp_path / "parts") == loss_trace(tmp_path / "whole")
    plain = tiny_config(tmp_path / "plain", steps=1, **RUN | {"model__rope_jitter": 1.0, "model__rope_shift": 0.0})
    loop.pretrain(plain)
    assert loss_trace(tmp_path / "plain")[0] != loss_trace(tmp_path / "whole")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_have_the_distortion_of_the_pass_that_was_made(dtype: torch.dtype) -> None:
    images = [torch.randn(2, 3, 24, 32), torch.randn(3, 3, 16, 16)]
    gradients = []
    for checkpointing in (False, True):
        model = rotary(rope_jitter=1.5, rope_shift=0.3, checkpointing=checkpointing, drop_path=0.3).train()
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            tokens = model(images, None, [torch.arange(5), torch.arange(3)])
        sum(each.cls.float()[:, ::2].sum() + each.patches.float()[:, 1::3].sum() for each in tokens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_run_of_before_there_were_rotary_positions_is_resumed_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = loop.pretrain(tiny_config(tmp_path / "run", steps=1))
    path = out / "config.yaml"
    lines = path.read_text().replace("  ffn_ratio: null\n", "  ffn_ratio: 4.0\n").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("  rope_")) + "\n")
    assert "ffn_ratio: 4.0" in path.read_text()
    capsys.readouterr()
    loop.pretrain(tiny_config(out, steps=2, resume=True))
    assert "ffn_ratio" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"model\.ffn_ratio=2\.0"):
        loop.pretrain(tiny_config(out, steps=3, resume=True, model__ffn_ratio=2.0))
    with pytest.raises(UserError, match=r"model\.name=vitt8_reg4_rope"):
        loop.pretrain(tiny_config(out, steps=3, resume=True, model__name="vitt8_reg4_rope"))
