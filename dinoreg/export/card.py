"""The model card, `README.md` of an export: where the model comes from, what it can do, how it is loaded.

All of it is read from the run folder and the certificate; what is not known is said to be unknown. Files of a run
are somebody's, so a text from them is shown on one line, with nothing in it that Markdown would act on.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.run_folder import Probe, Run, line_at
from dinoreg.export.certificate import OVERFLOW, overflows
from dinoreg.export.formats import Format
from dinoreg.export.onnx_graph import OPSET
from dinoreg.export.source import Source
from dinoreg.runtime.json_files import flatten, is_number
from dinoreg.runtime.templates import render

# What of a run's config a reader of the card wants first; the whole of it is in the run folder.
SETTINGS = (
    ("batch size", "batch_size"),
    ("learning rate", "optim.lr"),
    ("base learning rate", "optim.base_lr"),
    ("global crops, pixels", "crops.global_size"),
    ("local crops", "crops.num_local"),
    ("stochastic depth", "model.drop_path"),
    ("centering", "loss.centering"),
    ("prototypes", "head.prototypes"),
    ("seed", "seed"),
    ("started from", "init"),
)
LIBRARIES = {"meta": "pytorch", "safetensors": "dinoreg"}  # where it is not called as the format is
MAX_TEXT = 200  # characters of a text from a run that are shown


def write_card(folder: Path, name: str, form: Format, source: Source, certificate: Mapping[str, Any]) -> None:
    """Write `README.md` into `folder`."""
    model, pixels = source.model, source.pixels
    height, width = pixels.size
    run = None if source.run is None else Run(source.run)
    notes = dict.fromkeys(check["note"] for check in certificate["checks"] if not check["bounded"])
    text = render(
        "export/templates/card.md.j2",
        format=name,
        library=LIBRARIES.get(name, name),
        packages=_packages(name, form),
        code=code(form, source),
        model=model,
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        given=source.given,
        native=_by(model.image_size),
        size=_by(pixels.size),
        patches=(height // model.patch_size) * (width // model.patch_size),
        opset=OPSET,
        overflow=overflows(certificate),
        mean=", ".join(f"{value:g}" for value in pixels.mean),
        std=", ".join(f"{value:g}" for value in pixels.std),
        assumed=pixels.origin == "assumed",
        one_size=any(check["note"].startswith("takes one image size") for check in certificate["checks"]),
        unbounded=bool(notes),
        random=source.path is None,
        has_run=run is not None,
        training=[] if run is None else _training(run, source),
        step=source.step,
        peer=certificate["peer"],
        checks=_checks(certificate),
        notes=notes,
        overflow_note=OVERFLOW,
        **_results(run, source.step),
    )
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def code(form: Format, source: Source) -> str:
    """The lines that load the artefact in its folder and run it once."""
    height, width = source.pixels.size
    return form.load + form.use.format(shape=f"1, {source.model.in_channels}, {height}, {width}")


def _packages(name: str, form: Format) -> list[str]:
    first = {"safetensors": "dinoreg", "onnx": "numpy"}.get(name, "torch")
    return [first, *(each for each in form.packages if each not in ("safetensors", "onnx", "onnxscript"))]


def _training(run: Run, source: Source) -> list[tuple[str, str]]:
    """(what, value) of the training, as far as the run folder knows it."""
    config, metrics = flatten(run.config), line_at(run.metrics, source.step)
    rows = [("data", _data(config.get("data.source")))]
    if source.step is not None:
        total = config.get("steps")
        rows.append(("steps", f"{source.step:,}" + (f" of {total:,}" if isinstance(total, int) else "")))
    if is_number(metrics.get("images")):
        rows.append(("images seen", f"{int(metrics['images']):,}"))
    for title, key in SETTINGS:
        value = config.get(key)
        if value is not None:
            rows.append((title, _data(value) if key == "init" else _short(value)))
    if is_number(metrics.get("total_loss")):
        rows.append(("loss at the last line logged", f"{metrics['total_loss']:.4g} (step {metrics['step']})"))
    if "config_hash" in source.metadata:
        rows.append(("config hash", _short(source.metadata["config_hash"])))
    return rows


def _results(run: Run | None, step: int | None) -> dict[str, Any]:
    """The evaluations of this step, else the newest there are, and the probe inside the run."""
    probes = run.probes if run is not None else []
    steps = {probe.step for probe in probes}
    chosen = step if step in steps else max(steps, default=None)
    line = line_at(run.probe, step) if run is not None else {}
    values = {key: value for key, value in line.items() if is_number(value) and key not in ("step", "probe_time")}
    return {
        "results": [_result(probe) for probe in probes if probe.step == chosen],
        "results_step": chosen,
        "probe": [(_short(key), value) for key, value in values.items()],
        "probe_step": line.get("step"),
    }


def _result(probe: Probe) -> tuple[str, ...]:
    content = probe.details

    def shown(value: Any) -> str:
        if not is_number(value):
            return "unknown"
        return f"{100 * value:.1f} %" if probe.unit == "share" else f"{value:.4g} {_short(probe.unit)}"

    count = content.get("n_test")
    baselines = [f"{_short(name)} {shown(value)}" for name, (value, _, _) in probe.baselines.items()]
    return (
        _short(probe.dataset),
        f"{_short(probe.metric)}, {_short(content.get('probe', 'probe'))}",
        shown(probe.value),
        f"{shown(content.get('low'))} to {shown(content.get('high'))}",
        f"{count:,}" if isinstance(count, int) else "unknown",
        "; ".join(baselines) or "none",
    )


def _checks(certificate: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(pixels, dtype, largest difference, bound) of each size and dtype, over all outputs."""
    rows: dict[tuple[str, str, bool], tuple[float, float]] = {}
    for check in certificate["checks"]:
        key = (_by(check["size"]), check["dtype"], check["bounded"])
        worst, bound = rows.get(key, (0.0, math.inf))
        difference = check["relative_difference"]
        rows[key] = (max(worst, math.inf if difference is None else difference), min(bound, check["bound"] or 0.0))
    return [
        (size, dtype, f"{worst:.1e}", f"{bound:.1e}" if bounded else "none: see below")
        for (size, dtype, bounded), (worst, bound) in rows.items()
    ]


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _short(value: Any) -> str:
    return str(value)[:MAX_TEXT]


def _data(value: Any) -> str:
    """A source of images: generated scenes as they are, of a path the last name only."""
    if value is None:
        return "unknown"
    values = value if isinstance(value, list) else [value]
    return ", ".join(_short(v if str(v).startswith("scenes") else Path(str(v)).name or v) for v in values)
