"""The architecture of an encoder: inferred from its state dict, and as the `config.json` of other libraries states it.

Width, depth, patch size, channels, registers and FFN follow from the tensors' shapes. The rest (heads, a rectangular
grid, how positions are resampled, rotary ones) comes from the JSON beside the file, or from the library that wrote it.
The JSON must not contradict the shapes. A config of a library, read as data, states the preprocessing, too. Only models
that `RegisterViT` can compute are accepted; a config with anything else (another activation, no biases, another
epsilon) raises NotHeld, so that no weights are loaded into a model with different outputs.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dinoreg.models.layers import NORM_EPS, swiglu_hidden_dim
from dinoreg.models.registry import BASE, DINOV3, HEAD_DIM, resampling
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import as_sides, is_number
from dinoreg.runtime.printable import shortened
from dinoreg.weights.files import read_json


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
    found["register_neurons"] = _register_neurons(len(indices), hidden if registers else 0, stated, path)
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
    return next((r for r in (4.0, ratio) if hidden_dim_of(dim, ffn, r) == hidden), math.nextafter(ratio, math.inf))


def _register_neurons(depth: int, units: int, stated: Stated, path: str | Path) -> list[list[int]]:
    """The stated pairs of a block below `depth` and one of its `units`."""
    pairs = values if isinstance(values := stated.values.get("register_neurons", []), list) else [values]
    for pair in pairs:
        whole = isinstance(pair, list) and [type(number) for number in pair] == [int, int]
        if not (whole and 0 <= pair[0] < depth and 0 <= pair[1] < units):
            raise UserError(f"weights {path}: {stated.says('register_neurons')}, expected pairs of a block and a unit")
    return pairs


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
            have = f"the tensors have {num_patches} patch positions" if sides else "expected one or two sides"
            raise UserError(f"weights {path}: {stated.says('image_size')}, {have}")
        return [side // patch_size * patch_size for side in sides]
    if num_patches is None:
        return [max(224 // patch_size, 1) * patch_size] * 2
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise UserError(f"weights {path}: {num_patches} patch positions are not a square grid's")
    return [side * patch_size, side * patch_size]


# ------------------------------------------------------------------------------------------------------------
# The configs of other libraries


CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by Pillow's number, as transformers writes it


class Kind(NamedTuple):
    """A model type of transformers.

    name       of its class
    arguments  of RegisterViT: the config's name and default
    gate       the config's name for whether the FFN is gated
    acts       activation of a plain FFN and of a gated one; None: SiLU, whatever the config says
    fixed      what RegisterViT has no argument for: as the encoder has it, which is transformers' default
    """

    name: str
    arguments: dict[str, tuple[str, Any]]
    gate: str
    acts: tuple[str, str | None]
    fixed: dict[str, Any]


def _arguments(dim: int, heads: int, patch_size: int, norm_eps: float) -> dict[str, tuple[str, Any]]:
    return {
        "dim": ("hidden_size", dim),
        "depth": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", heads),
        "patch_size": ("patch_size", patch_size),
        "image_size": ("image_size", 224),
        "in_channels": ("num_channels", 3),
        "norm_eps": ("layer_norm_eps", norm_eps),
    }


_REGISTERS = "num_register_tokens"
_DINOV2 = _arguments(768, 12, 16, NORM_EPS) | {"ffn_ratio": ("mlp_ratio", 4)}
_SWIGLU = "use_swiglu_ffn", ("gelu", None), {"qkv_bias": True}
_ROPE = {"num_registers": (_REGISTERS, 0), "key_bias": ("key_bias", False), "rope_base": ("rope_theta", BASE)}
_GATED = "use_gated_mlp", ("gelu", "silu"), {"proj_bias": True, "mlp_bias": True}
KINDS = {
    "dinov2": Kind("Dinov2Model", _DINOV2 | {"patch_size": ("patch_size", 14)}, *_SWIGLU),
    "dinov2_with_registers": Kind("Dinov2WithRegistersModel", _DINOV2 | {"num_registers": (_REGISTERS, 4)}, *_SWIGLU),
    "dinov3_vit": Kind("DINOv3ViTModel", _arguments(384, 6, 16, DINOV3["norm_eps"]) | _ROPE, *_GATED),
}
_TIMM_DINOV3 = re.compile(r"vit_\w+_patch\d+_dinov3(?:_qkvb)?(?:\.\w+)?")
_TIMM_VIT = re.compile(r"vit_(tiny|small|base|large|giant)_patch\d+_(?:reg\d+_)?(?:dinov2|\d+)(?:\.\w+)?")
# Arguments of RegisterViT and of timm's ViT.
TIMM_ARGUMENTS = {"dim": "embed_dim", "depth": "depth", "heads": "num_heads", "patch_size": "patch_size",
                  "in_channels": "in_chans", "num_registers": "reg_tokens", "image_size": "img_size"}  # fmt: skip
TIMM_DINOV3_ARGUMENTS = TIMM_ARGUMENTS | {"num_registers": "num_reg_tokens", "rope_base": "rope_temperature"}
# Arguments of timm's ViT that change no output of its evaluation mode, or only the head's.
_TIMM_HARMLESS = {"num_classes", "dynamic_img_size", "dynamic_img_pad", "init_values", "no_embed_class", "mlp_ratio",
                  "drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
                  "attn_drop_rate", "weight_init", "fix_init", "strict_img_size", "mlp_layer", "act_layer",
                  "qkv_bias", "swiglu_mlp", "swiglu_align_to", "rope_rescale_coords"}  # fmt: skip

_BYTE = 1 / 255


class NotHeld(UserError):
    """A valid file of a model that computes something that `RegisterViT` does not."""


def library_of(folder: Path) -> str | None:
    """ "transformers" or "timm" for a folder with such a library's config, else None."""
    path = folder / CONFIG
    if not path.is_file() or (folder / "config.yaml").is_file():
        return None
    config = read_json(path)
    return "transformers" if "model_type" in config else "timm" if "architecture" in config else None


