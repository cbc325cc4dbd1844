"""Inferring an encoder's architecture from its state dict.

Width, depth, patch size, channels, registers and FFN follow from the tensors' shapes. The rest (heads, a rectangular
grid, how positions are resampled, rotary ones) comes from the JSON beside the file, or from the library that wrote it.
The JSON must not contradict the shapes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dinoreg.models.layers import NORM_EPS, swiglu_hidden_dim
from dinoreg.models.registry import DINOV3, HEAD_DIM, resampling
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import as_sides, is_number
from dinoreg.runtime.printable import shortened


@dataclass(frozen=True)
class Stated:
    """Arguments of RegisterViT that a JSON file states.

    where  the file's name, for messages
    names  {argument: its name in the file} where these differ
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = "metadata"
    names: Mapping[str, str] = field(default_factory=dict)

    def says(self, key: str) -> str:
        """The phrase for messages that the file says KEY=VALUE, in the file's own names."""
        return f"{self.where} says {self.names.get(key, key)}={shortened(repr(self.values.get(key)))}"


def infer_architecture(
    state: Mapping[str, Tensor], stated: Stated = Stated(), path: str | Path = "state dict", source: str = "meta"
) -> dict[str, Any]:
    """The arguments of RegisterViT for a backbone state dict with dinoreg's (Meta's) key names.

    stated  arguments that shapes do not determine, from `RegisterViT.architecture()` or a library's config
    path    of the file, for messages
    source  "dinoreg" | "meta" | "timm" | "transformers": the library whose resampling of positions is the default
    raises  UserError where the shapes are not those of such an encoder, or contradict `stated`
    """
    values = stated.values
    dim = _shaped(state, "cls_token", 3, path).shape[2]
    patch = _shaped(state, "patch_embed.proj.weight", 4, path)
    rope = "pos_embed" not in state and values.get("rope_base") is not None
    patches = None if rope else _shaped(state, "pos_embed", 3, path).shape[1] - 1
    indices = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d{1,6})\.", key))}
    if not indices or indices != set(range(len(indices))):
        raise UserError(f"weights {path}: blocks {sorted(indices)[:8]} are not numbered 0, 1, 2, ...")
    registers = _shaped(state, "register_tokens", 3, path).shape[1] if "register_tokens" in state else 0
    if "blocks.0.mlp.w12.weight" in state:
        ffn, hidden = "swiglu", _shaped(state, "blocks.0.mlp.w12.weight", 2, path).shape[0] // 2
    else:
        ffn, hidden = "mlp", _shaped(state, "blocks.0.mlp.fc1.weight", 2, path).shape[0]
    channels, in_channels = values.get("channels", "joint"), patch.shape[1]
    if channels != "joint" and in_channels == 1 and type(values.get("in_channels")) is int:
        in_channels = min(max(values["in_channels"], 1), 1 << 16)  # of a bag: in no tensor
    found: dict[str, Any] = {
        "dim": dim,
        "depth": len(indices),
        "patch_size": patch.shape[2],
        "ffn": ffn,
        "in_channels": in_channels,
        "channels": channels,
        "num_registers": registers,
        "rope_base": values["rope_base"] if rope else None,
    }
    for key, value in found.items():
        if key in values and values[key] != value:
            raise UserError(f"weights {path}: {stated.says(key)}, the tensors say {value!r}")
    found["ffn_ratio"] = _ffn_ratio(dim, ffn, hidden, stated, path)
    has_scale, scale = "blocks.0.ls1.gamma" in state, values.get("layerscale")
    found["layerscale"] = (scale if is_number(scale) and scale else 1.0) if has_scale else None
    found["heads"] = _heads(dim, stated, path)
    found["image_size"] = _image_size(patches, found["patch_size"], stated, path)
    found |= resampling(source, registers) | _arithmetic(rope, stated, path)
    if isinstance(values.get("antialias"), bool):
        found["antialias"] = values["antialias"]
    return found | {key: float(values[key]) for key in ("position_offset", "init_std") if is_number(values.get(key))}


