"""Key names and layouts of Meta, timm and transformers, as pure functions between state dicts.

Ours are Meta's (`vit.py`), so `to_meta` only checks. A `from_*` function renames what belongs to a backbone and hands
through, under its own name, whatever else is in the dict (heads, unknown tensors): the reader decides what becomes of
it. No function copies a tensor unless its values or layout change, and none changes what it is given.

Meta <-> ours and transformers <-> ours are exact, bit for bit. timm's form holds less than ours: its mask token is
gone, and in models with registers the class token's position is folded into the class token. The sum is the very one
that the encoder forms at every step, so outputs stay the same bit for bit, but one sum does not tell its two terms;
`timm_remainder` keeps them for who wants the way back to be exact too.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.runtime.errors import UserError

State = dict[str, Tensor]

WRAPPERS = ("teacher", "model", "state_dict")  # of a training file: the first of these that is there is taken

_PREFIX = re.compile(r"^(?:(?:module|backbone|teacher|_orig_mod)\.)+")
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(\w+)")
_TIMM_SWIGLU = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))  # ours, theirs

_HF_PREFIX = re.compile(
    r"^(?:module\.)?(?:dinov2_with_registers|dinov2|model|backbone)\.(?=embeddings\.|encoder\.|layernorm\.)"
)
_HF_BLOCK = re.compile(r"(?:encoder\.layers?|layers)\.(\d+)\.(.+)\.(\w+)")
_HF_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
# Modules of a block: names on disk, which are those before transformers 5, then names in memory since.
_HF_ON_DISK = {
    "attention.output.dense": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
_HF_INNER = {
    **_HF_ON_DISK,
    "attention.o_proj": "attn.proj",
    **{f"attention.{name}": "attn.qkv" for name in ("attention.qkv", "attention.qkv_proj", "qkv", "qkv_proj")},
    "mlp.down_proj": "mlp.w3",
}
# Modules that are parts of one of ours: which, and the place in it.
_QKV = ("query", "key", "value")
_HF_PARTS = {
    **{f"attention.attention.{name}": ("attn.qkv", place) for place, name in enumerate(_QKV)},
    **{f"attention.{name}": ("attn.qkv", place) for place, name in enumerate(_QKV)},
    **{f"attention.{name[0]}_proj": ("attn.qkv", place) for place, name in enumerate(_QKV)},
    "mlp.gate_proj": ("mlp.w12", 0),
    "mlp.up_proj": ("mlp.w12", 1),
}
_NUM_PARTS = {"attn.qkv": 3, "mlp.w12": 2}


def unwrap(content: Any) -> tuple[State, tuple[str, ...]]:
    """The state dict inside a training file, and the names of the entries beside it; a plain state dict is its own.

    raises UserError when there is none
    """
    others: tuple[str, ...] = ()
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            others = tuple(str(key)[:80] for key in content if key != wrapper)
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"holds a {type(content).__name__}, expected a state dict of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"entry {str(key)[:80]!r} is not a floating-point tensor")
    return dict(content), others


def detect(state: Mapping[str, Any]) -> str:
    """Whose key names these are: "meta", "timm" or "transformers". Values that are no tensors do not matter.

    A ViT with an MLP, no registers and no mask token has the same names in Meta's form and timm's; it is taken for
    timm's, because Meta's files always hold a mask token and timm's never do.
    """
    keys = {str(key) for key in state}
    if any(re.search(r"(^|\.)embeddings\.(cls_token|patch_embeddings\.)", key) for key in keys):
        return "transformers"
    if "reg_token" in keys:
        return "timm"
    metas_own = keys & {"mask_token", "register_tokens"} or any(".mlp.w12." in key for key in keys)
    return "timm" if "cls_token" in keys and not metas_own else "meta"


# ---------------------------------------------------------------------------------------------------------- Meta


def from_meta(state: Any) -> State:
    """Ours from Meta's: a hub file, or a training file's {"teacher": ...} with `module.`, `backbone.` and `teacher.`
    prefixes and blocks in chunks (`blocks.<chunk>.<index>.`).

    raises UserError when one name is there twice, or when it holds no state dict
    """
    inner, _ = unwrap(state)
    return _unique((_CHUNKED.sub(r"blocks.\1.", _PREFIX.sub("", key)), value) for key, value in inner.items())


def to_meta(state: Mapping[str, Tensor]) -> State:
    """Meta's hub format from ours: the same names. A missing mask token is added as zeros, its value in a model that
    never hid a patch: without it neither Meta's strict loading nor timm's recognition of the format works."""
    _need(state, "cls_token", "pos_embed", "patch_embed.proj.weight")
    out = dict(state)
    if "mask_token" not in out:
        out["mask_token"] = out["cls_token"].new_zeros(1, out["cls_token"].shape[-1])
    return out


# ---------------------------------------------------------------------------------------------------------- timm


def to_timm(state: Mapping[str, Tensor], num_registers: int | None = None) -> State:
    """timm's `vit_*_patch*_[reg*_]dinov2` from ours.

    With registers: cls_token + pos_embed[:, :1] -> cls_token, pos_embed[:, 1:] -> pos_embed, register_tokens ->
    reg_token. Without: positions keep the class token's. The mask token is dropped; SwiGLU's w12, w3 become fc1, fc2.
    Fold in float32 and cast afterwards: a sum of rounded halves is not the rounded sum.

    num_registers  what the caller believes; UserError if the tensors say otherwise
    """
    _need(state, "cls_token", "pos_embed")
    found = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if num_registers is not None and num_registers != found:
        raise UserError(f"num_registers={num_registers}, the tensors hold {found}")
    out = {_replaced(key, _TIMM_SWIGLU): value for key, value in state.items() if key != "mask_token"}
    if found:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        out["pos_embed"] = state["pos_embed"][:, 1:]
    return out


def timm_remainder(state: Mapping[str, Tensor]) -> State:
    """What `to_timm` loses: the class token and its position before they were added (with registers), the mask token.

    Hand it to `from_timm` and the way there and back is exact, bit for bit.
    """
    kept = {key: state[key] for key in ("mask_token",) if key in state}
    if "register_tokens" in state:
        kept |= {"cls_token": state["cls_token"], "cls_position": state["pos_embed"][:, :1]}
    return kept


def from_timm(
    state: Mapping[str, Tensor],
    remainder: Mapping[str, Tensor] | None = None,
    grid: tuple[int, int] | None = None,
) -> State:
    """Ours from timm's ViT with a class token, with registers and without.

    A folded class token stays in `cls_token`, with a position of zero: the sum, all that the encoder uses, is the same.
    Where timm gives positions to registers (its models without `no_embed_class`), these are folded into the registers.

    remainder  what `timm_remainder` kept; UserError if its two terms do not add up to the class token in `state`
    grid       (rows, columns) of the positions; by default a square, UserError if that is in doubt
    """
    _need(state, "cls_token", "pos_embed")
    swiglu = [(theirs, ours) for ours, theirs in _TIMM_SWIGLU] if _is_timm_swiglu(state) else []
    out = {_replaced(key, swiglu): value for key, value in state.items()}
    registers = out.pop("reg_token", None)
    num_registers = 0 if registers is None else registers.shape[1]
    prefix = _timm_prefix(state["pos_embed"].shape[1], num_registers, grid)
    positions = state["pos_embed"]
    if registers is not None and num_registers:
        out["register_tokens"] = registers + positions[:, 1:prefix] if prefix > 1 else registers
    if prefix == 0:
        zero = torch.zeros_like(positions[:, :1])
        out["pos_embed"] = torch.cat([zero, positions], dim=1)
    elif prefix > 1:
        out["pos_embed"] = torch.cat([positions[:, :1], positions[:, prefix:]], dim=1)
    if remainder:
        if "cls_token" in remainder:
            cls, position = remainder["cls_token"], remainder["cls_position"]
            if prefix or not torch.equal(cls + position, state["cls_token"]):
                raise UserError("the remainder's class token and position do not add up to this file's class token")
            out["cls_token"] = cls
            out["pos_embed"] = torch.cat([position, positions], dim=1)
        if "mask_token" in remainder:
            out["mask_token"] = remainder["mask_token"]
    return out


def _is_timm_swiglu(state: Mapping[str, Tensor]) -> bool:
    """Whether the first linear layer of the FFN gives two halves, of which the second one takes the product."""
    first, second = (state.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


def _timm_prefix(num_positions: int, num_registers: int, grid: tuple[int, int] | None) -> int:
    """How many positions stand before those of the patches: 0 (`no_embed_class`), 1, or 1 + registers."""
    for prefix in (0, 1 + num_registers):
        patches = num_positions - prefix
        if patches == grid[0] * grid[1] if grid is not None else patches > 0 and math.isqrt(patches) ** 2 == patches:
            return prefix
    if grid is not None:
        raise UserError(f"pos_embed has {num_positions} positions, which fit no grid of {grid[0]}x{grid[1]}")
    raise UserError(f"{num_positions} positions are not a square grid's")


# -------------------------------------------------------------------------------------------------- transformers


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Ours from transformers' Dinov2 and Dinov2WithRegisters, under the names on disk and those in memory since
    transformers 5, with or without the prefix that a model with a head puts before its backbone.

    raises UserError when one of query, key and value (or of gate and up) is missing, or a name is there twice
    """
    pairs: list[tuple[str, Tensor]] = []
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        name = _HF_PREFIX.sub("", key)
        block = _HF_BLOCK.fullmatch(name)
        if block is None:
            if name != "embeddings.register_tokens" or value.numel():  # there are models with zero registers
                pairs.append((_HF_OUTER.get(name, key), value))
            continue
        index, module, leaf = block[1], block[2], "gamma" if block[3] == "lambda1" else block[3]
        if module not in _HF_PARTS:
            pairs.append((f"blocks.{index}.{_HF_INNER.get(module, module)}.{leaf}", value))
            continue
        ours, place = _HF_PARTS[module]
        name = f"blocks.{index}.{ours}.{leaf}"
        if parts.setdefault(name, {}).setdefault(place, value) is not value:
            raise UserError(f"{name!r} is there twice, under {key!r} and another name")
    for name, found in parts.items():
        count = next(count for ours, count in _NUM_PARTS.items() if f".{ours}." in name)
        if len(found) != count:
            raise UserError(f"{name!r} has {len(found)} of its {count} parts")
        if len({value.shape for value in found.values()}) != 1:
            raise UserError(f"{name!r} has parts of different shapes")
        pairs.append((name, torch.cat([found[place] for place in range(count)])))
    return _unique(pairs)


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """transformers' names on disk (those before version 5, which every version reads and writes) from ours.

    Query, key and value are views of the fused tensor, one after the other in memory. transformers always has
    LayerScale, so a model without gets factors of one, which change no bit of the output.
    """
    _need(state, "cls_token", "pos_embed", "patch_embed.proj.weight")
    outer = {ours: theirs for theirs, ours in _HF_OUTER.items()}
    inner = {ours: theirs for theirs, ours in _HF_ON_DISK.items()}
    out: State = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if block is None:
            out[outer.get(key, key)] = value
            continue
        layer, module, leaf = f"encoder.layer.{block[1]}", block[2], "lambda1" if block[3] == "gamma" else block[3]
        if module == "attn.qkv":
            for part, third in zip(_QKV, value.chunk(3)):
                out[f"{layer}.attention.attention.{part}.{leaf}"] = third
        else:
            out[f"{layer}.{inner.get(module, module)}.{leaf}"] = value
    for layer in sorted({match[0] for key in out if (match := re.match(r"encoder\.layer\.\d+", key))}):
        for which in ("1", "2"):
            out.setdefault(f"{layer}.layer_scale{which}.lambda1", torch.ones_like(state["norm.weight"]))
    return out


FROM: dict[str, Callable[[Mapping[str, Tensor]], State]] = {
    "meta": from_meta,
    "timm": from_timm,
    "transformers": from_transformers,
}


def _need(state: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in state:
            raise UserError(f"no {key!r} among the tensors; expected the state dict of a ViT with a class token")


def _replaced(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def _unique(pairs: Iterable[tuple[str, Tensor]]) -> State:
    out: State = {}
    for key, value in pairs:
        if key in out:
            raise UserError(f"{key!r} is there twice, under two names")
        out[key] = value
    return out
