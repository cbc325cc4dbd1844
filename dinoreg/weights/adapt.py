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
    adapted: tuple[str, ...]  # "patch_embed.proj.weight: 3 -> 5 channels (repeat)"
    grafted: tuple[str, ...]  # "register_tokens: 4 fresh registers"
    source: str  # whose file: "dinoreg", "Meta", "timm" or "transformers"
    positions: str  # how the model resamples its positions, and whose way that is
    fresh: tuple[str, ...] = ()  # in the encoder, not in the file: keep their start values

    def __str__(self) -> str:
        groups = sorted({key.partition(".")[0] for key in self.left_out})
        missing = [key for key in self.fresh if not any(line.startswith(f"{key}:") for line in self.grafted)]
        parts = {
            "reshaped": ", ".join(self.reshaped),
            "adapted": ", ".join(self.adapted),
            "grafted": ", ".join(self.grafted),
            f"left out {len(self.left_out)}": f"({', '.join(groups)})" if groups else "",
            "not in the file:": ", ".join(missing),
        }
        changes = [f"{what} {which}" for what, which in parts.items() if which]
        first = f"{len(self.loaded)} tensors loaded from {self.path} ({self.source})"
        return "; ".join([first, *changes, self.positions])


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
    if adapt_channels not in (None, *CHANNEL_WAYS):
        raise UserError(f"adapt_channels={adapt_channels!r} is not known; expected one of {', '.join(CHANNEL_WAYS)}")
    state, key = dict(weights.backbone), "patch_embed.proj.weight"
    reshaped, adapted, grafted = [], [], []
    old, new = ((a["image_size"][0] // a["patch_size"], a["image_size"][1] // a["patch_size"]) for a in (theirs, ours))
    if old != new:
        resampling = theirs["antialias"], theirs["position_offset"]
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], old, new, *resampling)
        reshaped.append(f"pos_embed: {old[0]}x{old[1]} -> {new[0]}x{new[1]}")
    before, after = theirs["in_channels"], ours["in_channels"]
    if before != after:
        if adapt_channels is None:
            raise UserError(
                f"weights {weights.path}: in_channels is {before}, the model's is {after}; "
                f"adapt_channels={'|'.join(CHANNEL_WAYS)} says how to adapt the projection (in a run: adapt.channels)"
            )
        state[key] = channels(state[key], after, adapt_channels)
        adapted.append(f"{key}: {before} -> {after} channels ({adapt_channels})")
    if ours["num_registers"] and not theirs["num_registers"]:
        grafted.append(f"register_tokens: {ours['num_registers']} fresh registers")
    whose = SOURCES[weights.source]
    was, now = (describe_resampling(a["antialias"], a["position_offset"]) for a in (theirs, ours))
    reason = f"as {whose} does" if was == now else f"as the model says; {whose}: {was}"
    return state, LoadReport(
        path=weights.path,
        loaded=tuple(key for key, value in weights.backbone.items() if state[key] is value),
        reshaped=tuple(reshaped),
        left_out=(*weights.heads, *weights.others),
        adapted=tuple(adapted),
        grafted=tuple(grafted),
        source=whose,
        positions=f"positions are resampled {now}, {reason}",
    )


def resample_pos_embed(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool, offset: float
) -> Tensor:
    """The class token's position as it is, those of the patches from one grid to another (see `resample_positions`).

    pos_embed  (1, 1 + gh * gw, D) -> (1, 1 + h * w, D)
    """
    moved = resample_positions(pos_embed[:, 1:], old, new, antialias, offset)
    return torch.cat([pos_embed[:, :1], moved], dim=1)


def channels(weight: Tensor, number: int, way: str) -> Tensor:
    """The patch projection for another number of input channels.

    weight  (D, C, p, p) -> (D, number, p, p)
    way     "mean": every channel gets the mean filter; "repeat": the filters in turn, over and over; both scaled by
            C / number, so that an image whose channels are all alike keeps its embedding (for "repeat" where `number`
            is a multiple of C). "zero": the first C channels keep their filters, the others start without effect
    raises  UserError where "repeat" or "zero" would drop channels
    """
    before = weight.shape[1]
    if way == "mean":
        return (weight.mean(dim=1, keepdim=True) * (before / number)).repeat(1, number, 1, 1)
    if number < before:
        raise UserError(f"adapt_channels={way}: would drop {before - number} of {before} channels; expected mean")
    if way == "repeat":
        return weight[:, torch.arange(number) % before] * (before / number)
    return torch.cat([weight, weight.new_zeros(weight.shape[0], number - before, *weight.shape[2:])], dim=1)
