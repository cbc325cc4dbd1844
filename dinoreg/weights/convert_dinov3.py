"""Key names and layouts of DINOv3's backbones at Meta, timm and transformers, as in `convert.py` those of DINOv2's.

Ours are again Meta's names of DINOv2. Rotary positions have no tensors. Keys have no bias: its third of ours is zero.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.rope import BASE
from dinoreg.runtime.errors import UserError
from dinoreg.weights.convert import State, flipped, from_meta, joined, renamed, split, unique, with_scales

_PERIODS = "rope_embed.periods"

# Our names, and theirs, used in both directions: the beginning of a key or, with a leading dot, any part of it.
_META = (("register_tokens", "storage_tokens"),)
_TIMM = (("register_tokens", "reg_token"), (".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"))
_TIMM_GATED = ((".mlp.w3.", ".mlp.fc2."),)
_TRANSFORMERS = (
    ("cls_token", "embeddings.cls_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.", "embeddings.patch_embeddings."),
    ("blocks.", "layer."),
    (".attn.proj.", ".attention.o_proj."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
)
_TRANSFORMERS_FFN = {
    "mlp": ((".mlp.fc1.", ".mlp.up_proj."), (".mlp.fc2.", ".mlp.down_proj.")),
    "swiglu": ((".mlp.w3.", ".mlp.down_proj."),),
}
# One tensor of ours is several of theirs, concatenated in this order.
_META_PARTS = {".mlp.w12.": (".mlp.w1.", ".mlp.w2.")}
_TIMM_PARTS = {".mlp.w12.": (".mlp.fc1_g.", ".mlp.fc1_x.")}
_TRANSFORMERS_PARTS = {
    ".attn.qkv.": tuple(f".attention.{name}_proj." for name in "qkv"),
    ".mlp.w12.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def is_dinov3(state: Mapping[str, Any]) -> bool:
    """Whether these are the names of a DINOv3 backbone of one of the three libraries; only the keys are read."""
    learned = {"pos_embed", "embeddings.position_embeddings"}
    marks = {"storage_tokens", _PERIODS, "embeddings.patch_embeddings.weight"}
    timm = {"reg_token", "blocks.0.gamma_1"}
    return not learned & state.keys() and (bool(marks & state.keys()) or timm <= state.keys())


def from_meta_dinov3(state: Mapping[str, Tensor]) -> State:
    """Ours from Meta's names; the norm of local crops, the periods of positions and the biases' masks are passed on.

    raises  UserError for other periods than DINOv3's, and when two keys mean the same tensor
    """
    out = unique((renamed(key, flipped(_META)), value) for key, value in from_meta(state).items())
    if _PERIODS in out:  # rounded to bfloat16 in the published files
        periods = out[_PERIODS]
        expected = BASE ** (torch.arange(len(periods)) / len(periods))
        if not torch.allclose(periods.float(), expected, rtol=1e-2):
            raise UserError(f"{_PERIODS!r} are not those of DINOv3, {BASE:g} ** (i / {len(periods)})")
    for key in [key for key in out if key.endswith(".attn.qkv.bias_mask")]:
        bias = key.removesuffix("_mask")
        out[bias] = torch.where(out[key].bool(), out[bias], 0)  # what is masked may be anything
    return joined(out, _META_PARTS)


def from_timm_dinov3(state: Mapping[str, Tensor]) -> State:
    """Ours from timm's `vit_*_patch16_dinov3`, with biases of queries and values or (all zero) without."""
    gated = any(".mlp.fc1_g." in key for key in state)
    pairs = flipped(_TIMM + _TIMM_GATED if gated else _TIMM)
    out = unique((renamed(key, pairs), value) for key, value in state.items())
    for key in [key for key in out if key.endswith(".attn.qkv.weight")]:
        none = out[key].new_zeros(len(out[key]) // 3)
        q, v = (out.pop(key.replace("qkv.weight", f"{name}_bias"), none) for name in "qv")
        out[key.replace("weight", "bias")] = torch.cat([q, none, v])
    return joined(out, _TIMM_PARTS)


def to_timm_dinov3(state: Mapping[str, Tensor]) -> State:
    """timm's `vit_*_patch16_dinov3*_qkvb` from ours: the mask token is dropped, the keys' zero biases, too."""
    gated = _TIMM_GATED if _is_gated(state) else ()
    kept = {key: value for key, value in state.items() if key != "mask_token"}
    out: State = {}
    for key, value in split(kept, _TIMM_PARTS).items():
        if key.endswith(".attn.qkv.bias"):
            out |= {key.replace("qkv.bias", f"{name}_bias"): value.chunk(3)[at] for name, at in (("q", 0), ("v", 2))}
        else:
            out[renamed(key, _TIMM + gated)] = value
    return out


def from_transformers_dinov3(state: Mapping[str, Tensor]) -> State:
    """Ours from transformers' DINOv3ViT; biases of queries, keys and values that a model does without are zero.

    state   with the names on disk or those in memory
    raises  UserError when one of several parts of a tensor is missing, or two keys mean one tensor
    """
    gated = any(".mlp.gate_proj." in key for key in state)
    pairs = flipped(_TRANSFORMERS + _TRANSFORMERS_FFN["swiglu" if gated else "mlp"])
    out = unique((renamed(re.sub(r"^model\.(?=layer\.)", "", key), pairs), value) for key, value in state.items())
    for key in [key for key in out if re.search(r"\.attention\.[qkv]_proj\.weight$", key)]:
        out.setdefault(key.removesuffix("weight") + "bias", out[key].new_zeros(len(out[key])))
    if "register_tokens" in out and not out["register_tokens"].numel():
        del out["register_tokens"]
    if "mask_token" in out:
        out["mask_token"] = out["mask_token"].flatten(0, -2)  # (1, 1, D)
    return joined(out, _TRANSFORMERS_PARTS)


def to_transformers_dinov3(state: Mapping[str, Tensor], key_bias: bool) -> State:
    """transformers' names on disk from ours, with a mask token. It always has LayerScale, see `with_scales`.

    key_bias  whether the keys' biases are among them
    """
    pairs = _TRANSFORMERS + _TRANSFORMERS_FFN["swiglu" if _is_gated(state) else "mlp"]
    out = {renamed(key, pairs): value for key, value in split(with_scales(state), _TRANSFORMERS_PARTS).items()}
    none = state["cls_token"].new_zeros(1, 0, state["cls_token"].shape[-1])
    out.setdefault("embeddings.register_tokens", none)
    out["embeddings.mask_token"] = state["mask_token"].unsqueeze(0)
    return {key: value for key, value in out.items() if key_bias or not key.endswith(".k_proj.bias")}


FROM_DINOV3: dict[str, Callable[[Mapping[str, Tensor]], State]] = {
    "dinoreg": from_meta,
    "meta": from_meta_dinov3,
    "timm": from_timm_dinov3,
    "transformers": from_transformers_dinov3,
}


def _is_gated(state: Mapping[str, Tensor]) -> bool:
    return "blocks.0.mlp.w12.weight" in state