def read_config(folder: Path, library: str) -> Stated:
    """The architecture according to `config.json` in a library's folder.

    library  "timm" | "transformers"
    raises   NotHeld for a model that RegisterViT cannot represent, UserError for an invalid file
    """
    path = folder / CONFIG
    return {"timm": _timm, "transformers": _transformers}[library](read_json(path), path)


def preprocessing_of(folder: Path, library: str) -> dict[str, Any]:
    """What a library's folder says of pictures, by the keys of `model.json`, unchecked; what it leaves out is missing.

    Two more keys are for the report: "stated_by" names the file, "not_followed" what it says and dinoreg does not do.

    raises  UserError for a file that is not JSON
    """
    if library == "timm":
        return timm_preprocessing(_pretrained(read_json(folder / CONFIG)))
    side = folder / PROCESSOR
    return _processor(read_json(side)) if side.is_file() else {}


def timm_preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a `pretrained_cfg`; what that leaves out has timm's default."""
    size, how = config.get("input_size"), config.get("interpolation") or "bicubic"
    share: Any = config.get("crop_pct")
    sides = as_sides(size[1:]) if isinstance(size, list | tuple) else None
    share = share if is_number(share) and 0 < share <= 1 else 0.875  # timm's default
    stretched = config.get("crop_mode") not in (None, "center")
    return _found(
        CONFIG,
        {"stretches or pads pictures": stretched, f"resizes by {str(how)[:20]}": how not in INTERPOLATIONS.values()},
        mean=config.get("mean"),
        std=config.get("std"),
        image_size=sides,
        short_side=math.floor(min(sides) / share) if sides else None,
        interpolation=how,
    )