def _arithmetic(rope: bool, stated: Stated, path: str | Path) -> dict[str, Any]:
    """The stated "key_bias", "norm_eps" and, where `rope`, "rope_base"; else those of DINOv3's models, or DINOv2's."""
    found: dict[str, Any] = dict(DINOV3) if rope else {"key_bias": True, "norm_eps": NORM_EPS}
    found |= {key: value for key, value in stated.values.items() if key in found}
    for key, value in found.items():
        flag = key == "key_bias"
        if not (isinstance(value, bool) if flag else is_number(value) and value > 0):
            expected = "true or false" if flag else "a positive number"
            raise UserError(f"weights {path}: {stated.says(key)}, expected {expected}")
    return found


def describe_positions(architecture: Mapping[str, Any]) -> str:
    """What an encoder does with positions on another grid, such as "resampled bicubic, antialiased, to the size"."""
    if architecture["rope_base"] is not None:
        return f"rotary, of base {architecture['rope_base']:g}"
    offset = architecture["position_offset"]
    how = f"by a factor with offset {offset:g}" if offset else "to the size"
    return f"resampled bicubic, {'' if architecture['antialias'] else 'not '}antialiased, {how}"


def hidden_dim_of(dim: int, ffn: str, ratio: float) -> int:
    """Hidden width of an FFN for tokens of width `dim`; for "swiglu" after the gate's two-thirds rule.

    ffn    "mlp" | "swiglu"
    ratio  hidden width of the MLP over `dim`
    """
    hidden = int(dim * ratio)
    return swiglu_hidden_dim(hidden) if ffn == "swiglu" else hidden


def _shaped(state: Mapping[str, Tensor], key: str, ndim: int, path: str | Path) -> Tensor:
    value = state.get(key)
    if value is None:
        raise UserError(f"weights {path}: no {key!r}; expected the state dict of a ViT of Meta, timm or transformers")
    if value.ndim != ndim or not value.numel():
        raise UserError(f"weights {path}: {key!r} has shape {tuple(value.shape)}, expected {ndim} dimensions")
    return value


def _ffn_ratio(dim: int, ffn: str, hidden: int, stated: Stated, path: str | Path) -> float:
    """A ratio that gives this hidden width: the stated one, else 4 if it does, else the quotient."""
    value = stated.values.get("ffn_ratio")
    if value is not None:
        if is_number(value) and 0 < value < 1024 and hidden_dim_of(dim, ffn, value) == hidden:
            return float(value)
        raise UserError(f"weights {path}: {stated.says('ffn_ratio')}, the tensors have a hidden width of {hidden}")
    ratio = hidden * (1.5 if ffn == "swiglu" else 1.0) / dim
    # Rounding may have put the quotient a hair below the ratio that gives the width back.
    return next(
        r for r in (4.0, ratio, math.nextafter(ratio, math.inf)) if hidden_dim_of(dim, ffn, r) == hidden or r > ratio
    )


def _heads(dim: int, stated: Stated, path: str | Path) -> int:
    value = stated.values.get("heads")
    if value is None:
        if dim % HEAD_DIM:
            how = "give heads= to dinoreg.load, or model.heads= to a run with init="
            raise UserError(f"weights {path}: the width {dim} does not tell the number of heads; {how}")
        return dim // HEAD_DIM
    if type(value) is int and 0 < value <= dim and dim % value == 0:
        return value
    raise UserError(f"weights {path}: {stated.says('heads')}, which does not divide the width {dim}")


def _image_size(num_patches: int | None, patch_size: int, stated: Stated, path: str | Path) -> list[int]:
    """The stated one, if any; else that of a square grid of positions, or 224 pixels where there are no positions."""
    value = stated.values.get("image_size")
    if value is not None:
        sides = as_sides(value)
        if sides is None or num_patches not in (None, math.prod(side // patch_size for side in sides)):
            tensors = (
                "expected one or two sides" if sides is None else f"the tensors have {num_patches} patch positions"
            )
            raise UserError(f"weights {path}: {stated.says('image_size')}, {tensors}")
        return [side // patch_size * patch_size for side in sides]
    if num_patches is None:
        return [max(224 // patch_size, 1) * patch_size] * 2
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise UserError(f"weights {path}: {num_patches} patch positions are not a square grid's")
    return [side * patch_size, side * patch_size]
