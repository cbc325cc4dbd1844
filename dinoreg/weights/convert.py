"""Key names and layouts of Meta, timm and transformers, as pure functions between state dicts of DINOv2 and DINOv3.

Ours are Meta's names (`vit.py`), so `to_meta` only adds a missing mask token. A `from_*` function renames the
backbone's tensors and passes on all others (heads, unknown tensors) under their own names; the reader decides about
them. No function copies a tensor unless its values or layout change, and none changes its argument.

Meta <-> ours and transformers <-> ours are exact, bit for bit. timm's form has less information: it has no mask token,
and in models with registers the class token's position is added to the class token. The encoder computes the same sum
in every pass, so outputs stay the same bit for bit, but the two terms cannot be recovered. Of DINOv3, rotary positions
have no tensors, and keys have no bias: its third of ours is zero.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.registry import BASE
from dinoreg.runtime.errors import UserError

State = dict[str, Tensor]


# Our and their names, used in both directions: the beginning of a key or, with a leading dot, any part of it.
_TIMM_SWIGLU = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))
_OF_BOTH = (  # of DINOv2 and DINOv3 in transformers
    ("cls_token", "embeddings.cls_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
)
_DINOV2 = (  # names on disk, which are those before transformers 5
    *_OF_BOTH,
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)
# One tensor of ours is several of theirs, concatenated in this order.
_QKV = tuple(f".attention.attention.{name}." for name in ("query", "key", "value"))
_PARTS = {".attn.qkv.": _QKV, ".mlp.w12.": (".mlp.gate_proj.", ".mlp.up_proj.")}
# Other names of transformers (those in memory since version 5, models with a head), and their names on disk.
_TRANSFORMERS_ALIASES = (
    (r"^(encoder\.layers|layers)\.(?=\d)", "encoder.layer."),
    (r"(\.attention)+\.(query|q_proj)\.", _QKV[0]),
    (r"(\.attention)+\.(key|k_proj)\.", _QKV[1]),
    (r"(\.attention)+\.(value|v_proj)\.", _QKV[2]),
    (r"(\.attention)+\.(qkv|qkv_proj)\.", ".attn.qkv."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    (r"\.gamma$", ".lambda1"),
)


def detect(state: Mapping[str, Any]) -> str:
    """The library whose key names these are: "meta", "timm" or "transformers"; only the keys are read.

    A ViT with an MLP, no registers and no mask token has the same names in Meta's and timm's form; it counts as timm's,
    because Meta's files always have a mask token and timm's never do.
    """
    keys = {str(key) for key in state}
    if any(re.search(r"(^|\.)embeddings\.(cls_token|patch_embeddings\.)", key) for key in keys):
        return "transformers"
    if "reg_token" in keys:
        return "timm"
    metas_own = keys & {"mask_token", "register_tokens", "storage_tokens"} or any(".mlp.w12." in key for key in keys)
    return "timm" if "cls_token" in keys and not metas_own else "meta"


# ---------------------------------------------------------------------------------------------------------- Meta


def from_meta(state: Mapping[str, Tensor]) -> State:
    """Ours from Meta's names; the blocks of a training file may be in chunks (`blocks.<chunk>.<index>.`).

    raises  UserError when two keys mean the same tensor
    """
    return unique((re.sub(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.", key), value) for key, value in state.items())


def to_meta(state: Mapping[str, Tensor]) -> State:
    """Meta's hub format from ours: the same names.

    A missing mask token is added as zeros, its initial value: Meta's strict loading and timm's recognition of the
    format need it.
    """
    return {"mask_token": state["cls_token"].new_zeros(1, state["cls_token"].shape[-1]), **state}


# ---------------------------------------------------------------------------------------------------------- timm


def to_timm(state: Mapping[str, Tensor]) -> State:
    """timm's `vit_*_patch*_[reg*_]dinov2` from ours.

    With registers: cls_token + pos_embed[:, :1] -> cls_token, pos_embed[:, 1:] -> pos_embed, register_tokens ->
    reg_token. Without: positions keep the class token's. The mask token is dropped; SwiGLU's w12, w3 become fc1, fc2.
    Fold in float32 and cast afterwards: a sum of rounded halves is not the rounded sum.
    """
    out = {renamed(key, _TIMM_SWIGLU): value for key, value in state.items() if key != "mask_token"}
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        out["pos_embed"] = state["pos_embed"][:, 1:]
    return out


def from_timm(state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> State:
    """Ours from timm's ViT with a class token, with registers or without.

    grid    (rows, columns) of the patch positions; None: a square
    raises  UserError without a class token or positions, and where the positions do not fit the grid

    A class token that includes its position stays in `cls_token`, with a position of zero: the encoder uses only the
    sum. Positions of registers (timm's models without `no_embed_class`) are added to the registers.
    """
    for key in ("cls_token", "pos_embed"):
        if key not in state:
            raise UserError(f"no {key!r} among the tensors; expected the state dict of a ViT with a class token")
    pairs = flipped(_TIMM_SWIGLU) if _is_timm_swiglu(state) else ()
    out = {renamed(key, pairs): value for key, value in state.items()}
    positions, registers = state["pos_embed"], out.pop("reg_token", None)
    prefix = _timm_prefix(positions.shape[1], 0 if registers is None else registers.shape[1], grid)
    if registers is not None and registers.shape[1]:
        out["register_tokens"] = registers + positions[:, 1:prefix] if prefix > 1 else registers
    first = positions[:, :1] if prefix else torch.zeros_like(positions[:, :1])
    out["pos_embed"] = positions if prefix == 1 else torch.cat([first, positions[:, prefix:]], dim=1)
    return out


def _is_timm_swiglu(state: Mapping[str, Tensor]) -> bool:
    """Whether the FFN's first linear layer has twice the outputs that the second has inputs, as a gated FFN's."""
    first, second = (state.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


def _timm_prefix(num_positions: int, num_registers: int, grid: tuple[int, int] | None) -> int:
    """Number of positions before those of the patches: 0 (`no_embed_class`), 1, or 1 + registers."""
    for prefix in (0, 1 + num_registers):
        patches = num_positions - prefix
        if patches == grid[0] * grid[1] if grid is not None else patches > 0 and math.isqrt(patches) ** 2 == patches:
            return prefix
    if grid is not None:
        raise UserError(f"pos_embed has {num_positions} positions, which fit no grid of {grid[0]}x{grid[1]}")
    raise UserError(f"{num_positions} positions are not a square grid's")


# -------------------------------------------------------------------------------------------------- transformers


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Ours from transformers' Dinov2 and Dinov2WithRegisters.

    state   with the names on disk or those in memory since transformers 5
    raises  UserError when one of query, key and value (or of gate and up) is missing, or two keys mean one tensor
    """
    pairs = flipped(_DINOV2)
    out = unique((renamed(_name_on_disk(key), pairs), value) for key, value in state.items())
    if "register_tokens" in out and not out["register_tokens"].numel():  # there are models with zero registers
        del out["register_tokens"]
    return joined(out, _PARTS)


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """transformers' names on disk (those before version 5, which every version reads and writes) from ours.

    Query, key and value are views of the fused tensor. transformers always has LayerScale, see `split`.
    """
    return {renamed(key, _DINOV2): value for key, value in split(state, {".attn.qkv.": _QKV}).items()}


def _name_on_disk(key: str) -> str:
    for pattern, name in _TRANSFORMERS_ALIASES:
        key = re.sub(pattern, name, key)
    return key


# --------------------------------------------------------------------------------------------------------------- DINOv3

_PERIODS = "rope_embed.periods"
_GATES = (".mlp.w1.", ".mlp.fc1_g.", ".mlp.gate_proj.")  # of a gated FFN
_PROJECTIONS = tuple(f".attention.{name}_proj." for name in "qkv")
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
            *_OF_BOTH,
            ("patch_embed.proj.", "embeddings.patch_embeddings."),
            ("blocks.", "layer."),
            (".attn.proj.", ".attention.o_proj."),
            (".mlp.fc1.", ".mlp.up_proj."),
            (".mlp.fc2.", ".mlp.down_proj."),
        ),
        {".attn.qkv.": _PROJECTIONS, ".mlp.w12.": (".mlp.gate_proj.", ".mlp.fc1.")},
        tuple(f"{part}bias" for part in _PROJECTIONS),
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
        elif key.endswith((".attn.qkv.weight", f"{_PROJECTIONS[0]}weight")):
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


