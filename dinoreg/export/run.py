"""`dinoreg export`: write an artefact aside, certify it, describe it, and only then give it its name."""

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import sync
from dinoreg.config.option import nearest
from dinoreg.export.card import write_card
from dinoreg.export.certificate import certify, listing, overflows
from dinoreg.export.formats import FORMATS, Format
from dinoreg.export.onnx_graph import drop_float16
from dinoreg.export.source import Size, read_source
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import RunError, UserError, reworded

CERTIFICATE = "certificate.json"


def export(
    weights: str | Path, format: str, out: str | Path, size: Size | None = None, channels: Sequence[int] | None = None
) -> Path:
    """Write a model for another library, with a certificate that this library computes the same, and a model card.

    weights  a run folder, a weight file or random:NAME, as for `dinoreg.load`
    format   "timm" | "transformers" | "meta" | "safetensors" | "onnx"
    out      the folder to write; it must not exist, or be empty
    size     height and width in pixels, or one for both: positions are resampled to it beforehand. An ONNX graph then
             takes this size only; without it, any. None: the model's native size
    channels  indices from 0 of those that the exported model shall take; None: all
    returns  the folder
    raises   UserError for a wrong argument or a missing library, before anything is written; RunError if the library
             cannot load what was written or differs from the source above the bound: then nothing is left in `out`
    """
    form = _format(format)
    target = _target(out)
    source = read_source(weights, size, channels)
    if source.model.channels != "joint" and form.name in ("timm", "transformers"):
        raise UserError(f"format={format}: has no bag of channels; channels=[0] exports the network of one of them")
    with reworded(f"out={out}: could not be written", OSError, into=RunError), _aside(target) as stage:
        artefact, scratch = stage / "artefact", stage / "scratch"
        artefact.mkdir()
        scratch.mkdir()
        form.write(artefact, source)
        certificate = certify(form, source, artefact, scratch)
        if format == "onnx" and overflows(certificate):
            drop_float16(artefact)
            certificate["artefact"]["files"] = listing(artefact)
        write_card(artefact, form, source, certificate)
        text = json.dumps(certificate, indent=1) + "\n"
        (artefact / CERTIFICATE).write_text(text, encoding="utf-8")
        for path in (*artefact.iterdir(), artefact):
            sync(path)
        os.replace(artefact, target)
        sync(target.parent)
    return target


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of an exported folder; OSError or ValueError where it has none."""
    return json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format={name}: expected one of {', '.join(FORMATS)}{nearest(str(name), FORMATS)}")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"format={name} needs {' and '.join(missing)}: {install(missing[0])}")
    return FORMATS[name]


def _target(out: str | Path) -> Path:
    path = Path(out)
    # Not readable, a name too long, or with a NUL in it.
    with reworded(f"out={str(out)[:80]}: not a folder that can be written", OSError, ValueError):
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"out={out}: the folder is not empty; an export writes into a new or empty one")
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise UserError(f"out={out}: there is a file of this name; expected a new or empty folder")
    return Path(os.path.abspath(path))  # the last component must be a name, not "."


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A folder beside `target`, removed in the end together with the parents that were made for it, if these stay
    empty."""
    made = [parent for parent in target.parents if not parent.exists()]
    stage = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in made:  # from the inside out
            with contextlib.suppress(OSError):
                parent.rmdir()
