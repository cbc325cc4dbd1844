"""Weight files: finding, reading and understanding them.

A file says its architecture by the shapes in it; what shapes cannot say (heads, a rectangular grid, how
positions are resampled) comes from the JSON beside a teacher file, or follows the published models. Files
are untrusted: nothing in them is executed, no pointer leaves its run folder, and any disagreement is one
line of error.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinoreg.errors import UserError
from dinoreg.models.layers import swiglu_hidden_dim

HEAD_DIM = 64  # of every published model
TEACHER_FORMAT = "dinoreg-teacher"

_HEAD_KEY = re.compile(r"(dino_head|ibot_head|head)\.")
_CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+)\.")
_STEP_NAME = re.compile(r"step_\d+")


@dataclass(frozen=True)
class Weights:
    """What a weight file holds, under the encoder's own key names, float32 on the CPU."""

    path: Path
    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]  # dino_head.*, ibot_head.* or head.*, as they stand in the file
    metadata: dict[str, Any] = field(default_factory=dict)  # the JSON beside a teacher file; {} without one

    def architecture(self) -> dict[str, Any]:
        """Arguments of RegisterViT, read off the shapes and, where these are silent, the metadata."""
        return infer_architecture(self.backbone, self.metadata.get("architecture"), self.path)


def find_weights(source: str | Path) -> Path | None:
    """The weight file that `source` means: a file itself, or the best (else last, else newest) teacher of a
    run folder. None if no such path exists; UserError if it exists and holds no weights."""
    path = Path(source)
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            return None
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise UserError(f"weights {str(source)[:80]!r}: not a path ({error})") from None
    for pointer in ("best", "last"):
        teacher = _pointed_teacher(path, pointer)
        if teacher is not None:
            return teacher
    teachers = [p for p in path.glob("teacher/step_*.safetensors") if _STEP_NAME.fullmatch(p.stem)]
    if not teachers:
        raise UserError(f"weights {path}: no teacher/step_*.safetensors in this folder, so no run folder")
    return max(teachers, key=lambda p: int(p.stem.removeprefix("step_")))


def _pointed_teacher(run: Path, pointer: str) -> Path | None:
    try:
        step = (run / "checkpoints" / pointer).read_text(encoding="utf-8")[:100].strip()
    except (OSError, UnicodeDecodeError):
        return None
    teacher = run / "teacher" / f"{step}.safetensors"
    return teacher if _STEP_NAME.fullmatch(step) and teacher.is_file() else None


def read_weights(source: str | Path) -> Weights:
    """Read a weight file (see `find_weights`): a teacher file of ours, whose JSON is verified against it, or
    a state dict in Meta's format, flat or as {"teacher": ...}, saved by torch or as safetensors.

    Raises UserError if it is missing, torn, altered, or not a state dict of such an encoder.
    """
    path = find_weights(source)
    if path is None:
        raise UserError(f"weights {str(source)!r}: no such file or run folder")
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        metadata = _read_metadata(path)
        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"weights {path}: not a whole safetensors file ({_first_line(error)})") from None
    else:
        state = _torch_load(path)
    backbone, heads = _normalise_keys(state, path)
    return Weights(path, backbone, heads, metadata)


