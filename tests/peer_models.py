"""The same weights in other people's implementations: a register ViT as timm's model and as transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinoreg.models.vit import RegisterViT


def timm_model(model: RegisterViT) -> nn.Module:
    """timm's register ViT with the weights of `model`."""
    timm = pytest.importorskip("timm")
    from timm.layers import SwiGLUPacked  # the class that its giant model uses

    options: dict[str, Any] = {}
    if model.ffn == "swiglu":
        hidden = model.state_dict()["blocks.0.mlp.w12.weight"].shape[0]
        options = {"mlp_ratio": hidden / model.dim, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    other = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        pretrained=False,
        dynamic_img_size=True,
        img_size=model.image_size,
        patch_size=model.patch_size,
        depth=model.depth,
        embed_dim=model.dim,
        num_heads=model.heads,
        num_classes=0,
        init_values=1.0,
        **options,
    )
    state = {k: v for k, v in model.state_dict().items() if k != "mask_token"}
    positions = state.pop("pos_embed")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
    state["reg_token"] = state.pop("register_tokens")
    state = {k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v for k, v in state.items()}
    other.load_state_dict(state)
    return other.eval()


def transformers_model(model: RegisterViT, folder: Path) -> nn.Module:
    """transformers' model with the weights of `model`, by way of a file: names on disk do not change."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=model.dim,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        image_size=model.image_size[0],
        patch_size=model.patch_size,
        num_register_tokens=model.num_registers,
        mlp_ratio=4,
        layerscale_value=1.0,
        use_swiglu_ffn=model.ffn == "swiglu",
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    renames = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("blocks.", "encoder.layer."),
        (".ls1.gamma", ".layer_scale1.lambda1"),
        (".ls2.gamma", ".layer_scale2.lambda1"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.w12", "mlp.weights_in"),
        ("mlp.w3", "mlp.weights_out"),
    ]
    state = {}
    for key, value in model.state_dict().items():
        name = key
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        if key.endswith("_token") or key == "register_tokens":
            name = f"embeddings.{key}"
        elif key.startswith("norm."):
            name = f"layernorm.{key.removeprefix('norm.')}"
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                state[name.replace("attn.qkv", f"attention.attention.{part}")] = third.contiguous()
        else:
            state[name] = value.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    other, info = transformers.Dinov2WithRegistersModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return other.eval()


def with_lost_terms(found: dict[str, Tensor], original: dict[str, Tensor]) -> dict[str, Tensor]:
    """What came back from timm's form, which holds no mask token and one sum for two terms, with the original's."""
    found = found | {"mask_token": original["mask_token"]}
    if "register_tokens" not in found:
        return found
    position = original["pos_embed"][:, :1]
    assert torch.equal(found["cls_token"], original["cls_token"] + position)
    assert not found["pos_embed"][:, :1].any()
    return found | {
        "cls_token": original["cls_token"],
        "pos_embed": torch.cat([position, found["pos_embed"][:, 1:]], dim=1),
    }


def redrawn(model: nn.Module) -> Any:
    """Parameters of a size at which every part of the model, and rotary positions, show in its output."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.3)
    return model.eval()
