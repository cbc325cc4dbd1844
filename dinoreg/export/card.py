"""The model card, `README.md` of an export: where the model comes from, what it can do, how it is loaded.

All of it is read from the run folder and the certificate; what is not known is said to be unknown. Files of a run
are somebody's, so a text from them is shown on one line, with nothing in it that Markdown would act on.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.run_folder import Run, line_at
from dinoreg.checkpoint.steps import probe_in_words, role_of
from dinoreg.export.certificate import ONE_SIZE, OVERFLOW
from dinoreg.export.formats import Format
from dinoreg.export.onnx_graph import OPSET
from dinoreg.export.picture_files import prepare_code
from dinoreg.export.source import Source
from dinoreg.runtime.json_files import flatten
from dinoreg.runtime.templates import render

MAX_TEXT = 200  # characters of a text from a run that are shown


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
    return str(value)[:MAX_TEXT]


def _base_name(value: Any) -> str:
    """A source of images: generated scenes as they are, of a path the last name only."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(_short(v if str(v).startswith("scenes") else Path(str(v)).name or v) for v in values)
