"""Key names of Meta, timm and transformers: renamed back and forth without losing a bit, and told apart."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights import convert
from dinoreg.weights.files import find_backbone
from tests.peer_models import with_lost_terms

CASES = [(ffn, registers) for ffn in ("mlp", "swiglu") for registers in (0, 4)]


def small(ffn: str = "mlp", registers: int = 4, layerscale: float | None = 1.0) -> RegisterViT:
    """S-like: head width 64, LayerScale, every parameter drawn anew so that none is zero or one."""
    torch.manual_seed(3)
    model = RegisterViT(
        image_size=(28, 42), patch_size=14, dim=128, depth=3, heads=2, num_registers=registers, ffn=ffn,
        layerscale=layerscale,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_the_whole_tour_of_libraries_gives_back_every_bit(ffn: str, registers: int) -> None:
    meta = {key: value.clone() for key, value in small(ffn, registers).state_dict().items()}
    before = {key: value.clone() for key, value in meta.items()}
    grid = (2, 3)

    ours = convert.from_meta(meta)
    timm = convert.to_timm(ours)
    ours = with_lost_terms(convert.from_timm(timm, grid), ours)
    transformers = convert.to_transformers(ours)
    ours = convert.from_transformers(transformers)
    assert_identical(convert.to_meta(ours), before)
    assert_identical(meta, before)  # and nothing was changed in place

    assert [convert.detect(state) for state in (meta, timm, transformers)] == ["meta", "timm", "transformers"]
    assert len(timm) == len(meta) - 1
    assert len(transformers) == len(meta) + 3 * 4  # weight and bias of two more of three parts, in three blocks


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_without_the_remainder_timms_fold_changes_no_bit_of_the_output(ffn: str) -> None:
    model = small(ffn)
    again = small(ffn)
    state = convert.from_timm(convert.to_timm(model.state_dict()), grid=(2, 3))
    assert not state["pos_embed"][:, 0].any()
    assert torch.equal(state["cls_token"], model.cls_token + model.pos_embed[:, :1])
    again.load_state_dict(state | {"mask_token": model.mask_token})
    images = torch.randn(2, 3, 42, 28)
    for found, expected in zip(again(images), model(images)):
        assert torch.equal(found, expected)
    once = convert.to_timm(state)
    assert_identical(once, convert.to_timm(model.state_dict()))  # the second time there is nothing left to lose


def test_names_are_those_of_the_libraries() -> None:
    state = small("swiglu").state_dict()
    timm = convert.to_timm(state)
    assert {"reg_token", "blocks.2.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.1.ls2.gamma"} <= timm.keys()
    assert "mask_token" not in timm
    assert timm["pos_embed"].shape[1] == 6
    theirs = convert.to_transformers(state)
    query, key, value = state["blocks.1.attn.qkv.weight"].split(128)
    for name, part in (("query", query), ("key", key), ("value", value)):
        assert torch.equal(theirs[f"encoder.layer.1.attention.attention.{name}.weight"], part)
    assert {
        "embeddings.cls_token", "embeddings.mask_token", "embeddings.register_tokens", "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.bias", "encoder.layer.2.attention.output.dense.weight",
        "encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.mlp.weights_in.weight",
        "encoder.layer.0.mlp.weights_out.bias", "layernorm.weight",
    } <= theirs.keys()  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "dinov2.", "dinov2_with_registers.", "model.", "module.dinov2."])
@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_transformers_names_of_either_generation_are_understood(ffn: str, registers: int, prefix: str) -> None:
    state = small(ffn, registers).state_dict()
    newer: dict[str, Tensor] = {}
    for key, value in convert.to_transformers(state).items():
        name = re.sub(r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj", key)
        name = name.replace("attention.output.dense", "attention.o_proj").replace("weights_out", "down_proj")
        if "weights_in" in name:
            gate, up = value.chunk(2)
            newer[prefix + name.replace("weights_in", "gate_proj")] = gate
            newer[prefix + name.replace("weights_in", "up_proj")] = up
        else:
            newer[prefix + name] = value
    assert convert.detect(newer) == "transformers"
    found = find_backbone(newer | {"classifier.weight": torch.ones(2)})
    assert found.left_out == ("classifier.weight",) if prefix else "classifier.weight" in found.state
    found.state.pop("classifier.weight", None)
    assert_identical(convert.from_transformers(found.state), dict(state))


def test_a_fused_projection_and_gamma_are_understood_too() -> None:
    state = small().state_dict()
    fused = {
        key: value
        for key, value in convert.to_transformers(state).items()
        if not re.search(r"\.(query|key|value)\.", key)
    }
    fused |= {
        f"encoder.layer.{i}.attention.qkv.{part}": state[f"blocks.{i}.attn.qkv.{part}"]
        for i in range(3)
        for part in ("weight", "bias")
    }
    fused = {key.replace("lambda1", "gamma"): value for key, value in fused.items()}
    assert_identical(convert.from_transformers(fused), dict(state))


def test_an_incomplete_or_doubled_projection_is_refused() -> None:
    theirs = convert.to_transformers(small("swiglu").state_dict())
    key = "encoder.layer.1.attention.attention.key.weight"
    with pytest.raises(UserError, match=r"'blocks.1.attn.qkv.weight' has 2 of its 3 parts"):
        convert.from_transformers({k: v for k, v in theirs.items() if k != key})
    with pytest.raises(UserError, match="is there twice"):
        convert.from_transformers(theirs | {"encoder.layer.1.attention.k_proj.weight": theirs[key].clone()})
    with pytest.raises(UserError, match="parts of different shapes"):
        convert.from_transformers(theirs | {key: torch.ones(3, 3)})
    gates = {f"encoder.layer.0.mlp.{part}_proj.weight": torch.ones(2, 2) for part in ("gate", "up")}
    with pytest.raises(UserError, match=r"'blocks.0.mlp.w12.weight' is there twice"):
        convert.from_transformers(theirs | gates)


def test_a_model_without_layerscale_gets_factors_of_one_for_transformers_and_no_bit_of_its_output_changes() -> None:
    model = small(layerscale=None)
    state = convert.from_transformers(convert.to_transformers(model.state_dict()))
    scaled = small(layerscale=1.0)
    scaled.load_state_dict(state)
    images = torch.randn(1, 3, 28, 42)
    assert torch.equal(scaled(images).cls, model(images).cls)
    state = dict(model.state_dict())
    assert_identical(with_lost_terms(convert.from_timm(convert.to_timm(state), (2, 3)), state), state)


def test_blocks_in_chunks_are_numbered_through() -> None:
    state = dict(small().state_dict())
    assert_identical(convert.from_meta({re.sub(r"^blocks\.", "blocks.1.", k): v for k, v in state.items()}), state)
    with pytest.raises(UserError, match=r"'blocks.0.norm1.bias' is there twice"):
        convert.from_meta(state | {"blocks.1.0.norm1.bias": torch.ones(1)})


def test_a_backbone_without_registers_and_mask_token_is_timms_and_with_one_metas() -> None:
    state = dict(small(registers=0).state_dict())
    assert convert.detect(state) == "meta"
    assert convert.detect({k: v for k, v in state.items() if k != "mask_token"}) == "timm"


def test_a_missing_mask_token_becomes_zeros_in_metas_format() -> None:
    state = dict(small().state_dict())
    del state["mask_token"]
    assert torch.equal(convert.to_meta(state)["mask_token"], torch.zeros(1, 128))


@pytest.mark.parametrize(("prefix", "registers"), [(0, 0), (1, 0), (0, 4), (5, 4)])
def test_timms_prefix_positions_are_folded_into_the_tokens_they_belong_to(prefix: int, registers: int) -> None:
    tokens = torch.randn(1, registers, 8)
    positions, cls = torch.randn(1, prefix + 16, 8), torch.randn(1, 1, 8)
    state = {"cls_token": cls, "pos_embed": positions} | ({"reg_token": tokens} if registers else {})
    found = convert.from_timm(state)
    assert torch.equal(found["pos_embed"][:, 1:], positions[:, prefix:])
    whole = found["cls_token"] + found["pos_embed"][:, :1]
    assert torch.equal(whole, cls + positions[:, :1] if prefix else cls)
    if registers:
        assert torch.equal(found["register_tokens"], tokens + positions[:, 1:5] if prefix else tokens)
    assert torch.equal(found["pos_embed"], convert.from_timm(state, grid=(4, 4))["pos_embed"])
    with pytest.raises(UserError, match="fit no grid of 3x4"):
        convert.from_timm(state, grid=(3, 4))


def test_what_is_no_backbone_is_refused() -> None:
    with pytest.raises(UserError, match="no 'cls_token' among the tensors"):
        convert.from_timm({"weight": torch.ones(1)})
    with pytest.raises(UserError, match="12 positions are not a square grid's"):
        convert.from_timm({"cls_token": torch.ones(1, 1, 2), "pos_embed": torch.ones(1, 12, 2)})
