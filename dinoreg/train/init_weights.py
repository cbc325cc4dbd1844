"""Starting from weights (`init=`): they are read once, kept in the run folder, and can be held on to.

A copy in the run folder (`init.safetensors`, with its digest and origin beside it) makes the run independent of
the file it came from: it is what a resumed run rebuilds its anchor from.
"""

from __future__ import annotations

import copy
import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dinoreg.checkpoint.format import write_weights
from dinoreg.config.load import Config
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError
from dinoreg.train.state import Networks
from dinoreg.weights.load import load_into

COPY = "init.safetensors"


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from.

    note    what was loaded, reshaped and left out, in one line
    origin  {"source", "path", "source_sha256"}: what `init=` named, the file it meant and that file's digest
    anchor  the frozen backbone that the loss holds on to; None where loss.anchor_weight is 0
    kept    whether the run folder holds its copy already
    """

    note: str
    origin: dict[str, Any]
    anchor: RegisterViT | None
    kept: bool


def load_start(config: Config, out: Path, student: Networks, teacher: Networks) -> Start | None:
    """Put the weights of `init=` into both backbones; None without `init=`. Nothing is written.

    A run that is resumed takes the copy in its folder, if it got as far as making one.
    raises UserError when the weights cannot be read, do not fit, or are not the copy that was written, and when
    loss.anchor_weight asks for weights that there are none of
    """
    weight = config.loss.anchor_weight
    if config.init is None:
        if weight > 0:
            raise UserError(f"loss.anchor_weight={weight}: expected 0 without init=, there are no weights to stay near")
        return None
    path = out / COPY
    kept = config.resume and path.is_file()
    report = load_into(student.backbone, path if kept else config.init, None if kept else config.adapt.channels)
    teacher.backbone.load_state_dict(student.backbone.state_dict())
    anchor = None
    if weight > 0:
        anchor = copy.deepcopy(teacher.backbone).requires_grad_(False).eval()
    origin: dict[str, Any] = {"source": str(config.init), "path": str(report.path)}
    if report.path.is_file():
        origin["source_sha256"] = digest(report.path)
    return Start(f"init: {report}", origin, anchor, kept)


def keep_start(out: Path, start: Start, backbone: RegisterViT) -> None:
    """Write the copy, `out`/init.safetensors and its JSON, each whole; `backbone` holds the weights of the start.

    raises OSError when the folder cannot be written
    """
    if start.kept:
        return
    path = out / COPY
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    try:
        write_weights(path, tensors, {"step": 0, "architecture": backbone.architecture(), "init": start.origin})
    except SafetensorError as error:  # of a full disk, too
        raise OSError(errno.EIO, f"{path.name}: {error}") from None


def check_same_start(before: Config, config: Config, out: Path) -> None:
    """UserError when a run is to be resumed with another `init=` than it was started with."""
    if before.init != config.init:
        started = "without init=" if before.init is None else f"from init={before.init}"
        raise UserError(f"init={config.init}: the run in {out} was started {started}; a resumed run keeps its start")