def _processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of transformers' `preprocessor_config.json`, in any of the ways in which its versions write sizes."""

    def sides(value: Any) -> tuple[int, int] | None:
        return as_sides([value.get("height"), value.get("width")] if isinstance(value, dict) else value)

    size, how = config.get("size"), config.get("resample")
    cropped = config.get("do_center_crop") is not False and config.get("crop_size") is not None
    size = {"shortest_edge": size} if cropped and type(size) is int else size
    short = size.get("shortest_edge") if isinstance(size, dict) else None
    scale: Any = config.get("rescale_factor", _BYTE) if config.get("do_rescale") is not False else 1.0
    mean: Any = config.get("image_mean")
    std: Any = config.get("image_std")
    if config.get("do_normalize") is False:
        mean, std = [0.0], [1.0]
    if is_number(scale) and scale > 0 and not math.isclose(scale, _BYTE, rel_tol=1e-4):  # of bytes, not of 0 to 1
        mean, std = ([x * _BYTE / scale for x in each] if _numbers(each) else each for each in (mean, std))
    return _found(
        PROCESSOR,
        {
            "stretches pictures or leaves them whole": bool(size) and (sides(size) is not None or not cropped),
            f"resizes by Pillow's filter {how}": how is not None and how not in INTERPOLATIONS,
        },
        mean=mean,
        std=std,
        image_size=sides(config.get("crop_size")) if cropped else sides(size) or as_sides(short),
        short_side=short,
        interpolation=INTERPOLATIONS.get(how) if type(how) is int else None,
    )


def _found(where: str, not_followed: Mapping[str, bool], **values: Any) -> dict[str, Any]:
    found = {key: value for key, value in values.items() if value is not None}
    other = [what for what, does in not_followed.items() if does]
    return found | {"stated_by": where} | ({"not_followed": " and ".join(other)} if other else {})


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def _pretrained(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("pretrained_cfg")
    return found if isinstance(found, dict) else {}


def _transformers(config: Mapping[str, Any], path: Path) -> Stated:
    """Every one of `KINDS`; what a config leaves out has the library's default."""
    model_type = str(config.get("model_type"))
    if model_type not in KINDS:
        raise NotHeld(f"weights {path}: model_type is {model_type[:40]!r}, expected {' or '.join(KINDS)}")
    kind = KINDS[model_type]
    values = {ours: config.get(theirs, default) for ours, (theirs, default) in kind.arguments.items()}
    gated = config.get(kind.gate, False) is True
    fixed = kind.fixed | ({"hidden_act": act} if (act := kind.acts[gated]) else {})
    if is_number(values["dim"]) and is_number(values["heads"]) and values["heads"]:
        fixed["head_dim"] = values["dim"] / values["heads"]
    for key, expected in fixed.items():
        if (found := config.get(key, expected)) != expected:
            raise NotHeld(f"weights {path}: {key}={found!r}, the encoder has {expected!r}")
    values |= {"patch_size": _one_side(values["patch_size"]), "ffn": "swiglu" if gated else "mlp"}
    values.setdefault("num_registers", 0)
    names = {ours: theirs for ours, (theirs, _) in kind.arguments.items()}
    values |= resampling("transformers", int("num_registers" in names))
    return Stated(values, path.name, names | {"ffn": kind.gate, "num_registers": _REGISTERS})


def _timm(config: Mapping[str, Any], path: Path) -> Stated:
    """timm's hub config: the architecture's name, arguments that differ from its defaults, and the input size."""
    name = config.get("architecture")
    dinov3 = isinstance(name, str) and _TIMM_DINOV3.fullmatch(name) is not None
    if not isinstance(name, str) or not (dinov3 or _TIMM_VIT.fullmatch(name)):
        raise NotHeld(f"weights {path}: architecture is {name!r:.62}, expected a ViT of the DINOv2 or DINOv3 kind")
    arguments = config.get("model_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    names = TIMM_DINOV3_ARGUMENTS if dinov3 else TIMM_ARGUMENTS
    unknown = [key for key in arguments if key not in {*names.values(), *_TIMM_HARMLESS}]
    if unknown:
        raise NotHeld(f"weights {path}: model_args has {unknown[0][:40]!r}, which the encoder does not know")
    values = {ours: _one_side(arguments[theirs]) for ours, theirs in names.items() if theirs in arguments}
    if dinov3:
        values.setdefault("rope_base", BASE)
    else:
        values.setdefault("num_registers", int(found[1]) if (found := re.search(r"_reg(\d+)_", name)) else 0)
    size = _pretrained(config).get("input_size")
    if "image_size" not in values and isinstance(size, list) and len(size) == 3:
        values["image_size"] = size[1:]
    return Stated(values | resampling("timm", 0), path.name, names)


def _one_side(size: Any) -> Any:
    return size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