def _read_metadata(path: Path) -> dict[str, Any]:
    """The JSON beside a safetensors file, after its checksum agreed; {} if there is none."""
    side = path.with_suffix(".json")
    if not side.is_file():
        return {}
    try:
        metadata = json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"weights {side}: not JSON ({_first_line(error)})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != TEACHER_FORMAT:
        raise UserError(f"weights {side}: expected a JSON object with format {TEACHER_FORMAT!r}")
    if metadata.get("version") != 1:
        raise UserError(f"weights {side}: version {metadata.get('version')!r}; this dinoreg reads version 1")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if metadata.get("sha256") != digest.hexdigest():
        raise UserError(f"weights {path}: sha256 is not the one in {side.name}; the file is torn or altered")
    return metadata


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {path}: holds more than tensors, or is no weight file; nothing in it was executed"
        ) from None
    except Exception as error:  # torn archives end in many kinds of exception, all with the same meaning here
        raise UserError(f"weights {path}: not a whole torch file ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _normalise_keys(state: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone, heads) of a state dict: wrappers, `module.` and `backbone.` prefixes and block chunks
    removed."""
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"weights {path}: holds a {type(state).__name__}, expected a state dict of tensors")
    backbone: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"weights {path}: entry {str(key)[:80]!r} is not a floating-point tensor")
        name = key.removeprefix("module.")
        value = value.float().contiguous()
        if _HEAD_KEY.match(name):
            heads[name] = value
            continue
        name = name.removeprefix("backbone.").removeprefix("module.")
        name = _CHUNKED_BLOCK.sub(r"blocks.\1.", name)
        if name in backbone:
            raise UserError(f"weights {path}: {name!r} is there twice, under {key!r} and another name")
        backbone[name] = value
    return backbone, heads


def infer_architecture(
    state: Mapping[str, Tensor], metadata: Any = None, path: str | Path = "state dict"
) -> dict[str, Any]:
    """The arguments of RegisterViT for a backbone state dict.

    metadata  what `RegisterViT.architecture()` gave when the file was written, or None. It fills in what
    shapes
              leave open and must not contradict them
    raises UserError where the shapes are no encoder's, or where metadata and shapes disagree
    """
    said = dict(metadata) if isinstance(metadata, Mapping) else {}
    if "reg_token" in state or any(key.startswith(("embeddings.", "encoder.")) for key in state):
        raise UserError(f"weights {path}: these are timm's or transformers' key names; expected Meta's")
    cls = _shaped(state, "cls_token", 3, path)
    patch = _shaped(state, "patch_embed.proj.weight", 4, path)
    positions = _shaped(state, "pos_embed", 3, path)
    dim, patch_size = cls.shape[2], patch.shape[2]
    indices = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    if not indices or indices != set(range(len(indices))):
        raise UserError(f"weights {path}: blocks {sorted(indices)[:8]} are not numbered 0, 1, 2, ...")
    registers = _shaped(state, "register_tokens", 3, path).shape[1] if "register_tokens" in state else 0
    if "blocks.0.mlp.w12.weight" in state:
        ffn, hidden = "swiglu", _shaped(state, "blocks.0.mlp.w12.weight", 2, path).shape[0] // 2
    else:
        ffn, hidden = "mlp", _shaped(state, "blocks.0.mlp.fc1.weight", 2, path).shape[0]
    found: dict[str, Any] = {
        "dim": dim,
        "depth": len(indices),
        "patch_size": patch_size,
        "ffn": ffn,
        "in_channels": patch.shape[1],
        "num_registers": registers,
    }
    for key, value in found.items():
        if key in said and said[key] != value:
            raise UserError(f"weights {path}: metadata says {key}={said[key]!r}, the tensors say {value!r}")
    found["ffn_ratio"] = _ffn_ratio(dim, ffn, hidden, said.get("ffn_ratio"))
    has_scale = "blocks.0.ls1.gamma" in state
    scale = said.get("layerscale")
    found["layerscale"] = (scale if _is_number(scale) and scale else 1.0) if has_scale else None
    found["heads"] = _heads(dim, said.get("heads"), path)
    found["image_size"] = _image_size(positions.shape[1] - 1, patch_size, said.get("image_size"), path)
    found |= published_resampling(registers)
    if isinstance(said.get("antialias"), bool):
        found["antialias"] = said["antialias"]
    for key in ("position_offset", "init_std"):
        if _is_number(said.get(key)):
            found[key] = float(said[key])
    return found


def _shaped(state: Mapping[str, Tensor], key: str, ndim: int, path: str | Path) -> Tensor:
    value = state.get(key)
    if value is None:
        raise UserError(f"weights {path}: no {key!r}; expected a ViT state dict with Meta's key names")
    if value.ndim != ndim or not value.numel():
        raise UserError(f"weights {path}: {key!r} has shape {tuple(value.shape)}, expected {ndim} dimensions")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def hidden_dim_of(dim: int, ffn: str, ratio: float) -> int:
    hidden = int(dim * ratio)
    return swiglu_hidden_dim(hidden) if ffn == "swiglu" else hidden


def _ffn_ratio(dim: int, ffn: str, hidden: int, said: Any) -> float:
    """A ratio that gives this hidden width: the one the metadata names or the usual 4, if they fit."""
    for ratio in (said, 4.0):
        if _is_number(ratio) and 0 < ratio < 1024 and hidden_dim_of(dim, ffn, ratio) == hidden:
            return float(ratio)
    return hidden * (1.5 if ffn == "swiglu" else 1.0) / dim


def _heads(dim: int, said: Any, path: str | Path) -> int:
    if isinstance(said, int) and 0 < said <= dim and dim % said == 0:
        return said
    if said is not None or dim % HEAD_DIM:
        raise UserError(f"weights {path}: metadata heads={said!r} do not fit the width {dim}")
    return dim // HEAD_DIM


def _image_size(num_patches: int, patch_size: int, said: Any, path: str | Path) -> list[int]:
    if said is not None:
        pair = [said, said] if isinstance(said, int) else said
        if (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(extent, int) and extent > 0 and extent % patch_size == 0 for extent in pair)
            and (pair[0] // patch_size) * (pair[1] // patch_size) == num_patches
        ):
            return list(pair)
        raise UserError(f"weights {path}: image_size={said!r} does not fit {num_patches} patch positions")
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise UserError(f"weights {path}: {num_patches} patch positions are not a square grid's")
    return [side * patch_size, side * patch_size]


def published_resampling(num_registers: int) -> dict[str, Any]:
    """How published models resample positions: those with registers differ from those without."""
    if num_registers:
        return {"antialias": True, "position_offset": 0.0}
    return {"antialias": False, "position_offset": 0.1}
