"""Models by name: the architecture that a name denotes, and a new model of it.

A name denotes an architecture (`vits14_reg4`); the names under which Meta, timm and transformers publish the same
architectures are accepted, too.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dinoreg.runtime.errors import UserError

if TYPE_CHECKING:
    from dinoreg.models.vit import RegisterViT

SIZES: dict[str, dict[str, Any]] = {
    "t": {"dim": 192, "depth": 12, "heads": 3},
    "s": {"dim": 384, "depth": 12, "heads": 6},
    "b": {"dim": 768, "depth": 12, "heads": 12},
    "l": {"dim": 1024, "depth": 24, "heads": 16},
    "g": {"dim": 1536, "depth": 40, "heads": 24, "ffn": "swiglu"},
    # DINOv3's (arXiv 2508.10104)
    "splus": {"dim": 384, "depth": 12, "heads": 6, "ffn": "swiglu", "ffn_ratio": 6.0},
    "hplus": {"dim": 1280, "depth": 32, "heads": 20, "ffn": "swiglu", "ffn_ratio": 6.0},
    "7b": {"dim": 4096, "depth": 40, "heads": 32, "ffn": "swiglu", "ffn_ratio": 3.0},
}
PATCH_SIZES = (8, 14, 16)
BASE = 100.0  # of the rotary positions of every published model
# What DINOv3's models have in common, besides four registers and 16-pixel patches.
DINOV3: dict[str, Any] = {"rope_base": BASE, "key_bias": False, "norm_eps": 1e-5}

# Ours, then those under which models are published. An empty group: there are four registers, or positions are rotary.
_NAMES = (
    r"vit(?P<size>[tsblgh]|7b)(?P<patch>\d+)(?P<plus>plus)?_reg(?P<registers>\d{1,4})(?P<rope>_rope)?",
    r"dinov2_vit(?P<size>[tsblg])(?P<patch>\d+)(_reg(?P<registers>\d*))?",
    r"vit_(?P<size>tiny|small|base|large|giant)_patch(?P<patch>\d+)_(reg(?P<registers>\d+)_)?dinov2(\.\w+)?",
    r"(facebook/)?dinov2-(with-registers-(?P<registers>))?(?P<size>small|base|large|giant)",
    r"(facebook/)?dinov3[-_]vit(?P<size>[sblh]|7b)(?P<patch>\d+)(?P<plus>plus)?(-pretrain-\w+)?(?P<registers>)(?P<rope>)",
    r"vit_(?P<size>tiny|small|base|large|huge|7b)_(?P<plus>plus_)?patch(?P<patch>\d+)_dinov3(_qkvb)?(\.\w+)?"
    r"(?P<registers>)(?P<rope>)",
)


def parse_name(name: str) -> dict[str, Any]:
    """The arguments of RegisterViT that a model name stands for.

    name    vit{t,s,b,l,g}{8,14,16}_reg{R}, built for 224 pixels; with _rope at its end as DINOv3 has it, where there
            are vits16plus_…, vith16plus_… and vit7b16_…, too; or, built for the pixels it was published with (224 for
            DINOv3, else 518 or the next lower multiple of the patch size), a name of Meta (dinov2_vits14_reg,
            dinov3_vits16), timm (vit_small_patch14_reg4_dinov2) or transformers (facebook/dinov2-with-registers-small)
    raises  UserError for other names and patch sizes
    """
    size, patch, registers, rope, published = split_name(name.strip())
    options = {"ffn_ratio": 4.0, **SIZES[size], "patch_size": patch, "num_registers": registers, "image_size": 224}
    if rope:
        options |= DINOV3
    elif published:
        options |= {"image_size": 518 // patch * patch} | resampling("meta", registers)
    return options | ({"layerscale": 1.0} if published else {})


def split_name(name: str) -> tuple[str, int, int, bool, bool]:
    """(size, patch size, registers, whether positions are rotary, whether it is a published model's name).

    size    a key of `SIZES`
    raises  UserError for other names and patch sizes
    """
    for number, pattern in enumerate(_NAMES):
        said = match.groupdict() if (match := re.fullmatch(pattern, name)) else {"size": " "}
        size = ("7b" if said["size"] == "7b" else said["size"][0]) + ("plus" if said.get("plus") else "")
        if size in SIZES:
            patch = int(said.get("patch", 14))
            if patch not in PATCH_SIZES:
                raise UserError(f"model {name!r}: patch size {patch} is not one of {PATCH_SIZES}")
            registers = 0 if said["registers"] is None else int(said["registers"] or 4)
            return size, patch, registers, said.get("rope") is not None, number > 0
    known = [f"{stem(size, p)}_reg4{end}" for size in SIZES for p in PATCH_SIZES for end in ("", "_rope")]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"model {name!r} is not known; expected vit{{t,s,b,l,g}}{{8,14,16}}_reg<R>[_rope]{hint}")


def stem(size: str, patch_size: int) -> str:
    """What a name begins with: vits16, vits16plus, vit7b16; `size` is a key of `SIZES`."""
    letter = size.removesuffix("plus")
    return f"vit{letter}{patch_size}{size.removeprefix(letter)}"


def build(name: str, **overrides: Any) -> RegisterViT:
    """The named model with new random weights from torch's global generator, on the CPU.

    overrides  arguments of RegisterViT, in place of those that the name stands for
    raises     UserError for an unknown name or argument, and for values that RegisterViT refuses
    """
    from dinoreg.models.vit import RegisterViT  # here, so that a name can be checked without torch

    _check_options(overrides)
    return RegisterViT(**(parse_name(name) | overrides))


def _check_options(overrides: Mapping[str, Any]) -> None:
    from dinoreg.models.vit import RegisterViT

    accepted = [p for p in inspect.signature(RegisterViT.__init__).parameters if p != "self"]
    for key in overrides:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(accepted)}"
            raise UserError(f"model option {key!r} is not known{hint}")


HEAD_DIM = 64  # of every published model


def resampling(source: str, num_registers: int) -> dict[str, Any]:
    """How a library resamples the positions of its models to another grid, as arguments of RegisterViT.

    source   "meta" | "timm" | "transformers"
    returns  {"antialias", "position_offset"}

    Models with registers are resampled to the size of the new grid and antialiased by all three libraries. Models
    without: Meta uses a scale factor with an offset of 0.1, not antialiased; timm the size, antialiased; transformers
    the size, not antialiased.
    """
    if source == "timm" or num_registers:
        return {"antialias": True, "position_offset": 0.0}
    return {"antialias": False, "position_offset": 0.1 if source == "meta" else 0.0}
