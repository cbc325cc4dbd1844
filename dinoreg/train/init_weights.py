"""Starting from weights (`init=`): they are read once, copied into the run folder, and the loss can hold on to them.

A copy in the run folder (`init.safetensors`, with its digest and origin beside it) makes the run independent of
the file it came from: it is what a resumed run rebuilds its anchor from.
"""

import copy
import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dinoreg.checkpoint.format import write_weights
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
    origin  {"source", "path", "source_sha256"}: what `init=` named, the file it meant and that file's digest
    anchor  the frozen backbone that the loss holds on to; None where loss.anchor_weight is 0
    copied  whether the run folder holds its copy already
    """

    note: str
    origin: dict[str, Any]
    anchor: RegisterViT | None
    copied: bool


def load_init(
    init: str | None,
    student: Networks,
    teacher: Networks,
    *,
    anchor_weight: float = 0.0,
    channels: str | None = None,
    resumed_run: Path | None = None,
) -> InitialWeights | None:
    """Put the weights of `init=` into both backbones; None without `init=`. Nothing is written.

    anchor_weight  of the loss that holds the backbone near these weights
    channels       how to fit weights of another number of input channels (`adapt.channels`)
    resumed_run    folder of the run that goes on: it takes the copy there, if it got as far as making one
    raises UserError when the weights cannot be read, do not fit, or are not the copy that was written, and when
    loss.anchor_weight asks for weights that there are none of
    """
    if init is None:
        if anchor_weight > 0:
            expected = "expected 0 without init=, there are no weights to stay near"
            raise UserError(f"loss.anchor_weight={anchor_weight}: {expected}")
        return None
    copied = resumed_run is not None and (resumed_run / COPY).is_file()
    if resumed_run is not None and copied:
        report = load_into(student.backbone, resumed_run / COPY)
    else:
        report = load_into(student.backbone, init, channels)
    teacher.backbone.load_state_dict(student.backbone.state_dict())
    anchor = None
    if anchor_weight > 0:
        anchor = copy.deepcopy(teacher.backbone).requires_grad_(False).eval()
    origin: dict[str, Any] = {"source": str(init), "path": str(report.path)}
    if report.path.is_file():
        origin["source_sha256"] = digest(report.path)
    return InitialWeights(f"init: {report}", origin, anchor, copied)


def copy_init(out: Path, init: InitialWeights, backbone: RegisterViT) -> None:
    """Write the copy, `out`/init.safetensors and its JSON, each whole; `backbone` holds the weights of the start.

    raises OSError when the folder cannot be written
    """
    if init.copied:
        return
    path = out / COPY
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    try:
        write_weights(path, tensors, {"step": 0, "architecture": backbone.architecture(), "init": init.origin})
    except SafetensorError as error:  # of a full disk, too
        raise OSError(errno.EIO, f"{path.name}: {error}") from None


def check_same_init(before: str | None, init: str | None, out: Path) -> None:
    """UserError when a run is to be resumed with another `init=` than it was started with."""
    if before != init:
        started = "without init=" if before is None else f"from init={before}"
        raise UserError(f"init={init}: the run in {out} was started {started}; a resumed run keeps its start")
