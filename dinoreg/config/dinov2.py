"""Reads dinov2's own training YAML (`student.*`, `teacher.*`, `crops.*`, `optim.*`, …) as a config of ours, and tells
the files of other projects apart from both.

Keys that the file leaves out have the values of the reference's default config (`ssl_default_config.yaml`).
Epochs become fractions of the run, of OFFICIAL_EPOCH_LENGTH steps each. What the reference does whatever its
config says (the inverted blur, a checkpoint every three epochs) is kept and noted. Every key of the file is
either translated or listed with a reason; none is dropped in silence.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import is_number
from dinoreg.runtime.printable import listed

_SIZES = {"vit_small": "s", "vit_base": "b", "vit_large": "l", "vit_giant2": "g"}


class Key(NamedTuple):
    """A key of the reference that is translated.

    default  the reference's
    ours     dinoreg's key that takes its value; "": `from_dinov2` handles it
    names    its values by the names that the reference has for them
    number   whether it must be a number
    epochs   whether it is a number of epochs that becomes a fraction of the run, above 1 where it is longer
    """

    default: Any
    ours: str = ""
    names: Mapping[str, Any] | None = None
    number: bool = False
    epochs: bool = False

    def check(self, key: str, value: Any) -> None:
        """UserError where the value is not a number that has to be one, or has no counterpart here."""
        if (self.number or self.epochs) and not is_number(value):
            raise UserError(f"{key}={value}: expected a number")
        if self.names is not None and value not in self.names:
            raise UserError(f"{key}={value}: expected {' or '.join(self.names)}")


KEYS: dict[str, Key] = {
    "MODEL.WEIGHTS": Key(""),
    "dino.loss_weight": Key(1.0, "loss.dino_weight"),
    "dino.head_n_prototypes": Key(65536, "head.prototypes"),
    "dino.head_bottleneck_dim": Key(256, "head.bottleneck_dim"),
    "dino.head_nlayers": Key(3, "head.layers"),
    "dino.head_hidden_dim": Key(2048, "head.hidden_dim"),
    "dino.koleo_loss_weight": Key(0.1, "loss.koleo_weight"),
    "ibot.loss_weight": Key(1.0, "loss.ibot_weight"),
    "ibot.mask_sample_probability": Key(0.5, "mask.probability"),
    "ibot.mask_ratio_min_max": Key([0.1, 0.5], "mask.ratio"),
    "ibot.separate_head": Key(False, "head.separate"),
    "ibot.head_n_prototypes": Key(65536),
    "ibot.head_bottleneck_dim": Key(256),
    "ibot.head_nlayers": Key(3),
    "ibot.head_hidden_dim": Key(2048),
    "train.batch_size_per_gpu": Key(64, "batch_size"),
    "train.seed": Key(0, "seed"),
    "train.num_workers": Key(10, "data.workers"),
    "train.OFFICIAL_EPOCH_LENGTH": Key(1250, number=True),
    "train.centering": Key("centering", "loss.centering", {"centering": "softmax", "sinkhorn_knopp": "sinkhorn"}),
    "student.arch": Key("vit_large", names=_SIZES),
    "student.patch_size": Key(16, number=True),
    "student.drop_path_rate": Key(0.3, "model.drop_path"),
    "student.layerscale": Key(1e-5),
    "student.drop_path_uniform": Key(True, "model.drop_path_uniform"),
    "student.pretrained_weights": Key(""),
    "student.ffn_layer": Key("mlp", "model.ffn", {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}),
    "student.num_register_tokens": Key(0, number=True),
    "student.interpolate_antialias": Key(False, "model.antialias"),
    "student.interpolate_offset": Key(0.1, "model.position_offset"),
    "teacher.momentum_teacher": Key(0.992),
    "teacher.final_momentum_teacher": Key(1.0),
    "teacher.warmup_teacher_temp": Key(0.04),
    "teacher.teacher_temp": Key(0.07),
    "teacher.warmup_teacher_temp_epochs": Key(30, "schedule.teacher_temp_warmup", epochs=True),
    "optim.epochs": Key(100, number=True),
    "optim.weight_decay": Key(0.04),
    "optim.weight_decay_end": Key(0.4),
    "optim.base_lr": Key(4e-3, "optim.base_lr"),
    "optim.warmup_epochs": Key(10, "schedule.warmup", epochs=True),
    "optim.min_lr": Key(1e-6, "schedule.final_lr"),
    "optim.clip_grad": Key(3.0, "optim.clip_grad"),
    "optim.freeze_last_layer_epochs": Key(1, number=True),
    "optim.scaling_rule": Key("sqrt_wrt_1024", names={"sqrt_wrt_1024": True}),
    "optim.patch_embed_lr_mult": Key(0.2, "optim.patch_embed_lr"),
    "optim.layerwise_decay": Key(0.9, "optim.layer_decay"),
    "optim.adamw_beta1": Key(0.9, "optim.beta1"),
    "optim.adamw_beta2": Key(0.999, "optim.beta2"),
    "crops.global_crops_scale": Key([0.32, 1.0], "crops.global_scale"),
    "crops.local_crops_number": Key(8, "crops.num_local"),
    "crops.local_crops_scale": Key([0.05, 0.32], "crops.local_scale"),
    "crops.global_crops_size": Key(224, "crops.global_size"),
    "crops.local_crops_size": Key(96, "crops.local_size"),
    "evaluation.eval_period_iterations": Key(12500, "probe.every"),
}

# What the reference does whatever its config says.
QUIRKS: dict[str, Any] = {
    "augment.reference_blur": True,  # blur runs with 1 - p
    "data.reference_decode": True,
    "loss.center_by_process": True,
    "loss.koleo_ranks": 1,  # each process searches its own images alone
    "mask.by_process": True,
    "optim.move_on_skip": True,
}

# Keys of dinov2's files without effect here, and why.
DEAD: dict[str, str] = {
    "compute_precision.*": "precision and sharding follow precision= and the device",
    "train.dataset_path": "data= names the images",
    "train.output_dir": "out= names the run folder",
    "train.saveckp_freq": "the reference does not read it either; see checkpoint.every and .keep",
    "train.cache_dataset": "the file index is always kept; images are never",
    "student.block_chunks": "blocks are one flat list; chunked weights are read all the same",
    "optim.lr": "the reference overwrites it with the scaled base_lr",
    "student.*_bias": "always so here",
    "*": "unknown to this reader; nothing follows from it",
}

# Keys that dinov3's files have and dinov2's have not, as patterns.
_DINOV3 = (
    *("gram.*", "schedules.*", "distillation.*", "multidistillation.*", "hrft.*", "coding_rate_loss.*"),
    *("MODEL.META_ARCHITECTURE", "student.pos_embed_*", "student.n_storage_tokens", "student.untie_*"),
    *("student.mask_k_bias", "student.fp8_*", "dino.koleo_*distributed*", "dino.koleo_topk", "crops.gram_*"),
    *("ibot.mask_random_circular_shift", "train.use_teacher_head", "checkpointing.*"),
)


class Translation(NamedTuple):
    """A dinov2 file as a dinoreg config: dotted keys for `load_config`, keys without effect (and why), remarks."""

    config: dict[str, Any]
    dead: list[str]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"  {key} = {value}" for key, value in self.config.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  no effect: {line}" for line in self.dead]
        return "\n".join(lines)


def is_dinov2(content: Mapping[str, Any], ours: Collection[str]) -> bool:
    """Whether a YAML file is dinov2's: it has sections or keys that only dinov2 has, and none that only dinoreg has.

    content  the file, by dotted key
    ours     all dotted keys of dinoreg's config
    """
    sections, own, theirs = ({key.partition(".")[0] for key in keys} for keys in (content, ours, (*KEYS, *DEAD)))
    if sections & (own - {"crops", "optim"}):
        return False
    prefixes = tuple(f"{section}." for section in theirs - {"crops", "optim"})
    return any(key.startswith(prefixes) or (key in KEYS and key not in ours) for key in content)


def is_dinov2_key(key: str) -> bool:
    """Whether a dotted key is one that dinov2's files have, with or without effect here."""
    return key in KEYS or any(fnmatchcase(key, name) for name in DEAD if name != "*")


