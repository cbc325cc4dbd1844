"""DINOv3's backbones: the answers of transformers' and timm's own models, in and out, and going on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoreg.commands.main import main
from dinoreg.evaluation.backbones.encoder import NativeEncoder, TimmEncoder, TransformersEncoder
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights import convert
from dinoreg.weights.load import load, load_into, load_reported
from tests.peer_models import redrawn

SIZES = [(64, 64), (32, 32), (144, 128), (48, 176)]  # native, small, large, wide
STATS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def transformerss(gated: bool = False, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        "intermediate_size": 256, "num_register_tokens": 4, "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
    }  # fmt: skip
    return redrawn(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**(options | changes))))


def timms(name: str = "vit_small_patch16_dinov3_qkvb", **changes: Any) -> Any:
    options = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
    return redrawn(timm.create_model(name, pretrained=False, **(options | changes)))


def save_timm(model: Any, folder: Path, name: str, **arguments: Any) -> Path:
    """As timm's `save_for_hf` does."""
    folder.mkdir(exist_ok=True)
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 0} | arguments
    pretrained = {"input_size": [3, 64, 64], "crop_pct": 1.0, "interpolation": "bicubic", **STATS}
    config = {"architecture": name, "model_args": arguments, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_meta(state: dict[str, Tensor], gated: bool) -> dict[str, Tensor]:
    """A file as Meta's DINOv3 has it, from our names."""
    out = {key.replace("register_tokens", "storage_tokens"): value for key, value in state.items()}
    for key in [key for key in out if key.endswith("attn.qkv.bias")]:
        q, k, v = out[key].chunk(3)
        out[key] = torch.cat([q, torch.full_like(k, torch.nan), v])
        out[f"{key}_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(k), torch.ones_like(v)])
    for key in [key for key in out if ".mlp.w12." in key]:
        one, two = out.pop(key).chunk(2)
        out |= {key.replace("w12", "w1"): one, key.replace("w12", "w2"): two}
    out["rope_embed.periods"] = (100.0 ** (torch.arange(8) / 8)).bfloat16()
    out["local_cls_norm.weight"] = torch.ones(64)
    return out


def largest_difference(ours: RegisterViT, theirs: Any, sizes: list[tuple[int, int]] = SIZES) -> float:
    """Over all tokens at all sizes; their outputs are (B, T, D)."""
    worst = 0.0
    for height, width in sizes:
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            tokens, expected = ours(images), theirs(images)
        found = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
        assert expected.std() > 0.5
        worst = max(worst, float((found - expected).abs().max()))
    return worst


KINDS = [{}, {"gated": True}, {"key_bias": True, "num_register_tokens": 0}, {"rope_theta": 40.0, "query_bias": False}]


@pytest.mark.parametrize("changes", KINDS, ids=["mlp", "gated", "key bias, no registers", "no query bias, other base"])
def test_a_transformers_folder_answers_as_transformers_does_and_goes_back_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = transformerss(**changes)
    theirs.save_pretrained(tmp_path)
    loaded = load_reported(tmp_path)
    assert largest_difference(loaded.model, lambda images: theirs(images).last_hidden_state) <= 1e-5
    assert (loaded.fresh, loaded.weights.left_out) == ((), ())
    assert loaded.model.rope_base == changes.get("rope_theta", 100)
    on_disk = load_file(tmp_path / "model.safetensors")
    back = convert.to_dinov3(loaded.model.state_dict(), "transformers", loaded.model.key_bias)
    missing = {key for key in back if key.endswith("q_proj.bias")} if "query_bias" in changes else set()
    assert back.keys() - on_disk.keys() == missing
    for key, value in on_disk.items():
        assert torch.equal(back[key], value), key
    in_memory = convert.from_dinov3(theirs.state_dict(), "transformers")
    assert all(torch.equal(value, in_memory[key]) for key, value in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 2}),
        ("vit_small_plus_patch16_dinov3_qkvb", {"rope_temperature": 40.0}),
    ],
)
def test_a_timm_folder_and_file_answer_as_timm_does_and_go_back_bit_for_bit(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = timms(name, **changes)
    loaded = load_reported(save_timm(theirs, tmp_path / "folder", name, **changes))
    assert largest_difference(loaded.model, theirs.forward_features) <= 1e-5
    assert loaded.fresh == ("mask_token",)
    assert loaded.model.image_size == (64, 64)
    back = convert.to_dinov3(loaded.model.state_dict(), "timm")
    for key, value in theirs.state_dict().items():
        assert torch.equal(back[key], value), key
    if "rope_temperature" not in changes:  # which nothing in a lone file says
        save_file(theirs.state_dict(), tmp_path / "alone.safetensors")
        alone = load(tmp_path / "alone.safetensors", heads=2)
        assert alone.image_size == (224, 224)
        assert largest_difference(alone, theirs.forward_features) <= 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_a_meta_file_means_the_model_that_the_libraries_make_of_it(gated: bool, tmp_path: Path) -> None:
    name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3_qkvb"
    theirs = timms(name)
    ours = load(save_timm(theirs, tmp_path / "folder", name))
    state = as_meta(dict(ours.state_dict()), gated)
    torch.save(state, tmp_path / "dinov3.pth")
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "training.pth")
    loaded = load_reported(tmp_path / "dinov3.pth", heads=2)
    assert loaded.weights.source == "meta"
    assert "rope_embed.periods" in loaded.weights.left_out
    for model in (loaded.model, load(tmp_path / "training.pth", heads=2)):
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items())
    # timm reads Meta's files itself
    from timm.models.eva import checkpoint_filter_fn

    other = timms(name)
    other.load_state_dict(checkpoint_filter_fn(state, other))
    assert largest_difference(loaded.model, other.forward_features) <= 1e-5
    torch.save(state | {"rope_embed.periods": 50.0 ** (torch.arange(8) / 8)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"'rope_embed\.periods' are not those of DINOv3"):
        load(tmp_path / "other.pth", heads=2)


def test_features_and_raw_keys_are_the_same_whichever_library_computes_them(tmp_path: Path) -> None:
    theirs = transformerss()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    name = "vit_small_patch16_dinov3_qkvb"
    in_timm = timms(name)
    in_timm.load_state_dict(convert.to_dinov3(ours.state_dict(), "timm"))
    pictures = torch.rand(2, 3, 48, 64)
    native = NativeEncoder(ours, "ours", STATS)
    for other in (TransformersEncoder(theirs, "hf", STATS), TimmEncoder(in_timm, "timm", STATS)):
        assert (other.dim, other.depth, other.num_registers, other.patch_size) == (64, 2, 4, 16)
        for norm in (True, False):
            found, expected = native.layers(pictures, (0, -1), norm), other.layers(pictures, (0, -1), norm)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for name, keys in TransformersEncoder(theirs, "hf", STATS).qkv(pictures, 0).items():
        torch.testing.assert_close(native.qkv(pictures, 0)[name], keys, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu', the encoder has 'gelu'"),
        ({"mlp_bias": False}, "mlp_bias=False, the encoder has True"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, the tensors say 2"),
        ({"num_attention_heads": 32}, "of whole fours"),
        ({"layer_norm_eps": "1e-5x"}, "layer_norm_eps='1e-5x', expected"),
        ({"layer_norm_eps": -1.0}, r"layer_norm_eps=-1\.0, expected"),
        ({"key_bias": 1}, "key_bias=1, expected"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0, expected a positive number"),
        ({"image_size": [64, 0]}, "image_size"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_words(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    transformerss().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_learned_and_rotary_positions_are_not_taken_for_one_another(tmp_path: Path) -> None:
    transformerss().save_pretrained(tmp_path)
    for options in ({}, {"rope_base": 100.0}, {"rope_base": 100.0, "key_bias": False}):
        student = RegisterViT(image_size=64, patch_size=16, dim=64, depth=2, heads=2, **options)
        with pytest.raises(UserError, match=r"(rope_base|key_bias|norm_eps) is .*, the model's is"):
            load_into(student, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_from_a_transformers_folder_and_its_export_goes_back(tmp_path: Path) -> None:
    transformerss().save_pretrained(tmp_path / "start")
    out = tmp_path / "run"
    tiny = [
        "model.name=vits16_reg4_rope", "model.dim=64", "model.depth=2", "model.heads=2", "crops.global_size=64",
        "crops.local_size=32", "crops.num_local=2", "head.prototypes=24", "head.hidden_dim=40",
        "head.bottleneck_dim=16", "batch_size=4", "steps=2", "device=cpu", "probe.every=0", "optim.lr=1e-3",
        "log.tensorboard=false", "loss.anchor_weight=1.0", "precision=fp32",
    ]  # fmt: skip
    command = ["pretrain", "vits14_reg4", "data=scenes:count=20,size=64", f"init={tmp_path / 'start'}", f"out={out}"]
    assert main([*command, *tiny]) == 0
    start, model = load(tmp_path / "start"), load(out)
    assert model.architecture() | {"init_std": 0} == start.architecture() | {"init_std": 0, "image_size": [64, 64]}
    moved = (model.blocks[0].mlp.fc1.weight - start.blocks[0].mlp.fc1.weight).abs().max()
    assert 0 < moved < 0.1
    assert not model.blocks[0].attn.qkv.bias.chunk(3)[1].any()
    assert main(["export", f"weights={out}", "format=transformers", f"out={tmp_path / 'back'}"]) == 0
    again = transformers.AutoModel.from_pretrained(tmp_path / "back").eval()
    assert type(again).__name__ == "DINOv3ViTModel"
    assert largest_difference(model, lambda images: again(images).last_hidden_state) <= 1e-5
