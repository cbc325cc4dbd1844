"""Models by name, and models with weights.

A name says the architecture (`vits14_reg4`); the names under which Meta, timm and transformers publish the
same architectures are understood too. Weights come from a run, a file or a library's folder (`weights.py`), and never
silently: every tensor is loaded, made to fit (`adapt.py`) or left out by name, and a report says which.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinoreg.models.registry import HEAD_DIM, _check_options, build
from dinoreg.models.vit import TOKEN_STD, RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights.adapt import LoadReport, fit
from dinoreg.weights.resolve import Weights, find_weights, read_weights

logger = logging.getLogger(__name__)


def load_into(model: RegisterViT, source: str | Path, adapt_channels: str | None = None) -> LoadReport:
    """Copy the weights of `source` (whatever `read_weights` takes) into `model`, in place.

    The position grid is resampled to the model's. Registers that the model has and the file has not keep their fresh
    start values. Everything else must agree: UserError naming the first property in which the two architectures
    differ, before anything is changed.

    adapt_channels  "mean" | "repeat" | "zero": how the patch projection follows another number of input channels
    """
    weights = read_weights(source)
    tells_heads = model.dim % HEAD_DIM == 0  # as every published width does
    theirs = weights.architecture(None if tells_heads else model.heads)
    state, report = fit(weights, theirs, model, adapt_channels, "the model's is")
    model.load_state_dict(state, strict=False)
    return report


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
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = RegisterViT(**(theirs | overrides))
    state, report = fit(weights, theirs, model, adapt_channels, "what was asked for is")
    if "mask_token" in report.fresh:
        state["mask_token"] = torch.zeros(1, model.dim)
    if "register_tokens" in report.fresh:
        generator = torch.Generator().manual_seed(0)
        state["register_tokens"] = TOKEN_STD * torch.randn(1, model.num_registers, model.dim, generator=generator)
    model.load_state_dict(state, assign=True)
    changed = report.reshaped or report.adapted or report.grafted
    logger.log(logging.WARNING if changed else logging.INFO, "%s", report)
    return Loaded(model.to(device).eval().requires_grad_(True), report, weights)


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
