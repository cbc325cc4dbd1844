"""`dinoreg export`: write an artefact aside, certify it, describe it, and only then give it its name.

The model card, `README.md`, says where the model comes from, what it can do, and how it is loaded. All of it is read
from the run folder and the certificate; what is not known is said to be unknown. Files of a run are somebody's, so a
text from them is shown on one line, with nothing in it that Markdown would act on.
"""

import importlib.util
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import sync
from dinoreg.checkpoint.run_folder import Run, line_at
from dinoreg.checkpoint.steps import probe_in_words, role_of
from dinoreg.config.option import nearest
from dinoreg.config.overwrite import check_folder
from dinoreg.export.certificate import ONE_SIZE, OVERFLOW, certify, listing
from dinoreg.export.formats import FORMATS, MOVING, Format
from dinoreg.export.onnx_graph import OPSET, drop_float16
from dinoreg.export.source import Source, prepare_code
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import RunError, UserError, reworded
from dinoreg.runtime.json_files import flatten
from dinoreg.runtime.templates import render

CERTIFICATE = "certificate.json"


def export(
    weights: str | Path,
    format: str,
    out: str | Path,
    size: int | Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    with_registers: Callable[[Source], Source] | None = None,
) -> Path:
    """What `dinoreg.export` says (`dinoreg.commands.export`), with test-time registers that the caller finds."""
    form = _format(format)
    target = _target(out)
    source = Source(weights, size, channels)
    if source.model.channels != "joint" and (form.name in ("timm", "transformers") or with_registers):
        raise UserError(f"format={format}: not for a bag of channels; channels=[0] exports the network of one of them")
    if format not in MOVING and (with_registers or source.model.register_neurons):
        raise UserError(f"format={format}: its models cannot have test-time registers; {', '.join(MOVING)} can")
    source = with_registers(source) if with_registers else source
    existing = next(path for path in target.parents if path.is_dir())
    options: Any = {"prefix": f".{target.name}.unfinished-", "dir": existing, "ignore_cleanup_errors": True}
    with (
        reworded(f"out={out}: could not be written", OSError, into=RunError),
        tempfile.TemporaryDirectory(**options) as stage,
    ):
        artefact, scratch = Path(stage, "artefact"), Path(stage, "scratch")
        artefact.mkdir()
        scratch.mkdir()
        form.write(artefact, source)
        certificate = certify(form, source, artefact, scratch)
        if format == "onnx" and any(check["note"] == OVERFLOW for check in certificate["checks"]):
            drop_float16(artefact)
        certificate["artefact"]["files"] = listing(artefact)
        write_card(artefact, form, source, certificate)
        (artefact / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
        for path in (*artefact.iterdir(), artefact):
            sync(path)
        target.parent.mkdir(parents=True, exist_ok=True)
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
    # Not readable, a name too long, or with a NUL in it.
    with reworded(f"out={str(out)[:80]}: not a folder that can be written", OSError, ValueError):
        target = Path(os.path.abspath(out))
        for path in (*reversed(target.parents), target):
            check_folder(path, f"out={out}: {path}")
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"out={out}: the folder is not empty; an export writes into a new or empty one")
    return target


# ------------------------------------------------------------------------------------------------------------
# The model card


def write_card(folder: Path, form: Format, source: Source, certificate: Mapping[str, Any]) -> None:
    """Write `README.md` into the artefact's folder.

    certificate  of the artefact, as `certify` returns it
    """
    step = source.origin.get("step")
    run = Run(source.run or folder)
    steps = {probe.step for probe in run.probes}
    measured = step if step in steps else max(steps, default=None)
    text = render(
        "export/templates/card.md.j2",
        form=form,
        source=source,
        model=source.model,
        parameters=sum(parameter.numel() for parameter in source.model.parameters()),
        config=flatten(run.config),
        metrics=line_at(run.metrics, step),
        probe=line_at(run.probe, step),
        probed=probe_in_words(line_at(run.probe, step)),
        role=role_of(run.folder, step, run.num_steps) if step is not None else "",
        results=[probe for probe in run.probes if probe.step == measured],
        measured=measured,
        peer=certificate["peer"],
        files=certificate["pictures"],
        prepare=prepare_code("dinoreg" if form.name == "safetensors" else form.name, source.preprocessing),
        zip=zip,
        checks=_worst_checks(certificate),
        unbounded=list(dict.fromkeys(check["note"] for check in certificate["checks"] if not check["bounded"])),
        one_size=any(check["note"] == ONE_SIZE for check in certificate["checks"]),
        overflow=OVERFLOW,
        opset=OPSET,
        short=_short,
        base_name=_base_name,
    )
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _worst_checks(certificate: Mapping[str, Any]) -> Iterator[tuple[Any, str, bool, float, float]]:
    """(pixels, dtype, whether bounded, largest difference, bound) of each size and dtype, over all outputs."""
    by = itertools.groupby(certificate["checks"], lambda check: (check["size"], check["dtype"], check["bounded"]))
    for (size, dtype, bounded), group in by:
        pairs = [(check["relative_difference"], check["bound"] or 0.0) for check in group]
        worst = max(math.inf if difference is None else difference for difference, _ in pairs)
        yield size, dtype, bounded, worst, min(bound for _, bound in pairs)


def _short(value: object) -> str:
    return str(value)[:200]  # characters


def _base_name(value: Any) -> str:
    """A source of images: generated scenes as they are, of a path the last name only."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(_short(v if str(v).startswith("scenes") else Path(str(v)).name or v) for v in values)
