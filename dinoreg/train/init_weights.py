"""Starting from weights (`init=`): they are read once, copied into the run folder, and can serve as the anchor.

A copy in the run folder (`init.safetensors`, with its digest and origin beside it) makes the run independent of
the file it came from: it is what a resumed run rebuilds its anchor from.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.format import write_weights
from dinoreg.config.load import Config
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError
from dinoreg.train.state import Networks
from dinoreg.weights.load import load_into

COPY = "init.safetensors"


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from.

    note    what was loaded, reshaped and left out, in one line
    origin  {"source", "path", "source_sha256"}: the value of `init=`, the file it stands for and that file's digest
    anchor  the frozen backbone of the anchor loss; None where loss.anchor_weight is 0
    """

    note: str
    origin: dict[str, Any]
    anchor: RegisterViT | None


def load_init(config: Config, out: Path, student: Networks, teacher: Networks) -> InitialWeights | None:
    """Put the weights of `init=` into both backbones; None without `init=`. Nothing is written.

    A resumed run reads them from the copy in its folder, if there is one.

    raises UserError when the weights cannot be read, do not fit, or differ from the digest beside the copy, and for
    loss.anchor_weight or loss.diet_weight > 0 without `init=`
    """
    anchor_weight = config.loss.anchor_weight
    if config.init is None:
        for key, value in (("anchor_weight", anchor_weight), ("diet_weight", config.loss.diet_weight)):
            if value > 0:
                raise UserError(f"loss.{key}={value}: expected 0 without init=, there are no features to begin with")
        return None
    if _has_copy(config, out):
        report = load_into(student.backbone, out / COPY)
    else:
        report = load_into(student.backbone, config.init, config.adapt.channels)
    teacher.backbone.load_state_dict(student.backbone.state_dict())
    anchor = copy.deepcopy(teacher.backbone).requires_grad_(False).eval() if anchor_weight > 0 else None
    origin = {"source": config.init, "path": str(report.path)}
    if report.path.is_file():
        origin["source_sha256"] = digest(report.path)
    return InitialWeights(f"init: {report}", origin, anchor)


def copy_init(config: Config, out: Path, init: InitialWeights, backbone: RegisterViT) -> None:
    """Write the copy, `out`/init.safetensors and its JSON, each in one rename; `backbone` holds the initial weights.

    raises OSError when the folder cannot be written
    """
    if _has_copy(config, out):
        return
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    write_weights(out / COPY, tensors, {"step": 0, "architecture": backbone.architecture(), "init": init.origin})


def _has_copy(config: Config, out: Path) -> bool:
    return config.resume and (out / COPY).is_file()
