"""Models with weights, from a run, a file or a library's folder (`resolve.py`); random ones are `random:NAME`.

Every tensor is loaded, adapted or left out, and a report lists which.

Weights can be adapted to an encoder that differs in image size, input channels or registers; nothing else may differ.
Positions are resampled as the library of the file does it, so that a model resized on loading equals that library's at
the new size.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.registry import HEAD_DIM, _check_options, build
from dinoreg.models.vit import TOKEN_STD, RegisterViT, resample_positions
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import as_sides, is_number
from dinoreg.weights.architecture import hidden_dim_of
from dinoreg.weights.names import random_name
from dinoreg.weights.resolve import SOURCES, Weights, find_weights

logger = logging.getLogger(__name__)

CHANNEL_WAYS = ("mean", "repeat", "zero")
PROJECTION = "patch_embed.proj.weight"
_PER_CHANNEL = {"mean": 1, "std": 1, "range": 2}  # numbers that a preprocessing has for each


class LoadReport:
    """The tensors of a file, adapted to a model, and what was done with every one of them and of the model.

    weights   the content of the file
    model     adapted to, which has the weights when it was loaded
    state     the tensors by name, without added registers and a missing mask token, which the caller initialises
    loaded    names of the tensors taken as they are
    reshaped  "pos_embed: 16x16 -> 37x37"
    adapted   "patch_embed.proj.weight: 3 -> 5 channels (repeat)"
    grafted   "register_tokens: 4 fresh registers"
    fresh     what is in the encoder, not in the file, and keeps its start values
    """

    def __init__(
        self, weights: Weights, theirs: Mapping[str, Any], model: RegisterViT, adapt_channels: str | None, whose: str
    ) -> None:
        """Neither the weights nor the model are changed.

        theirs          the architecture of `weights`, as arguments of RegisterViT
        adapt_channels  "mean" | "repeat" | "zero", or None: other channels are refused
        whose           the model's side in words, for messages
        raises          UserError where the two differ beyond what can be adapted
        """
        if adapt_channels not in (None, *CHANNEL_WAYS):
            raise UserError(f"adapt_channels={adapt_channels!r}: expected one of {', '.join(CHANNEL_WAYS)}")
        ours, path = model.architecture(), weights.path
        check_same(theirs, ours, path, whose)
        state, key = dict(weights.backbone), PROJECTION
        self.reshaped = self.adapted = ""
        (height, width), new = theirs["image_size"], model.grid
        old = (height // model.patch_size, width // model.patch_size)
        if old != new and "pos_embed" in state:
            resampling = theirs["antialias"], theirs["position_offset"]
            state["pos_embed"] = resample_pos_embed(state["pos_embed"], old, new, *resampling)
            self.reshaped = f"pos_embed: {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
        before, after = state[key].shape[1], model.patch_embed.proj.in_channels
        if before != after:
            if adapt_channels is None:
                how = f"adapt_channels={'|'.join(CHANNEL_WAYS)} says how (in a run: adapt.channels)"
                raise UserError(f"weights {path}: in_channels is {before}, the model's is {after}; {how}")
            state[key] = channels(state[key], after, adapt_channels)
            self.adapted = f"{key}: {before} -> {after} channels ({adapt_channels})"
        grafts = model.num_registers if not theirs["num_registers"] else 0
        self.fresh = _check_keys(state, model, path, {"mask_token", "register_tokens"} if grafts else {"mask_token"})
        self.weights, self.model, self.state = weights, model, state
        self.grafted = f"register_tokens: {grafts} fresh registers" if grafts else ""
        self.loaded = [key for key, value in weights.backbone.items() if state[key] is value]

    def __str__(self) -> str:
        weights = self.weights
        groups = sorted({key.partition(".")[0] for key in weights.left_out})
        parts = {
            "reshaped": self.reshaped,
            "adapted": self.adapted,
            "grafted": self.grafted,
            f"left out {len(weights.left_out)}": f"({', '.join(groups)})" if groups else "",
            "not in the file:": ", ".join(key for key in self.fresh if not self.grafted.startswith(f"{key}:")),
        }
        changes = [f"{what} {which}" for what, which in parts.items() if which]
        network = f", {weights.where!r} in it" if weights.where and weights.source != "dinoreg" else ""
        network += f", not {' or '.join(map(repr, weights.others))}" if weights.others else ""
        first = f"{len(self.loaded)} tensors loaded from {weights.path} ({SOURCES[weights.source]}{network})"
        return "; ".join([first, *changes, describe_preprocessing(weights.preprocessing)])


def load_into(model: RegisterViT, source: str | Path, adapt_channels: str | None = None) -> LoadReport:
    """Copy the weights of `source` (see `Weights`) into `model`, in place.

    The position grid is resampled to the model's. If the file has no registers, those of the model keep their values.

    adapt_channels  "mean" | "repeat" | "zero": how to adapt the patch projection to another number of input channels;
                    None: not at all
    raises          UserError, before anything is changed, for a file that cannot be read, and naming the first other
                    property in which the architectures differ
    """
    weights = Weights(source)
    tells_heads = model.dim % HEAD_DIM == 0  # as every published width does
    theirs = weights.architecture(None if tells_heads else model.heads)
    report = LoadReport(weights, theirs, model, adapt_channels, "the model's is")
    model.load_state_dict(report.state, strict=False)
    return report


def load_reported(
    source: str | Path, device: str | torch.device = "cpu", adapt_channels: str | None = None, **overrides: Any
) -> LoadReport:
    """As `load`, but a report with the model, and only for weights that exist (UserError otherwise)."""
    _check_options(overrides)
    weights = Weights(source)
    theirs = weights.architecture(overrides.get("heads"))
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = RegisterViT(**(theirs | overrides))
    report = LoadReport(weights, theirs, model, adapt_channels, "what was asked for is")
    state = report.state
    if "mask_token" in report.fresh:
        state["mask_token"] = torch.zeros(1, model.dim)
    if "register_tokens" in report.fresh:
        generator = torch.Generator().manual_seed(0)
        state["register_tokens"] = TOKEN_STD * torch.randn(1, model.num_registers, model.dim, generator=generator)
    model.load_state_dict(state, assign=True)
    model.preprocessing = _preprocessing(weights, theirs, model)
    changed = bool(report.reshaped or report.adapted or report.grafted or weights.others)
    changed |= "stated_by" in weights.preprocessing  # a library's words, which ours stand for
    logger.log(logging.WARNING if changed else logging.INFO, "%s", report)
    report.model = model.to(device).eval().requires_grad_(True)
    return report


def load(
    source: str | Path, device: str | torch.device = "cpu", adapt_channels: str | None = None, **overrides: Any
) -> RegisterViT:
    """A model to compute features with, with float32 weights from a file, or random ones for `random:NAME`.

    It is in evaluation mode, and no gradients are kept: to train it, call `model.train().requires_grad_(True)`.

    source          a run folder (its last state), checkpoint or teacher file; a file or folder of Meta, timm or
                    transformers; or `random:NAME`. A path that exists takes precedence
    device          of the returned model
    adapt_channels  "mean" | "repeat" | "zero", for an `in_channels` other than the file's (see `adapt.channels`)
    overrides       choices of a run, such as attention="sdpa"; `image_size` resamples the position grid, `in_channels`
                    adapts the patch projection, `num_registers` adds new registers to a backbone without any; for
                    random weights any argument of RegisterViT
    raises          UserError for a source that cannot be read, for a published name, which is not downloaded, and for
                    overrides that do not fit

    `load_reported` also returns a report of what was done.
    """
    name = random_name(source)
    if name is None or find_weights(source) is not None:
        return load_reported(source, device, adapt_channels, **overrides).model.requires_grad_(False)
    if adapt_channels is not None:
        raise UserError(f"adapt_channels={adapt_channels!r} is for weights, and {str(source)!r} is none")
    return build(name, **overrides).to(device).eval().requires_grad_(False)


def select_channels(model: RegisterViT, chosen: Sequence[int]) -> RegisterViT:
    """A copy of a model that takes some of its image channels, in any order, and the statistics of these.

    It computes what the model does where the other channels are at their mean, which `augment.channel_drop` trains for.
    Of a bag of channels, what it does of these; with one of them it is the plain network of one channel.

    chosen  indices of channels, from 0, each once
    raises  UserError for channels that the model does not have, for one that is named twice, and for none
    """
    if not chosen or len({*chosen}) < len(chosen) or not {*chosen} <= {*range(model.in_channels)}:
        raise UserError(f"channels={list(chosen)}: expected some of 0 to {model.in_channels - 1}, each once")
    options = {"in_channels": len(chosen)} | ({"channels": "joint"} if len(chosen) == 1 else {})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if model.channels == "joint":
        state[PROJECTION] = state[PROJECTION][:, list(chosen)].clone()
    selected = rebuilt(model, options, state)
    stated = dict(model.preprocessing or {})
    for key, each in _PER_CHANNEL.items():
        values = stated.get(key)
        if isinstance(values, Sequence) and len(values) == each * model.in_channels:
            stated[key] = [values[each * channel + part] for channel in chosen for part in range(each)]
    selected.preprocessing = stated or None
    return selected.train(model.training).requires_grad_(any(p.requires_grad for p in model.parameters()))


def rebuilt(model: RegisterViT, changes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RegisterViT:
    """A model of another architecture with the same tensors, in evaluation mode and without gradients.

    changes  arguments of RegisterViT in place of the model's own
    tensors  in place of the model's own, which are otherwise shared
    raises   UserError as RegisterViT does
    """
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        other = RegisterViT(**{**model.architecture(), "attention": model.attention_backend, **changes})
    other.load_state_dict({**model.state_dict(), **tensors}, assign=True)
    other.preprocessing = model.preprocessing
    return other.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ making them fit


def check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path, whose: str) -> None:
    """UserError naming the first property in which two architectures differ beyond what can be adapted.

    theirs, ours  arguments of RegisterViT, of the file and of the model
    path          of the file, for messages
    whose         the model's side in words, such as "the model's is"
    """

    def comparable(architecture: Mapping[str, Any]) -> dict[str, Any]:
        width = hidden_dim_of(architecture["dim"], architecture["ffn"], architecture["ffn_ratio"])
        return {**architecture, "layerscale": bool(architecture["layerscale"]), "ffn width": width}

    a, b = comparable(theirs), comparable(ours)
    hints = {
        "rope_base": "; names of models that end with _rope have rotary positions",
        "register_neurons": "; registers added at test time are not trained: take the weights they were added to",
    }
    keys = ("dim", "depth", "patch_size", "ffn", "heads", "layerscale", "ffn width")
    for key in (*keys, "rope_base", "key_bias", "norm_eps", "register_neurons"):
        if a[key] != b[key]:
            raise UserError(f"weights {path}: {key} is {a[key]}, {whose} {b[key]}{hints.get(key, '')}")
    if a["num_registers"] not in (0, b["num_registers"]):
        differ = f"num_registers is {a['num_registers']}, {whose} {b['num_registers']}"
        raise UserError(f"weights {path}: {differ}; registers are only grafted onto a backbone that has none")


def _preprocessing(weights: Weights, theirs: Mapping[str, Any], model: RegisterViT) -> dict[str, Any] | None:
    """What the weights state of pictures, as far as it fits the model, whose size and channels may be others."""
    stated = dict(weights.preprocessing)
    for key, each in _PER_CHANNEL.items() if theirs["in_channels"] != model.in_channels else ():
        values = stated.pop(key, None)
        if model.channels != "joint" and isinstance(values, list) and values == values[:each] * (len(values) // each):
            stated[key] = values[:each]  # one for all channels, and so for any
    sides, short = as_sides(stated.get("image_size")), stated.pop("short_side", None)
    if sides and model.image_size != tuple(theirs["image_size"]):
        stated["image_size"] = list(model.image_size)
        short = round(short * min(model.image_size) / min(sides)) if is_number(short) else None
    stated |= {} if short is None else {"short_side": short}
    return stated or None


def describe_preprocessing(stated: Mapping[str, Any]) -> str:
    """What a model's JSON, or a library's, states of pictures, in words."""
    words = {"short_side": "short side", "image_size": "crop", "interpolation": "", "mean": "mean", "std": "std"}
    words["range"] = "data.range"
    parts = [f"{word} {stated[key]}".strip() for key, word in words.items() if stated.get(key) is not None]
    if not parts:
        return "nothing beside them says what is done with pictures"
    text = f"pictures as {stated.get('stated_by', 'the JSON beside them')} says: {', '.join(parts)}"
    return text + (f"; it also {stated['not_followed']}, which is not done" if "not_followed" in stated else "")


def _check_keys(state: Mapping[str, Tensor], model: RegisterViT, path: Path, spare: set[str]) -> tuple[str, ...]:
    """The keys among `spare` that are missing in `state`; UserError for any other difference from the model."""
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    for keys, what in ((sorted({*missing} - spare), "tensors are missing"), (unexpected, "unknown tensors")):
        if keys:
            raise UserError(f"weights {path}: {len(keys)} {what}, the first is {keys[0]!r}")
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(wanted[key].shape)}"
            raise UserError(f"weights {path}: {key!r} has shape {shapes}")
    return tuple(missing)


def resample_pos_embed(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool, offset: float
) -> Tensor:
    """Resample the patch positions (see `resample_positions`); the class token's position is unchanged.

    pos_embed  (1, 1 + gh * gw, D)   old = (gh, gw)
    returns    (1, 1 + h * w, D)     new = (h, w)
    """
    return torch.cat([pos_embed[:, :1], resample_positions(pos_embed[:, 1:], old, new, antialias, offset)], dim=1)


def channels(weight: Tensor, number: int, way: str) -> Tensor:
    """Adapt the patch projection to another number of input channels.

    weight  (D, C, p, p)
    way     "mean": every channel gets the mean filter; "repeat": the filters in cyclic order; both scaled by
            C / number, so that an image with equal channels keeps its embedding (for "repeat" where `number` is a
            multiple of C). "zero": the first C channels keep their filters, those of the others are 0
    returns (D, number, p, p)
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
