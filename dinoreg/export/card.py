"""The model card, `README.md` of an export: where the model comes from, what it can do, how it is loaded.

All of it is read from the run folder and the certificate; what is not known is said to be unknown. Files of a run
are somebody's, so a text from them is shown on one line, with nothing in it that Markdown would act on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinoreg.export.certificate import OVERFLOW, overflows
from dinoreg.export.formats import Format
from dinoreg.export.onnx_graph import OPSET
from dinoreg.export.source import Source

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
_HEADER = """---
library_name: {library}
license: other
license_name: to-be-stated-by-the-owner
pipeline_tag: image-feature-extraction
tags: [dinoreg, vision-transformer, self-supervised, registers]
---
"""
_LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "onnx": "onnx",
    "meta": "pytorch",
    "safetensors": "dinoreg",
}


def write_card(folder: Path, name: str, form: Format, source: Source, certificate: Mapping[str, Any]) -> None:
    """Write `README.md` into `folder`."""
    config = _config(source.run)
    sections = [
        _HEADER.format(library=_LIBRARIES[name]) + _title(name, source),
        "## Loading\n\n" + _loading(name, form, source, certificate),
        "## Input\n\n" + _input(name, source, certificate),
        "## Data and training\n\n" + _training(source, config),
        "## Results\n\n" + _results(source),
        "## Proof\n\n" + _proof(name, certificate),
        "## Licence\n\nNot stated yet. The weights are the property of whoever trained them: replace this paragraph, "
        "and `license` at the top of this file, by the terms under which you pass them on. Bear in mind the terms of "
        "the images, and of the weights the run was started from, if it was.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def code(form: Format, source: Source) -> str:
    """The lines that load the artefact in its folder and run it once."""
    height, width = source.pixels.size
    return form.load + form.use.format(shape=f"1, {source.model.in_channels}, {height}, {width}")


def _title(name: str, source: Source) -> str:
    model = source.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    registers = f"{model.num_registers} register tokens" if model.num_registers else "no register tokens"
    feed = {"mlp": "MLP", "swiglu": "SwiGLU"}[model.ffn]
    return (
        f"# Vision Transformer, {registers} ({name})\n\n"
        f"A backbone of {parameters:,} parameters that turns an image into one class token and one token per "
        f"{model.patch_size}x{model.patch_size} patch: width {model.dim}, {model.depth} blocks, {model.heads} heads, "
        f"{feed}, {registers}. Positions are native to {_by(model.image_size)} pixels. "
        f"Exported by dinoreg from `{_code(source.given)}`."
    )


def _loading(name: str, form: Format, source: Source, certificate: Mapping[str, Any]) -> str:
    packages = ["dinoreg"] if name == "safetensors" else ["torch"] if name != "onnx" else ["numpy"]
    packages += [package for package in form.packages if package not in ("safetensors", "onnx", "onnxscript")]
    height, width = source.pixels.size
    lines = [
        f"In this folder, with {', '.join(f'`{package}`' for package in packages)} installed:",
        f"```python\n{code(form, source)}\n```",
    ]
    registers = source.model.num_registers
    count = (height // source.model.patch_size) * (width // source.model.patch_size)
    lines.append(
        f"Tokens, in this order, after the final norm: the class token, {registers} registers, patches row by row "
        f"({count} for {_by((height, width))} pixels). Use the class token for the image and patches for places in it"
        + ("; registers are the model's working memory." if registers else ".")
    )
    if name == "onnx":
        half = "`model_float16.onnx` is the same graph in float16, input included."
        lines.append(f"Opset {OPSET}. " + (half if not overflows(certificate) else "Float16 overflows in this model."))
    return "\n\n".join(lines)


def _input(name: str, source: Source, certificate: Mapping[str, Any]) -> str:
    model, pixels = source.model, source.pixels
    rows = [
        ("channels", str(model.in_channels) + (", RGB" if model.in_channels == 3 else "")),
        ("values", "in [0, 1], then minus the mean, over the standard deviation"),
        ("mean", ", ".join(f"{value:g}" for value in pixels.mean)),
        ("standard deviation", ", ".join(f"{value:g}" for value in pixels.std)),
        ("size", _sizes(name, source, certificate)),
    ]
    text = _table(("", ""), rows)
    if pixels.told == "assumed":
        text += "\n\nThe statistics were not recorded with these weights; those above are assumed."
    return text


def _sizes(name: str, source: Source, certificate: Mapping[str, Any]) -> str:
    model = source.model
    notes = [check["note"] for check in certificate["checks"]]
    if any(note.startswith("takes one image size") for note in notes):
        return f"{_by(model.image_size)} pixels and no other"
    text = f"any multiple of {model.patch_size} pixels; trained or resampled for {_by(model.image_size)}"
    return text + ("; at other sizes see Proof" if any(not check["bounded"] for check in certificate["checks"]) else "")


def _training(source: Source, config: Mapping[str, Any]) -> str:
    if source.path is None:
        return "None: these are random weights of the named architecture."
    if source.run is None:
        return "Unknown here: the weights came as a file, without the folder of the run that made them."
    metrics = _last_line(source.run / "metrics.jsonl", source.step)
    rows: list[tuple[str, str]] = [("data", _data(_get(config, "data.source")))]
    if source.step is not None:
        of = _get(config, "steps")
        rows.append(("steps", f"{source.step:,}" + (f" of {of:,}" if isinstance(of, int) else "")))
    if _is_number(metrics.get("images")):
        rows.append(("images seen", f"{int(metrics['images']):,}"))
    for title, key in SETTINGS:
        value = _get(config, key)
        if value is not None:
            rows.append((title, _data(value) if key == "init" else _plain(value)))
    if _is_number(metrics.get("total_loss")):
        rows.append(("loss at the last line logged", f"{metrics['total_loss']:.4g} (step {metrics.get('step')})"))
    if "config_hash" in source.metadata:
        rows.append(("config hash", _plain(source.metadata["config_hash"])))
    return "Self-supervised pretraining with dinoreg (DINO, iBOT and KoLeo losses).\n\n" + _table(("", ""), rows)


def _results(source: Source) -> str:
    if source.run is None:
        return "No evaluation came with these weights."
    parts = []
    folder, step = _evaluation(source.run, source.step)
    rows = [row for path in sorted(folder.glob("*.json")) if (row := _score(_json(path)))] if folder else []
    if rows:
        other = "" if step == source.step else f" Measured at step {step:,}, not at the step of these weights."
        parts.append(f"Frozen features; intervals are 95 % bootstrap intervals over the test images.{other}")
        parts.append(_table(("dataset", "measure", "value", "95 % interval", "test images", "baselines"), rows))
    probe = _last_line(source.run / "probe.jsonl", source.step)
    shown = {key: value for key, value in probe.items() if _is_number(value) and key not in ("step", "probe_time")}
    if shown:
        listed = ", ".join(f"{_plain(key)} {value:.4g}" for key, value in shown.items())
        parts.append(f"In-run probe at step {_plain(probe.get('step'))}: {listed}.")
    return "\n\n".join(parts) if parts else "Not evaluated: `dinoreg eval` fills this section at the next export."


def _evaluation(run: Path, step: int | None) -> tuple[Path | None, int]:
    """The evaluations of this step, else the newest there are."""
    folders = {int(path.name): path for path in (run / "eval").glob("*") if path.name.isdigit() and path.is_dir()}
    if not folders:
        return None, 0
    chosen = step if step in folders else max(folders)
    assert chosen is not None
    return folders[chosen], chosen


def _score(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    if not _is_number(content.get("value")):
        return None
    share = content.get("unit", "share") == "share"

    def shown(value: Any) -> str:
        if not _is_number(value):
            return "unknown"
        return f"{100 * value:.1f} %" if share else f"{value:.4g} {_plain(content.get('unit'))}"

    beside = content.get("baselines")
    baselines = [
        f"{_plain(name)} {shown(row.get('value'))}"
        for name, row in (beside.items() if isinstance(beside, dict) else ())
        if isinstance(row, dict)
    ]
    count = content.get("n_test")
    return (
        _plain(content.get("dataset", "unknown")),
        f"{_plain(content.get('metric', 'score'))}, {_plain(content.get('probe', 'probe'))}",
        shown(content["value"]),
        f"{shown(content.get('low'))} to {shown(content.get('high'))}",
        f"{count:,}" if isinstance(count, int) else "unknown",
        "; ".join(baselines) or "none",
    )


def _proof(name: str, certificate: Mapping[str, Any]) -> str:
    facts = certificate["peer"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    rows: dict[tuple[str, str, bool], tuple[float, float]] = {}
    for check in certificate["checks"]:
        key = (_by(check["size"]), check["dtype"], check["bounded"])
        worst, bound = rows.get(key, (0.0, math.inf))
        difference = check["relative_difference"]
        rows[key] = (max(worst, math.inf if difference is None else difference), min(bound, check["bound"] or 0.0))
    shown = [
        (size, dtype, f"{worst:.1e}", f"{bound:.1e}" if bounded else "none: see below")
        for (size, dtype, bounded), (worst, bound) in rows.items()
    ]
    how = (
        "what the plain encoder in PyTorch makes of the tensors that safetensors reads"
        if name == "safetensors"
        else (f"what {facts['library']} makes of this folder")
    )
    text = (
        f"`certificate.json` compares the source with {how}, in a process in which dinoreg could not be imported "
        f"({versions}). Largest difference over all outputs, relative to the largest value of each:\n\n"
    )
    text += _table(("pixels", "dtype", "difference", "bound"), shown)
    notes = dict.fromkeys(check["note"] for check in certificate["checks"] if not check["bounded"])
    for note in notes:
        advice = "" if note == OVERFLOW else " Export with `size=` for the size you use."
        text += f"\n\n{note[:1].upper()}{note[1:]}.{advice}"
    return text


# ---------------------------------------------------------------------------------------------------------- pieces


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _plain(value: Any) -> str:
    """A value on one line, with every character that Markdown or HTML would act on escaped."""
    text = " ".join(str(value).split())[:200]
    return re.sub(r"([\\`*_{}\[\]<>()#|!~])", r"\\\1", text)


def _code(value: Any) -> str:
    return " ".join(str(value).split())[:200].replace("`", "'").replace("|", "/")


def _data(value: Any) -> str:
    """A source of images: generated scenes as they are, of a path the last name only."""
    if value is None:
        return "unknown"
    values = value if isinstance(value, list) else [value]
    return ", ".join(_plain(v if str(v).startswith("scenes") else Path(str(v)).name or v) for v in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _config(run: Path | None) -> dict[str, Any]:
    if run is None:
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
    except Exception:  # the parser's and OmegaConf's errors have no common base; the card then knows less
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_line(path: Path, step: int | None) -> dict[str, Any]:
    """The last JSON line up to `step`; {} if there is none."""
    found: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and _is_number(content.get("step")) and (step is None or content["step"] <= step):
            found = content
    return found