def from_dinov2(content: Mapping[str, Any]) -> Translation:
    """Translate a dinov2 config into one of dinoreg.

    content  the file, by dotted key; missing keys have dinov2's defaults
    raises   UserError where a value has no counterpart here (an unknown arch, FFN, scaling rule, …)
    """
    for key in ("student.qkv_bias", "student.proj_bias", "student.ffn_bias"):
        if not content.get(key, True):
            raise UserError(f"{key}={content[key]}: expected true; the backbone always has these biases")
    reasons = {key: next(why for name, why in DEAD.items() if fnmatchcase(key, name)) for key in content}
    dead = [f"{key}: {why}" for key, why in reasons.items() if key not in KEYS]
    values = {key: content.get(key, each.default) for key, each in KEYS.items()}
    values["student.arch"] = str(values["student.arch"]).removesuffix("_memeff")  # its attention, not another model
    for key, each in KEYS.items():
        each.check(key, values[key])
    epochs, epoch_length = values["optim.epochs"], values["train.OFFICIAL_EPOCH_LENGTH"]
    if epochs <= 0 or epoch_length <= 0:
        raise UserError(f"optim.epochs={epochs} of {epoch_length} steps: expected a positive length of the run")
    notes = _long_warmups(values, epochs)
    ours: dict[str, Any] = {}
    for key, each in KEYS.items():
        if each.ours:
            value = each.names[values[key]] if each.names else values[key]
            ours[each.ours] = value / epochs if each.epochs else value
    arch = _SIZES[values["student.arch"]]
    ours |= {
        "steps": round(epochs * epoch_length),
        "model.name": f"vit{arch}{values['student.patch_size']:g}_reg{values['student.num_register_tokens']:g}",
        "model.layerscale": values["student.layerscale"] or None,
        "schedule.freeze_last_layer": min(1.0, values["optim.freeze_last_layer_epochs"] / epochs),
        **QUIRKS,
        "schedule.weight_decay": [values["optim.weight_decay"], values["optim.weight_decay_end"]],
        "schedule.momentum": [values["teacher.momentum_teacher"], values["teacher.final_momentum_teacher"]],
        "schedule.teacher_temp": [values["teacher.warmup_teacher_temp"], values["teacher.teacher_temp"]],
        "checkpoint.every": round(3 * epoch_length),
        "checkpoint.keep": 3,
    }
    notes += [
        "optim.base_lr is scaled by √(global batch/1024), as optim.scaling_rule asks",
        "as the reference, whatever its config says: " + ", ".join(f"{key}={value}" for key, value in QUIRKS.items()),
        "a checkpoint every 3 epochs, 3 kept, as the reference does whatever its config says",
        "evaluation.eval_period_iterations becomes probe.every; teacher files come with the checkpoints",
    ]
    if init := values["student.pretrained_weights"] or values["MODEL.WEIGHTS"]:
        ours["init"] = init
        notes.append(f"init={init} is loaded strictly (the reference skips what does not fit)")
    return Translation(ours | _ibot_head(values, content, dead), dead, notes)


