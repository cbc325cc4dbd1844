"""The `config.json` of other libraries, read as data: what it states about an encoder and its preprocessing.

Only what `RegisterViT` computes is accepted; a config that asks for anything else (another activation, no biases,
another epsilon) raises NotHeld, so that nothing is loaded into a model that would answer differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.models.layers import NORM_EPS
from dinoreg.models.registry import resampling
from dinoreg.runtime.errors import UserError
from dinoreg.weights.architecture import Stated, is_number
from dinoreg.weights.files import read_json

CONFIG = "config.json"

_DINOV2 = {"dinov2": 14, "dinov2_with_registers": 16}  # model types, and their default patch size
_TIMM_VIT = re.compile(r"vit_(tiny|small|base|large|giant)_patch\d+_(?:reg\d+_)?(?:dinov2|\d+)(?:\.\w+)?")
_TIMM_ARGUMENTS = {"embed_dim": "dim", "depth": "depth", "num_heads": "heads", "patch_size": "patch_size",
                   "in_chans": "in_channels", "reg_tokens": "num_registers", "img_size": "image_size"}  # fmt: skip
# Arguments of timm's ViT that change no output of its evaluation mode, or only the head's.
_TIMM_HARMLESS = {"num_classes", "dynamic_img_size", "dynamic_img_pad", "init_values", "no_embed_class", "mlp_ratio",
                  "drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
                  "attn_drop_rate", "weight_init", "fix_init", "strict_img_size", "mlp_layer", "act_layer"}  # fmt: skip


class NotHeld(UserError):
    """A sound file of a model that computes something `RegisterViT` does not."""


def library_of(folder: Path) -> str | None:
    """ "transformers" or "timm" for a folder with such a library's config, else None."""
    path = folder / CONFIG
    if not path.is_file() or (folder / "config.yaml").is_file():
        return None
    config = read_json(path)
    if "model_type" in config:
        return "transformers"
    return "timm" if "architecture" in config else None


def read_config(folder: Path, library: str) -> tuple[Stated, dict[str, Any]]:
    """(what is stated about the architecture, `preprocessing_of`) of a library's folder.

    raises NotHeld for a model that RegisterViT cannot hold, UserError for a file that makes no sense
    """
    path = folder / CONFIG
    config = read_json(path)
    stated = _timm(config, _pretrained(config), path) if library == "timm" else _dinov2(config, path)
    return stated, preprocessing_of(folder, library)


def preprocessing_of(folder: Path, library: str) -> dict[str, Any]:
    """{"mean", "std"} by channel, each where a library's folder states it."""
    if library == "timm":
        return _preprocessing(_pretrained(read_json(folder / CONFIG)), "mean", "std", folder / CONFIG)
    side = folder / "preprocessor_config.json"
    return _preprocessing(read_json(side), "image_mean", "image_std", side) if side.is_file() else {}


def _pretrained(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("pretrained_cfg")
    return found if isinstance(found, dict) else {}


def _dinov2(config: Mapping[str, Any], path: Path) -> Stated:
    """transformers' Dinov2 and Dinov2WithRegisters; what a config leaves out has the library's default."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DINOV2:
        raise NotHeld(f"weights {path}: model_type is {str(kind)[:40]!r}, expected {' or '.join(_DINOV2)}")
    swiglu = config.get("use_swiglu_ffn", False)
    width, heads = config.get("hidden_size", 768), config.get("num_attention_heads", 12)
    wanted: dict[str, tuple[Any, Any]] = {
        "layer_norm_eps": (config.get("layer_norm_eps", 1e-6), NORM_EPS),
        "qkv_bias": (config.get("qkv_bias", True), True),
        "hidden_act": (config.get("hidden_act", "gelu"), "gelu"),
    }
    if swiglu is True:
        del wanted["hidden_act"]  # SwiGLU's is SiLU whatever is written here
    if "head_dim" in config and is_number(width) and is_number(heads):
        wanted["head_dim"] = (config["head_dim"], width / heads if heads else None)
    for key, (found, expected) in wanted.items():
        close = is_number(found) and is_number(expected) and math.isclose(found, expected, rel_tol=1e-6)
        if not close and found != expected:
            raise NotHeld(f"weights {path}: {key}={found!r}, the encoder has {expected!r}")
    registers = config.get("num_register_tokens", 4) if kind == "dinov2_with_registers" else 0
    values = {
        "dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "heads": heads,
        "patch_size": _one_side(config.get("patch_size", _DINOV2[kind])),
        "image_size": config.get("image_size", 224),
        "in_channels": config.get("num_channels", 3),
        "num_registers": registers,
        "ffn": "swiglu" if swiglu is True else "mlp",
        "ffn_ratio": config.get("mlp_ratio", 4),
        **resampling("transformers", int(kind == "dinov2_with_registers")),
    }
    names = {
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "in_channels": "num_channels",
        "num_registers": "num_register_tokens",
        "ffn": "use_swiglu_ffn",
        "ffn_ratio": "mlp_ratio",
    }
    return Stated(values, path.name, names)


def _timm(config: Mapping[str, Any], pretrained: Mapping[str, Any], path: Path) -> Stated:
    """A folder that timm saves for a hub: its architecture's name, the arguments that were changed, the input size."""
    name = config.get("architecture")
    if not isinstance(name, str) or not _TIMM_VIT.fullmatch(name):
        raise NotHeld(f"weights {path}: architecture is {str(name)[:60]!r}, expected a ViT of the DINOv2 kind")
    arguments = config.get("model_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    unknown = [key for key in arguments if key not in _TIMM_ARGUMENTS and key not in _TIMM_HARMLESS]
    if unknown:
        raise NotHeld(f"weights {path}: model_args has {unknown[0][:40]!r}, which the encoder does not know")
    values = {ours: arguments[theirs] for theirs, ours in _TIMM_ARGUMENTS.items() if theirs in arguments}
    values.setdefault("num_registers", int(found[1]) if (found := re.search(r"_reg(\d+)_", name)) else 0)
    size = pretrained.get("input_size")
    if "image_size" not in values and isinstance(size, list) and len(size) == 3:
        values["image_size"] = size[1:]
    for key in ("patch_size", "num_registers", "in_channels"):
        if key in values:
            values[key] = _one_side(values[key])
    return Stated(values | resampling("timm", 0), path.name, {ours: theirs for theirs, ours in _TIMM_ARGUMENTS.items()})


def _one_side(size: Any) -> Any:
    return size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size


def _preprocessing(config: Mapping[str, Any], mean: str, std: str, path: Path) -> dict[str, Any]:
    found = {"mean": config.get(mean), "std": config.get(std)}
    for key, values in list(found.items()):
        if values is None:
            del found[key]
        elif not isinstance(values, list) or not values or not all(is_number(value) for value in values):
            raise UserError(f"weights {path}: {mean if key == 'mean' else std} is no list of numbers")
    return found
