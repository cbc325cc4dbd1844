"""The `config.json` of other libraries, read as data: the architecture of an encoder and its preprocessing.

Only models that `RegisterViT` can compute are accepted; a config with anything else (another activation, no biases,
another epsilon) raises NotHeld, so that no weights are loaded into a model with different outputs.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dinoreg.models.layers import NORM_EPS
from dinoreg.models.registry import BASE, DINOV3, resampling
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import as_sides, is_number
from dinoreg.weights.architecture import Stated
from dinoreg.weights.files import read_json

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

_TIMM_CROP_SHARE = 0.875  # timm's default for `crop_pct`
_BYTE = 1 / 255


class NotHeld(UserError):
    """A valid file of a model that computes something that `RegisterViT` does not."""


def library_of(folder: Path) -> str | None:
    """ "transformers" or "timm" for a folder with such a library's config, else None."""
    path = folder / CONFIG
    if not path.is_file() or (folder / "config.yaml").is_file():
        return None
    config = read_json(path)
    if "model_type" in config:
        return "transformers"
    return "timm" if "architecture" in config else None


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
    share = share if is_number(share) and 0 < share <= 1 else _TIMM_CROP_SHARE
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
        raise NotHeld(f"weights {path}: architecture is {str(name)[:60]!r}, expected a ViT as DINOv2's or DINOv3's")
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
