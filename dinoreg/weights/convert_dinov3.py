"""Key names and layouts of DINOv3's backbones at Meta, timm and transformers, as in `convert.py` those of DINOv2's.

Ours are again Meta's names of DINOv2. Rotary positions have no tensors. Keys have no bias: its third of ours is zero.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.registry import BASE
from dinoreg.runtime.errors import UserError
from dinoreg.weights.convert import TRANSFORMERS, State, flipped, from_meta, joined, renamed, split, unique

_PERIODS = "rope_embed.periods"
_GATES = (".mlp.w1.", ".mlp.fc1_g.", ".mlp.gate_proj.")  # of a gated FFN


_QKV = tuple(f".attention.{name}_proj." for name in "qkv")
_BIASES = tuple(f".attn.{name}_bias" for name in "qkv")
# Of each library: our and its names, as for `renamed` (a gated FFN's last layer is fc2 as a plain one's); of one tensor
# of ours several of its, as for `joined`; biases of queries, keys and values, where they are by themselves.
_LIBRARIES: dict[str, tuple[tuple[tuple[str, str], ...], dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    "dinoreg": ((), {}, ()),
    "meta": ((("register_tokens", "storage_tokens"),), {".mlp.w12.": (".mlp.w1.", ".mlp.w2.")}, ()),
    "timm": (
        (("register_tokens", "reg_token"), (".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2")),
        {".attn.qkv.bias": _BIASES, ".mlp.w12.": (".mlp.fc1_g.", ".mlp.fc1_x.")},
        _BIASES,
    ),
    "transformers": (
        (
            *TRANSFORMERS,
            ("patch_embed.proj.", "embeddings.patch_embeddings."),
            ("blocks.", "layer."),
            (".attn.proj.", ".attention.o_proj."),
            (".mlp.fc1.", ".mlp.up_proj."),
            (".mlp.fc2.", ".mlp.down_proj."),
        ),
        {".attn.qkv.": _QKV, ".mlp.w12.": (".mlp.gate_proj.", ".mlp.fc1.")},
        tuple(f"{part}bias" for part in _QKV),
    ),
}


def is_dinov3(state: Mapping[str, Any]) -> bool:
    """Whether these are the names of a DINOv3 backbone of one of the three libraries; only the keys are read."""
    marks, timm = {"storage_tokens", _PERIODS, "embeddings.patch_embeddings.weight"}, {"reg_token", "blocks.0.gamma_1"}
    return bool(marks & state.keys()) or timm <= state.keys()


def from_dinov3(state: Mapping[str, Tensor], library: str) -> State:
    """Ours from a library's names, those on disk or in memory; biases that a model does without are zero.

    library  "dinoreg" | "meta" | "timm" | "transformers"
    raises   UserError for other periods than DINOv3's, when one of several parts of a tensor is missing, and when two
             keys mean the same tensor

    Of Meta's, the norm of local crops, the periods of positions and the biases' masks are passed on.
    """
    theirs, parts, biases = _LIBRARIES[library]
    gated = any(gate in key for key in state for gate in _GATES)
    pairs = flipped(theirs) + ([(".mlp.fc2.", ".mlp.w3.")] if gated else [])
    plain = ((re.sub(r"^model\.(?=layer\.)", "", key), value) for key, value in from_meta(state).items())
    out = unique((renamed(key, pairs), value) for key, value in plain)
    for key, value in list(out.items()):
        if key == "register_tokens" and not value.numel():  # there are models with zero registers
            del out[key]
        elif key == "mask_token":
            out[key] = value.flatten(0, -2)  # transformers' has three dimensions
        elif key == _PERIODS and not torch.allclose(  # the published ones are rounded to bfloat16
            value.float(), BASE ** (torch.arange(len(value)) / len(value)), rtol=1e-2
        ):
            raise UserError(f"{_PERIODS!r} are not those of DINOv3, {BASE:g} ** (i / {len(value)})")
        elif key.endswith(".bias_mask"):
            bias = key.removesuffix("_mask")
            out[bias] = torch.where(value.bool(), out[bias], 0)  # what is masked may be anything
        elif key.endswith((".attn.qkv.weight", f"{_QKV[0]}weight")):
            for bias in biases:
                out.setdefault(key.partition(".att")[0] + bias, value.new_zeros(value.shape[1]))
    return joined(out, {whole: some for whole, some in parts.items() if gated or whole != ".mlp.w12."})


def to_dinov3(state: Mapping[str, Tensor], library: str, key_bias: bool = False) -> State:
    """A library's names on disk from ours with a mask token. There always is LayerScale, see `split`.

    library   "timm", whose models have no mask token, or "transformers"
    key_bias  whether keys have biases
    """
    theirs, parts, biases = _LIBRARIES[library]
    pairs = [(".mlp.w3.", ".mlp.fc2."), *theirs]
    out = {renamed(key, pairs): value for key, value in split(state, parts).items()}
    if library == "timm":
        del out["mask_token"]
    else:
        mask_token = out["embeddings.mask_token"]
        out["embeddings.mask_token"] = mask_token.unsqueeze(0)
        out.setdefault("embeddings.register_tokens", mask_token.new_zeros(1, 0, mask_token.shape[-1]))
    return {key: value for key, value in out.items() if key_bias or not key.endswith(biases[1])}