# ---------------------------------------------------------------------------------------------------------------- parts


def joined(state: Mapping[str, Tensor], parts: Mapping[str, tuple[str, ...]]) -> State:
    """Tensors that are several of another library's put together.

    parts   {what is in our name: what is in theirs, in the order in which they are concatenated}
    raises  UserError when one of several is missing or has another shape, or when the whole is there, too
    """
    out = dict(state)
    for fused, theirs in parts.items():
        for name in sorted({key.replace(part, fused) for key in out for part in theirs if part in key}):
            found = [out.pop(key) for part in theirs if (key := name.replace(fused, part)) in out]
            if len(found) != len(theirs):
                raise UserError(f"{name!r} has {len(found)} of its {len(theirs)} parts")
            if len({value.shape for value in found}) != 1:
                raise UserError(f"{name!r} has parts of different shapes")
            out = unique([*out.items(), (name, torch.cat(found))])
    return out


def split(state: Mapping[str, Tensor], parts: Mapping[str, tuple[str, ...]]) -> State:
    """The reverse of `joined`, as views.

    A model without LayerScale gets factors of 1, which do not change the output.
    """
    norms = {key: value for key, value in state.items() if re.fullmatch(r"blocks\.\d+\.norm[12]\.weight", key)}
    out = {re.sub(r"norm([12])\.weight", r"ls\1.gamma", key): torch.ones_like(norm) for key, norm in norms.items()}
    for key, value in state.items():
        fused = next((each for each in parts if each in key), None)
        names = [key] if fused is None else [key.replace(fused, part) for part in parts[fused]]
        out |= zip(names, value.chunk(len(names)), strict=True)
    return out


def renamed(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """A key with what it begins with, or with what begins with a dot anywhere in it, in the other library's words."""
    for old, new in pairs:
        if old in key and (old.startswith(".") or key.startswith(old)):
            key = key.replace(old, new, 1)
    return key


def flipped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of names the other way round."""
    return [(theirs, ours) for ours, theirs in pairs]


def unique(pairs: Iterable[tuple[str, Tensor]]) -> State:
    """Tensors by name; UserError where two have one name."""
    out: State = {}
    for key, value in pairs:
        if key in out:
            raise UserError(f"{key!r} is there twice, under two names")
        out[key] = value
    return out
