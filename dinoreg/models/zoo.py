"""Models by name, and models with weights.

A name says the architecture (`vits14_reg4`); the names under which Meta, timm and transformers publish the
same architectures are understood too. Weights come from a run folder or a file (`weights.py`), and never
silently: every tensor is loaded, reshaped or reported.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.errors import UserError
from dinoreg.models.vit import RegisterViT, resample_positions
from dinoreg.models.weights import find_weights, hidden_dim_of, published_resampling, read_weights

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
    """The arguments of RegisterViT that a model name stands for; raises UserError if it stands for none.

    Ours: vit{t,s,b,l,g}{8,14,16}_reg{R}, at 224 pixels. Aliases, at the 518 pixels they were published with:
    dinov2_vits14_reg, vit_small_patch14_reg4_dinov2, facebook/dinov2-with-registers-small, and so on.
    """
    size, patch, registers, published = _split_name(name.strip())
    if patch not in PATCH_SIZES:
        raise UserError(f"model {name!r}: patch size {patch} is not one of {PATCH_SIZES}")
    options = {**SIZES[size], "patch_size": patch, "num_registers": registers, "image_size": 224}
    if published:
        image_size = 518 // patch * patch
        options |= {"image_size": image_size, "layerscale": 1.0} | published_resampling(registers)
    return options


def _split_name(name: str) -> tuple[str, int, int, bool]:
    """(size letter, patch size, registers, whether it is a published model's name)."""
    if match := _NATIVE.fullmatch(name):
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
    """The named model with fresh random weights; `overrides` are arguments of RegisterViT."""
    accepted = [p for p in inspect.signature(RegisterViT.__init__).parameters if p != "self"]
    for key in overrides:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(accepted)}"
            raise UserError(f"model option {key!r} is not known{hint}")
    return RegisterViT(**(parse_name(name) | overrides))


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file, and of every tensor of the model."""

    path: Path
    loaded: tuple[str, ...]  # taken as they are
    reshaped: tuple[str, ...]  # "pos_embed: 16x16 -> 37x37"
    left_out: tuple[str, ...]  # in the file, not in the encoder (heads)
    fresh: tuple[str, ...]  # in the encoder, not in the file: keep their start values

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from {self.path}"]
        if self.reshaped:
            parts.append(f"reshaped {', '.join(self.reshaped)}")
        if self.left_out:
            parts.append(f"left out {len(self.left_out)} ({', '.join(sorted(_groups(self.left_out)))})")
        if self.fresh:
            parts.append(f"not in the file: {', '.join(self.fresh)}")
        return "; ".join(parts)


def _groups(keys: tuple[str, ...]) -> set[str]:
    return {key.split(".")[0] for key in keys}


def load_into(model: RegisterViT, source: str | Path) -> LoadReport:
    """Copy the weights of `source` (a run folder or file, see `read_weights`) into `model`, in place.

    The position grid is resampled to the model's. Everything else must agree: raises UserError naming the
    first property in which the two architectures differ, before anything is changed.
    """
    weights = read_weights(source)
    theirs, ours = weights.architecture(), model.architecture()
    theirs["layerscale"], ours["layerscale"] = bool(theirs["layerscale"]), bool(ours["layerscale"])
    for key in ("dim", "depth", "patch_size", "ffn", "heads", "in_channels", "num_registers", "layerscale"):
        if theirs[key] != ours[key]:
            raise UserError(f"weights {weights.path}: {key} is {theirs[key]}, the model's is {ours[key]}")
    widths = [hidden_dim_of(a["dim"], a["ffn"], a["ffn_ratio"]) for a in (theirs, ours)]
    if widths[0] != widths[1]:
        raise UserError(f"weights {weights.path}: ffn width is {widths[0]}, the model's is {widths[1]}")
    state = dict(weights.backbone)
    height, width = theirs["image_size"]
    grid = (height // model.patch_size, width // model.patch_size)
    reshaped = []
    if grid != model.grid:
        positions = state["pos_embed"]
        moved = resample_positions(positions[:, 1:], grid, model.grid, theirs["antialias"], theirs["position_offset"])
        state["pos_embed"] = torch.cat([positions[:, :1], moved], dim=1)
        reshaped.append(f"pos_embed: {grid[0]}x{grid[1]} -> {model.grid[0]}x{model.grid[1]}")
    fresh = _check_keys(model, state, weights.path)
    model.load_state_dict(state, strict=False)
    loaded = [key for key in state if not (reshaped and key == "pos_embed")]
    return LoadReport(weights.path, tuple(loaded), tuple(reshaped), tuple(weights.heads), fresh)


def _check_keys(model: RegisterViT, state: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Keys that the file may lack (the mask token, of no use to inference); UserError for any other
    difference."""
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys() - {"mask_token"})
    unexpected = sorted(state.keys() - wanted.keys())
    if missing:
        raise UserError(f"weights {path}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    if unexpected:
        raise UserError(f"weights {path}: {len(unexpected)} unknown tensors, the first is {unexpected[0]!r}")
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"weights {path}: {key!r} has shape {tuple(value.shape)}, expected {tuple(wanted[key].shape)}"
            )
    return () if "mask_token" in state else ("mask_token",)


def load(source: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> RegisterViT:
    """A model in evaluation mode: with the weights of a run folder or weight file, or, for a bare model
    name, with random ones. A path that exists wins over a name.

    device     where the model goes
    overrides  choices of a run, such as attention="sdpa"; for a bare name any argument of RegisterViT
    """
    path = find_weights(source)
    if path is None:
        try:
            model = build(str(source), **overrides)
        except UserError as error:
            if "is not known" not in str(error) or str(source).startswith("vit"):
                raise
            raise UserError(f"weights {str(source)!r}: no such file, run folder or model name") from None
        return model.to(device).eval()
    weights = read_weights(path)
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = RegisterViT(**(weights.architecture() | overrides))
    state = dict(weights.backbone)
    if _check_keys(model, state, weights.path):
        state["mask_token"] = torch.zeros(1, model.dim)
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(True)
