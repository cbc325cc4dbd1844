"""Making the weights of one encoder fit another that differs in image size, input channels or registers.

Nothing else may differ. Positions are resampled as the library does in which the weights were at home, so that a model
resized on loading equals that library's at the new size. `LoadReport` names what was taken, changed, added, left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.vit import resample_positions
from dinoreg.runtime.errors import UserError
from dinoreg.weights.architecture import describe_resampling, hidden_dim_of
from dinoreg.weights.resolve import SOURCES, Weights

CHANNEL_WAYS = ("mean", "repeat", "zero")


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file, and of every tensor of the model."""

    path: Path
    loaded: tuple[str, ...]  # taken as they are
    reshaped: tuple[str, ...]  # "pos_embed: 16x16 -> 37x37"
    left_out: tuple[str, ...]  # in the file, not in the encoder: heads, and what stands beside a state dict
    fresh: tuple[str, ...] = ()  # in the encoder, not in the file: keep their start values
    adapted: tuple[str, ...] = ()  # "patch_embed.proj.weight: 3 -> 5 channels (repeat)"
    grafted: tuple[str, ...] = ()  # "register_tokens: 4 fresh registers"
    source: str = "Meta"  # whose file: "dinoreg", "Meta", "timm" or "transformers"
    positions: str = ""  # how the model resamples its positions, and whose way that is

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from {self.path} ({self.source})"]
        for verb, which in (("reshaped", self.reshaped), ("adapted", self.adapted), ("grafted", self.grafted)):
            if which:
                parts.append(f"{verb} {', '.join(which)}")
        if self.left_out:
            groups = sorted({key.partition(".")[0] for key in self.left_out})
            parts.append(f"left out {len(self.left_out)} ({', '.join(groups)})")
        rest = [key for key in self.fresh if not any(line.startswith(f"{key}:") for line in self.grafted)]
        if rest:
            parts.append(f"not in the file: {', '.join(rest)}")
        if self.positions:
            parts.append(self.positions)
        return "; ".join(parts)


def check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path, whose: str = "the model's is") -> None:
    """UserError naming the first property in which two architectures differ that no adaptation bridges."""

    def comparable(architecture: Mapping[str, Any]) -> dict[str, Any]:
        width = hidden_dim_of(architecture["dim"], architecture["ffn"], architecture["ffn_ratio"])
        return {**architecture, "layerscale": bool(architecture["layerscale"]), "ffn width": width}

    a, b = comparable(theirs), comparable(ours)
    for key in ("dim", "depth", "patch_size", "ffn", "heads", "layerscale", "ffn width"):
        if a[key] != b[key]:
            raise UserError(f"weights {path}: {key} is {a[key]}, {whose} {b[key]}")
    if a["num_registers"] not in (0, b["num_registers"]):
        raise UserError(
            f"weights {path}: num_registers is {a['num_registers']}, {whose} {b['num_registers']}; "
            "registers are only grafted onto a backbone that has none"
        )


def fit(
    weights: Weights, theirs: Mapping[str, Any], ours: Mapping[str, Any], adapt_channels: str | None
) -> tuple[dict[str, Tensor], LoadReport]:
    """The backbone of `weights` for the architecture `ours`; new tensors, none of the old is changed.

    Grafted registers are named in the report and not among the tensors: their start values are the model's matter. So
    is what else is missing, which the report does not name yet.
    """
    state = dict(weights.backbone)
    reshaped, adapted = {}, {}
    grafted: list[str] = []
    grids = [tuple(side // a["patch_size"] for side in a["image_size"]) for a in (theirs, ours)]
    if grids[0] != grids[1]:
        positions, (old, new) = state["pos_embed"], grids
        moved = resample_positions(positions[:, 1:], old, new, theirs["antialias"], theirs["position_offset"])
        state["pos_embed"] = torch.cat([positions[:, :1], moved], dim=1)
        reshaped["pos_embed"] = f"pos_embed: {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    before, after = theirs["in_channels"], ours["in_channels"]
    key = "patch_embed.proj.weight"
    if before != after:
        if adapt_channels is None:
            raise UserError(
                f"weights {weights.path}: in_channels is {before}, the model's is {after}; "
                f"adapt_channels={'|'.join(CHANNEL_WAYS)} says how to adapt the projection (in a run: adapt.channels)"
            )
        state[key] = channels(state[key], after, adapt_channels)
        adapted[key] = f"{key}: {before} -> {after} channels ({adapt_channels})"
    elif adapt_channels is not None and adapt_channels not in CHANNEL_WAYS:
        channels(state[key], after, adapt_channels)  # a wrong choice is wrong at any number
    if ours["num_registers"] and not theirs["num_registers"]:
        grafted.append(f"register_tokens: {ours['num_registers']} fresh registers")
    return state, LoadReport(
        path=weights.path,
        loaded=tuple(key for key in weights.backbone if key not in {**reshaped, **adapted}),
        reshaped=tuple(reshaped.values()),
        left_out=(*weights.heads, *weights.others),
        adapted=tuple(adapted.values()),
        grafted=tuple(grafted),
        source=SOURCES[weights.source],
        positions=_describe_positions(SOURCES[weights.source], theirs, ours),
    )


def _describe_positions(whose: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    was, now = (describe_resampling(a["antialias"], a["position_offset"]) for a in (theirs, ours))
    if was != now:
        return f"positions are resampled {now}, as the model says; {whose}: {was}"
    return f"positions are resampled {now}, as {whose} does"


def channels(weight: Tensor, number: int, way: str) -> Tensor:
    """The patch projection for another number of input channels.

    weight  (D, C, p, p) -> (D, number, p, p)
    way     "mean": every channel gets the mean filter; "repeat": the filters in turn, over and over; both scaled by
            C / number, so that an image whose channels are all alike keeps its embedding (for "repeat" where `number`
            is a multiple of C). "zero": the first C channels keep their filters, the others start without effect
    raises  UserError for another way, and where "repeat" or "zero" would drop channels
    """
    if way not in CHANNEL_WAYS:
        raise UserError(f"adapt_channels={way!r} is not known; expected one of {', '.join(CHANNEL_WAYS)}")
    before = weight.shape[1]
    if way == "mean":
        return (weight.mean(dim=1, keepdim=True) * (before / number)).repeat(1, number, 1, 1)
    if number < before:
        raise UserError(f"adapt_channels={way}: would drop {before - number} of {before} channels; expected mean")
    if way == "repeat":
        return weight[:, torch.arange(number) % before] * (before / number)
    return torch.cat([weight, weight.new_zeros(weight.shape[0], number - before, *weight.shape[2:])], dim=1)
