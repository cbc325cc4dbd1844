"""Models by name, and models with weights.

A name says the architecture (`vits14_reg4`); the names under which Meta, timm and transformers publish the
same architectures are understood too. Weights come from a run, a file or a library's folder (`weights.py`), and never
silently: every tensor is loaded, made to fit (`adapt.py`) or left out by name, and a report says which.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinoreg.errors import UserError
from dinoreg.models.adapt import LoadReport, check_same, fit, report
from dinoreg.models.architecture import HEAD_DIM, resampling
from dinoreg.models.vit import TOKEN_STD, RegisterViT, as_pair
from dinoreg.models.weights import Weights, find_weights, read_weights

logger = logging.getLogger(__name__)

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
        options |= {"image_size": image_size, "layerscale": 1.0} | resampling("meta", registers)
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
    _check_options(overrides)
    return RegisterViT(**(parse_name(name) | overrides))


def _check_options(overrides: Mapping[str, Any]) -> None:
    accepted = [p for p in inspect.signature(RegisterViT.__init__).parameters if p != "self"]
    for key in overrides:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(accepted)}"
            raise UserError(f"model option {key!r} is not known{hint}")


def load_into(model: RegisterViT, source: str | Path, adapt_channels: str | None = None) -> LoadReport:
    """Copy the weights of `source` (whatever `read_weights` takes) into `model`, in place.

    The position grid is resampled to the model's. Registers that the model has and the file has not keep their fresh
    start values. Everything else must agree: UserError naming the first property in which the two architectures
    differ, before anything is changed.

    adapt_channels  "mean" | "repeat" | "zero": how the patch projection follows another number of input channels
    """
    weights = read_weights(source)
    tells_heads = model.dim % HEAD_DIM == 0  # as every published width does
    theirs, ours = weights.architecture(None if tells_heads else model.heads), model.architecture()
    check_same(theirs, ours, weights.path)
    state, changes = fit(weights, theirs, ours, adapt_channels)
    fresh = _check_keys(model, state, weights.path, {"mask_token", *changes.grafted})
    model.load_state_dict(state, strict=False)
    return report(weights, theirs, ours, changes, fresh)


def _check_keys(model: RegisterViT, state: Mapping[str, Tensor], path: Path, spare: set[str]) -> tuple[str, ...]:
    """The keys among `spare` that are missing in `state`; UserError for any other difference from the model."""
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys() - spare)
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
    return tuple(sorted(wanted.keys() - state.keys()))


class Loaded(NamedTuple):
    """A model with weights, what became of every tensor, and the file they came from."""

    model: RegisterViT
    report: LoadReport
    weights: Weights


def load_reported(
    source: str | Path, device: str | torch.device = "cpu", adapt_channels: str | None = None, **overrides: Any
) -> Loaded:
    """`load` for weights that exist, with the report on them."""
    _check_options(overrides)
    weights = read_weights(source)
    theirs = weights.architecture(overrides.get("heads"))
    given = dict(overrides)
    if "image_size" in given:
        given["image_size"] = list(as_pair(given["image_size"], "image_size"))
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = RegisterViT(**(theirs | given))
    ours = model.architecture()
    check_same(theirs, ours, weights.path, "what was asked for is")
    state, changes = fit(weights, theirs, ours, adapt_channels)
    fresh = _check_keys(model, state, weights.path, {"mask_token", *changes.grafted})
    if "mask_token" in fresh:
        state["mask_token"] = torch.zeros(1, model.dim)
    if "register_tokens" in fresh:
        generator = torch.Generator().manual_seed(0)
        state["register_tokens"] = TOKEN_STD * torch.randn(1, model.num_registers, model.dim, generator=generator)
    model.load_state_dict(state, assign=True)
    told = report(weights, theirs, ours, changes, fresh)
    changed = told.reshaped or told.adapted or told.grafted
    logger.log(logging.WARNING if changed else logging.INFO, "%s", told)
    return Loaded(model.to(device).eval().requires_grad_(True), told, weights)


def load(
    source: str | Path, device: str | torch.device = "cpu", adapt_channels: str | None = None, **overrides: Any
) -> RegisterViT:
    """A model in evaluation mode: with the weights of a run, a file or a library's folder, or, for a bare model name,
    with random ones. A path that exists wins over a name.

    source          a run folder, checkpoint or teacher file; a file or folder of Meta, timm or transformers; a name
    device          where the model goes
    adapt_channels  "mean" | "repeat" | "zero", for an `in_channels` other than the file's (see `adapt.channels`)
    overrides       choices of a run, such as attention="sdpa"; `image_size` resamples the position grid, `in_channels`
                    adapts the patch projection, `num_registers` grafts fresh registers onto a backbone without any;
                    for a bare name any argument of RegisterViT
    raises          UserError for whatever does not fit; `load_reported` returns what was done besides the model
    """
    if find_weights(source) is not None:
        return load_reported(source, device, adapt_channels, **overrides).model
    if adapt_channels is not None:
        raise UserError(f"adapt_channels={adapt_channels!r} is for weights, and {str(source)!r} is none")
    try:
        model = build(str(source), **overrides)
    except UserError as error:
        if "is not known; expected vit" not in str(error) or str(source).startswith("vit"):
            raise
        raise UserError(f"weights {str(source)!r}: no such file, run folder or model name") from None
    return model.to(device).eval()