def _long_warmups(values: Mapping[str, Any], epochs: float) -> list[str]:
    """A remark where the temperature rises for longer than the run; UserError where the learning rate does."""
    warmup, temp = values["optim.warmup_epochs"], values["teacher.warmup_teacher_temp_epochs"]
    if warmup > epochs:
        raise UserError(f"optim.warmup_epochs={warmup:g}: expected at most optim.epochs={epochs:g}, as in dinov2")
    reached = f"teacher.teacher_temp={values['teacher.teacher_temp']:g} is not reached in {epochs:g} epochs"
    return [f"teacher.warmup_teacher_temp_epochs={temp:g}: {reached}, as in dinov2"] if temp > epochs else []


def _ibot_head(values: Mapping[str, Any], content: Mapping[str, Any], dead: list[str]) -> dict[str, Any]:
    """The settings of the iBOT head, which count only where it is separate; else they are listed in `dead`."""
    if not values["ibot.separate_head"]:
        dead += [f"{key}: ibot.separate_head is false" for key in content if key.startswith("ibot.head_")]
        return {}
    for name in ("head_nlayers", "head_hidden_dim"):
        if values[f"ibot.{name}"] != values[f"dino.{name}"]:
            raise UserError(f"ibot.{name}={values[f'ibot.{name}']}: expected the value of dino.{name}")
    own = {"ibot_prototypes": "head_n_prototypes", "ibot_bottleneck_dim": "head_bottleneck_dim"}
    return {f"head.{ours}": values[f"ibot.{theirs}"] for ours, theirs in own.items()}


def refuse_foreign(content: Collection[str], ours: Collection[str], where: str) -> None:
    """UserError, in one line, where a YAML file is another project's, by its keys or by most of them being unknown.

    content  the file's dotted keys
    ours     all dotted keys of dinoreg's config
    where    the file, for the message
    """
    theirs = [key for key in content if key not in ours and any(fnmatchcase(key, each) for each in _DINOV3)]
    unknown = [key for key in content if key not in ours and key != "data" and not is_dinov2_key(key)]
    if theirs:
        kind = f"a config of dinov3 ({listed(theirs, 3)}), whose backbones are names that end with _rope here"
    elif len(unknown) >= 3 and 2 * len(unknown) > len(content):
        kind = f"neither dinoreg's nor dinov2's, {len(unknown)} of its {len(content)} keys are unknown"
        kind += f" ({listed(unknown, 3)})"
    else:
        return
    raise UserError(f"config {where}: {kind}; begin with one of dinoreg's, as vits14_reg4, and give its keys")
