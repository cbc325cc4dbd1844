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
}


PATCH_SIZES = (8, 14, 16)


_NATIVE = re.compile(r"vit([tsblg])(\d+)_reg(\d+)")


_META = re.compile(r"dinov2_vit([tsblg])(\d+)(_reg(\d*))?")


_TIMM = re.compile(r"vit_(tiny|small|base|large|giant)_patch(\d+)_(?:reg(\d+)_)?dinov2(?:\.\w+)?")


_TRANSFORMERS = re.compile(r"(?:facebook/)?dinov2-(with-registers-)?(small|base|large|giant)")


def parse_name(name: str) -> dict[str, Any]:
    """The arguments of RegisterViT that a model name stands for.

    name    vit{t,s,b,l,g}{8,14,16}_reg{R}, built for 224 pixels; or, built for the 518 pixels it was published with (or
            the next lower multiple of the patch size), a name of Meta (dinov2_vits14_reg), timm
            (vit_small_patch14_reg4_dinov2) or transformers (facebook/dinov2-with-registers-small)
    raises  UserError for other names and patch sizes
    """
    size, patch, registers, published = _split_name(name.strip())
    if patch not in PATCH_SIZES:
        raise UserError(f"model {name!r}: patch size {patch} is not one of {PATCH_SIZES}")
    options = {**SIZES[size], "patch_size": patch, "num_registers": registers, "image_size": 224}
    if published:
        image_size = 518 // patch * patch
        options |= {"image_size": image_size, "layerscale": 1.0} | resampling("meta", registers)
    return options


def _split_name(name: str) -> tuple[str, int, int, bool]:
    """(size letter, patch size, registers, whether it is a published model's name)."""
    if (match := _NATIVE.fullmatch(name)) and len(match[3]) < 5:
        return match[1], int(match[2]), int(match[3]), False
    if match := _META.fullmatch(name):
        return match[1], int(match[2]), int(match[4] or 4) if match[3] else 0, True
    if match := _TIMM.fullmatch(name):
        return match[1][0], int(match[2]), int(match[3] or 0), True
    if match := _TRANSFORMERS.fullmatch(name):
        return match[2][0], 14, 4 if match[1] else 0, True
    known = [f"vit{size}{patch}_reg4" for size in SIZES for patch in PATCH_SIZES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"model {name!r} is not known; expected vit{{t,s,b,l,g}}{{8,14,16}}_reg<R>{hint}")


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
