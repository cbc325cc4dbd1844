"""Reads dinov2's own training YAML (`student.*`, `teacher.*`, `crops.*`, `optim.*`, …) as a config of ours.

Keys that the file leaves out have the values of the reference's default config (`ssl_default_config.yaml`).
Epochs become fractions of the run, of OFFICIAL_EPOCH_LENGTH steps each. What the reference does whatever its
config says (the inverted blur, a checkpoint every three epochs) is kept and noted. Every key of the file is
either translated or listed with a reason; none is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dinoreg.runtime.errors import UserError

# The reference's defaults: the only keys that are translated.
DEFAULTS: dict[str, Any] = {
    "MODEL.WEIGHTS": "",
    "dino.loss_weight": 1.0,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "ibot.separate_head": False,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 64,
    "train.dataset_path": "ImageNet:split=TRAIN",
    "train.output_dir": ".",
    "train.seed": 0,
    "train.num_workers": 10,
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.drop_path_uniform": True,
    "student.pretrained_weights": "",
    "student.ffn_layer": "mlp",
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 4e-3,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": [0.32, 1.0],
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": [0.05, 0.32],
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
    "evaluation.eval_period_iterations": 12500,
}

# Keys of dinov2's files that decide nothing here; a trailing dot stands for all keys below.
DEAD: dict[str, str] = {
    "compute_precision.": "precision and sharding follow precision= and the device",
    "train.saveckp_freq": "the reference does not read it either; see checkpoint.every and .keep",
    "train.cache_dataset": "the file index is always kept; images are never",
    "student.block_chunks": "blocks are one flat list; chunked weights are read all the same",
    "optim.lr": "the reference overwrites it with the scaled base_lr",
}
# True here whatever the file says; another value changes the network and is refused.
FIXED: dict[str, Any] = {"student.qkv_bias": True, "student.proj_bias": True, "student.ffn_bias": True}

_SIZES = {"vit_small": "s", "vit_base": "b", "vit_large": "l", "vit_giant2": "g"}
_FFN = {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}
_CENTERING = {"centering": "softmax", "sinkhorn_knopp": "sinkhorn"}
_OWN_TOP_LEVEL = ("MODEL", "compute_precision", "dino", "ibot", "student", "teacher", "train", "evaluation")


@dataclass(frozen=True)
class Translation:
    """What a dinov2 file says in our words: nested keys for `load_config`, keys without effect, remarks."""

    config: dict[str, Any]
    dead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"  {key} = {value}" for key, value in _flat(self.config).items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  no effect: {line}" for line in self.dead]
        return "\n".join(lines)


def is_dinov2(content: Mapping[str, Any], ours: Collection[str]) -> bool:
    """Whether a YAML file's content is dinov2's: sections or keys that only dinov2 has, and none of `ours`."""
    if any(key in {path.partition(".")[0] for path in ours} - {"crops", "optim"} for key in content):
        return False
    if any(isinstance(content.get(key), Mapping) for key in _OWN_TOP_LEVEL):
        return True
    return any(key in DEFAULTS and key not in ours for key in _flat(content))


def from_dinov2(content: Mapping[str, Any]) -> Translation:
    """The same run as a config of ours.

    content  the file as nested dicts; absent keys have the reference's defaults
    raises   UserError where a value has no counterpart here (an unknown arch, FFN, scaling rule, …)
    """
    given = _flat(content)
    dead = [f"{key}: {reason}" for key in given if key not in DEFAULTS and (reason := _why_dead(key, given[key]))]
    values = {**DEFAULTS, **{key: value for key, value in given.items() if key in DEFAULTS}}
    get = _Reader(values)
    notes: list[str] = []

    epochs, epoch_length = get.number("optim.epochs"), get.number("train.OFFICIAL_EPOCH_LENGTH")
    if epochs <= 0 or epoch_length <= 0:
        raise UserError(f"optim.epochs={epochs} of {epoch_length} steps: expected a positive length of the run")

    def fraction(key: str) -> float:
        share = get.number(key) / epochs
        if share > 1:
            notes.append(f"{key} is longer than the run of {epochs:g} epochs: cut to its length")
        return min(1.0, share)

    arch = get.choice("student.arch", _SIZES)
    patch, registers = get.number("student.patch_size"), get.number("student.num_register_tokens")
    if get.choice("optim.scaling_rule", {"sqrt_wrt_1024": True}):
        notes.append("optim.base_lr is scaled by √(global batch/1024), as optim.scaling_rule asks")
    config: dict[str, Any] = {
        "steps": round(epochs * epoch_length),
        "batch_size": values["train.batch_size_per_gpu"],
        "seed": values["train.seed"],
        "model": {
            "name": f"vit{arch}{patch:g}_reg{registers:g}",
            "ffn": get.choice("student.ffn_layer", _FFN),
            "layerscale": values["student.layerscale"] or None,
            "drop_path": values["student.drop_path_rate"],
            "drop_path_uniform": values["student.drop_path_uniform"],
            "antialias": values["student.interpolate_antialias"],
            "position_offset": values["student.interpolate_offset"],
        },
        "head": {
            "prototypes": values["dino.head_n_prototypes"],
            "hidden_dim": values["dino.head_hidden_dim"],
            "bottleneck_dim": values["dino.head_bottleneck_dim"],
            "layers": values["dino.head_nlayers"],
            "separate": values["ibot.separate_head"],
        },
        "crops": {
            "global_size": values["crops.global_crops_size"],
            "local_size": values["crops.local_crops_size"],
            "num_local": values["crops.local_crops_number"],
            "global_scale": values["crops.global_crops_scale"],
            "local_scale": values["crops.local_crops_scale"],
        },
        "augment": {"reference_blur": True},
        "mask": {
            "probability": values["ibot.mask_sample_probability"],
            "ratio": values["ibot.mask_ratio_min_max"],
        },
        "loss": {
            "dino_weight": values["dino.loss_weight"],
            "ibot_weight": values["ibot.loss_weight"],
            "koleo_weight": values["dino.koleo_loss_weight"],
            "koleo_ranks": 1,  # the reference searches each process's images alone
            "centering": get.choice("train.centering", _CENTERING),
        },
        "optim": {
            "base_lr": values["optim.base_lr"],
            "beta1": values["optim.adamw_beta1"],
            "beta2": values["optim.adamw_beta2"],
            "layer_decay": values["optim.layerwise_decay"],
            "patch_embed_lr": values["optim.patch_embed_lr_mult"],
            "clip_grad": values["optim.clip_grad"] or 0.0,
        },
        "schedule": {
            "warmup": fraction("optim.warmup_epochs"),
            "final_lr": values["optim.min_lr"],
            "weight_decay": [values["optim.weight_decay"], values["optim.weight_decay_end"]],
            "momentum": [values["teacher.momentum_teacher"], values["teacher.final_momentum_teacher"]],
            "teacher_temp": [values["teacher.warmup_teacher_temp"], values["teacher.teacher_temp"]],
            "teacher_temp_warmup": fraction("teacher.warmup_teacher_temp_epochs"),
            "freeze_last_layer": fraction("optim.freeze_last_layer_epochs"),
        },
        "data": {"workers": values["train.num_workers"]},
        "checkpoint": {"every": round(3 * epoch_length), "keep": 3},
        "probe": {"every": values["evaluation.eval_period_iterations"]},
    }
    notes += [
        "blur runs with 1 - p, as the reference executes it (augment.reference_blur)",
        "a checkpoint every 3 epochs, 3 kept, as the reference does whatever its config says",
        "evaluation.eval_period_iterations becomes probe.every; teacher files come with the checkpoints",
    ]
    if values["ibot.separate_head"]:
        config["head"]["ibot_prototypes"] = values["ibot.head_n_prototypes"]
        config["head"]["ibot_bottleneck_dim"] = values["ibot.head_bottleneck_dim"]
        for ibot, dino in (("head_nlayers", "head_nlayers"), ("head_hidden_dim", "head_hidden_dim")):
            if values[f"ibot.{ibot}"] != values[f"dino.{dino}"]:
                raise UserError(f"ibot.{ibot}={values[f'ibot.{ibot}']}: expected the value of dino.{dino}")
    else:
        dead += [f"{key}: ibot.separate_head is false" for key in given if key.startswith("ibot.head_")]
    weights = values["student.pretrained_weights"] or values["MODEL.WEIGHTS"]
    if weights:
        config["init"] = weights
        notes.append(f"init={weights} is loaded strictly (the reference skips what does not fit)")
    if values["train.output_dir"] not in (".", "", None):
        config["out"] = values["train.output_dir"]
    source = _dataset_folder(str(values["train.dataset_path"]))
    if source is not None:
        config["data"]["source"] = source
        notes.append(f"train.dataset_path={values['train.dataset_path']}: all images below {source}")
    else:
        notes.append(f"train.dataset_path={values['train.dataset_path']} names no folder: give data=FOLDER")
    return Translation(config, dead, notes)


def _dataset_folder(path: str) -> str | None:
    """The folder of images that "ImageNet:split=TRAIN:root=/data:extra=/x" stands for."""
    name, *options = path.split(":")
    pairs = dict(option.partition("=")[::2] for option in options)
    root = pairs.get("root")
    if root and name == "ImageNet":
        return f"{root.rstrip('/')}/{pairs.get('split', 'TRAIN').lower()}"
    return root or None


def _why_dead(key: str, value: Any) -> str:
    if key in FIXED:
        if value != FIXED[key]:
            raise UserError(f"{key}={value}: expected true; the backbone always has these biases")
        return "always so here"
    for name, reason in DEAD.items():
        if key == name or (name.endswith(".") and key.startswith(name)):
            return reason
    return "unknown to this reader; nothing follows from it"


class _Reader:
    """Values whose meaning is translated, checked on the way."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def number(self, key: str) -> float:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{key}={value}: expected a number")
        return value

    def choice(self, key: str, known: Mapping[str, Any]) -> Any:
        value = self.values[key]
        if value not in known:
            raise UserError(f"{key}={value}: expected {' or '.join(known)}")
        return known[value]


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
