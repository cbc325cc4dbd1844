"""Tells the YAML files of other projects apart from ours and dinov2's, which are all that is read."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from dinoreg.config.dinov2 import is_dinov2_key
from dinoreg.runtime.errors import UserError

# Keys that only this project has, as patterns.
_PROJECTS = {
    "dinov3": (
        *("gram.*", "schedules.*", "distillation.*", "multidistillation.*", "hrft.*", "coding_rate_loss.*"),
        *("MODEL.META_ARCHITECTURE", "student.pos_embed_*", "student.n_storage_tokens", "student.untie_*"),
        *("student.mask_k_bias", "student.fp8_*", "dino.koleo_*distributed*", "dino.koleo_topk", "crops.gram_*"),
        *("ibot.mask_random_circular_shift", "train.use_teacher_head", "checkpointing.*"),
    ),
    "lightly-train": ("method_args", "method_args.*", "transform_args.*", "trainer_args.*", "loader_args.*"),
    "mmpretrain": ("_base_", "default_scope", "Collections", "Models", "train_dataloader.*", "train_cfg.*"),
    "VISSL": ("config.TRAINER.*", "config.DATA.*", "config.MODEL.*", "config.OPTIMIZER.*", "config.LOSS.*"),
}
_INSTEAD = "begin with one of dinoreg's (vits14_reg4, vitl16_short_reg4_in1k, …) and give its keys"
_LACKING = {"dinov3": "; its backbones are names that end with _rope, its schedules are not read"}
_SHOWN = 3


def refuse_foreign(content: Collection[str], ours: Collection[str], where: str) -> None:
    """UserError, in one line, where a YAML file is another project's, by its keys or by most of them being unknown.

    content  the file's dotted keys
    ours     all dotted keys of dinoreg's config
    where    the file, for the message
    """
    for project, patterns in _PROJECTS.items():
        found = [key for key in content if key not in ours and any(fnmatchcase(key, each) for each in patterns)]
        if found:
            kind = f"a config of {project} ({_some(found)}){_LACKING.get(project, '')}"
            raise UserError(f"config {where}: {kind}; {_INSTEAD}")
    unknown = [key for key in content if key not in ours and key != "data" and not is_dinov2_key(key)]
    if len(unknown) >= _SHOWN and 2 * len(unknown) > len(content):
        few = f"{len(unknown)} of its {len(content)} keys are unknown ({_some(unknown)})"
        raise UserError(f"config {where}: neither dinoreg's nor dinov2's, {few}; {_INSTEAD}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
