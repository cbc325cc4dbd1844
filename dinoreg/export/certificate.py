"""The certificate: the artefact's own library is run without ours, and what it answers is compared with the source.

Two image sizes, two dtypes, every output. In float32 the largest difference, relative to the largest value of the
output, must stay below the format's bound. In the lower dtype both sides round, and differently; there it must stay
below three times what rounding alone does to the source. A difference that is no number is above every bound.
"""

import copy
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoreg.export import peer
from dinoreg.export.formats import Format, hub_text
from dinoreg.export.source import Source, resized
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import RunError

OUTPUTS = ("cls", "registers", "patches")
ROUNDING_FACTOR = 3.0
SEED = 0
OVERFLOW = "the source itself overflows in this dtype, which is not for this model"


@dataclass(frozen=True)
class Trial:
    """One folder that the peer loads, and the images it is asked about.

    cases    {name: images (B, C, H, W)}
    bounded  whether a difference fails the export; `note` says why not, or what is special
    """

    model: RegisterViT
    folder: Path
    cases: dict[str, Tensor]
    bounded: bool = True
    note: str = ""


def certify(name: str, form: Format, source: Source, folder: Path, scratch: Path, fixed: bool) -> dict[str, Any]:
    """Compare the artefact in `folder` with `source`; returns the certificate, fit for JSON.

    scratch  an empty folder for inputs, answers and artefacts of other sizes
    fixed    the artefact takes one image size only
    raises   RunError if the peer cannot load or run it, or if a difference is above its bound
    """
    checks: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for number, trial in enumerate(_trials(form, source, folder, scratch, fixed)):
        place = scratch / f"trial_{number}"
        place.mkdir()
        answers, facts = _ask(name, form, trial, place)
        checks += _compare(form, trial, answers)
        failed = next((check for check in checks if check["bounded"] and not check["passed"]), None)
        if failed is not None:
            raise RunError(_failure(name, form, failed))
    return {
        "format": "dinoreg-certificate",
        "version": 1,
        "artefact": {"format": name, "files": listing(folder)},
        "source": _source_facts(source),
        "peer": facts,
        "bounds": {
            "float32": form.bound,
            form.low: f"{ROUNDING_FACTOR:g} x the source's own rounding in {form.low}, plus one unit of rounding",
            "relative_to": "the largest absolute value of the source's output",
        },
        "inputs": f"standard normal noise, torch.manual_seed({SEED})",
        "checks": checks,
        "largest_relative_difference": {dtype: _largest(checks, dtype) for dtype in ("float32", form.low)},
        "passed": True,
    }


def overflows(certificate: Mapping[str, Any]) -> bool:
    """Whether the source itself has no finite output in the lower dtype."""
    return any(check["note"] == OVERFLOW for check in certificate["checks"])


def _largest(checks: Sequence[Mapping[str, Any]], dtype: str) -> float | None:
    bounded = [check["relative_difference"] for check in checks if check["bounded"] and check["dtype"] == dtype]
    return max(bounded, default=None)


def summary(certificate: Mapping[str, Any]) -> str:
    """One line: what was run, and how far it was off."""
    peer_facts, worst = certificate["peer"], certificate["largest_relative_difference"]["float32"]
    library = peer_facts["library"]
    known = peer_facts["versions"].get(library) or f"PyTorch {peer_facts['versions']['torch']}"
    count = sum(check["bounded"] for check in certificate["checks"])
    bound = certificate["bounds"]["float32"]
    return (
        f"{library} ({known}) agrees in {count} checks; largest relative difference in float32 {worst:.1e} of {bound:g}"
    )


# ------------------------------------------------------------------------------------------------- what is asked


def other_size(model: RegisterViT, square: bool = False) -> tuple[int, int]:
    """An image size besides the native one: smaller, and rectangular unless it must not be."""
    rows, columns = model.grid
    rows, columns = max(2, round(0.43 * rows)), max(3, round(0.6 * columns))
    if square:
        columns = rows
    if (rows, columns) == model.grid:
        rows, columns = rows + 1, columns + 1
    return rows * model.patch_size, columns * model.patch_size


def _trials(form: Format, source: Source, folder: Path, scratch: Path, fixed: bool) -> list[Trial]:
    model, native = source.model, source.model.image_size
    at = _images(model, native, 1)
    if fixed:
        cases = {_label(native, 1): at, _label(native, 3): _images(model, native, 3)}
        return [Trial(model, folder, cases, note="takes one image size; batches of 1 and 3")]
    size = other_size(model)
    elsewhere = _images(model, size, 2)
    ours = (model.antialias, float(model.position_offset))
    theirs = form.resampling(model) if form.resampling else ours
    if ours == theirs:
        return [Trial(model, folder, {_label(native, 1): at, _label(size, 2): elsewhere})]
    differs = (
        f"{form.peer} resamples positions with antialias={theirs[0]}, offset={theirs[1]:g}, the source with "
        f"antialias={ours[0]}, offset={ours[1]:g}: other sizes than the native one differ"
    )
    # The weights are proven at a second size by an artefact made for it, to which no resampling is left.
    square = other_size(model, square=True)
    moved = replace(source, model=resized(model, square))
    made = scratch / "second_size"
    made.mkdir()
    form.write(made, moved)
    note = "exported for this size, positions resampled as the source does"
    return [
        Trial(model, folder, {_label(native, 1): at}),
        Trial(moved.model, made, {_label(square, 2): _images(model, square, 2)}, note=note),
        Trial(model, folder, {_label(size, 2): elsewhere}, bounded=False, note=differs),
    ]


def _images(model: RegisterViT, size: tuple[int, int], batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(batch, model.in_channels, *size, generator=generator)


def _label(size: tuple[int, int], batch: int) -> str:
    return f"{batch}x{size[0]}x{size[1]}"


# ------------------------------------------------------------------------------------------------ the other side


def _ask(name: str, form: Format, trial: Trial, place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run the peer in a process without dinoreg; returns its answers and what it says of itself."""
    script = place / "ask.py"
    shutil.copyfile(peer.__file__, script)
    save_file(trial.cases, place / "cases.safetensors")
    request = {
        "format": name,
        "peer": form.peer,
        "packages": form.packages,
        "folder": str(trial.folder.resolve()),
        "load": {dtype: _loading(name, form, dtype) for dtype in ("float32", form.low)},
        "num_registers": trial.model.num_registers,
        "threads": torch.get_num_threads(),
    }
    if name == "safetensors":  # what is in the file is read by that library, and run by the plain encoder
        (place / "plain.py").write_text(hub_text(trial.model), encoding="utf-8")
    (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",  # a hubconf.py leaves no cache in the artefact
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(place / "request.json")],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        raise RunError(f"format={name}: {form.peer} could not load or run the artefact ({reason}); nothing written")
    try:
        facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
        return load_file(place / "answers.safetensors"), facts
    except Exception as error:  # a peer that ended well but left no whole answer
        raise RunError(f"format={name}: {form.peer} left no answer ({type(error).__name__}); nothing written") from None


def _loading(name: str, form: Format, dtype: str) -> str:
    """The code that makes `model`: the card's own, but for safetensors, whose card uses dinoreg."""
    if name == "safetensors":
        return (
            "import plain\nfrom safetensors.torch import load_file\nmodel = plain.backbone(pretrained=False)\n"
            f'model.load_state_dict(load_file("{form.weights}"))\n'
        )
    if name == "onnx":
        return form.load.replace("model.onnx", "model.onnx" if dtype == "float32" else f"model_{dtype}.onnx")
    return form.load


# ------------------------------------------------------------------------------------------------ the comparison


def _compare(form: Format, trial: Trial, answers: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A check for every dtype, case and output; RunError where an answer is missing or has another shape."""
    exact = _answers(trial.model, trial.cases, torch.float32)
    low = getattr(torch, form.low)
    rounded = _answers(copy.deepcopy(trial.model).to(low), trial.cases, low)
    checks = []
    for dtype, tokens in (("float32", exact), (form.low, rounded)):
        for case, output in itertools.product(trial.cases, OUTPUTS):
            value, peer_value = tokens[case][output], answers.get(f"{dtype}/{case}/{output}")
            if peer_value is None or peer_value.shape != value.shape:
                shape = None if peer_value is None else tuple(peer_value.shape)
                raise RunError(
                    f"{form.peer}: {output} at {case} has shape {shape}, expected {tuple(value.shape)}; nothing written"
                )
            if value.numel():  # the registers of a model that has none are empty
                _, height, width = trial.cases[case].shape[1:]
                check = {"size": [height, width], "batch": len(value), "dtype": dtype, "output": output}
                checks.append(check | _difference(form, trial, dtype, exact[case][output], value, peer_value))
    return checks


def _difference(
    form: Format, trial: Trial, dtype: str, exact: Tensor, value: Tensor, peer_value: Tensor
) -> dict[str, Any]:
    """How far the peer's output is from the source's in a dtype; `exact` is the source's in float32."""
    scale = float(exact.abs().max()) or 1.0
    bound, overflow = form.bound, False
    if dtype != "float32":
        rounding = float((value - exact).abs().max()) / scale
        bound = ROUNDING_FACTOR * rounding + torch.finfo(getattr(torch, dtype)).eps
        overflow = not bool(value.isfinite().all())
    difference = float((peer_value - value).abs().max())
    return {
        "scale": scale,
        "max_difference": _finite(difference),
        "relative_difference": _finite(difference / scale),
        "bound": _finite(bound),
        "bounded": trial.bounded and not overflow,
        "passed": difference / scale <= bound,  # False for NaN
        "note": OVERFLOW if overflow else trial.note,
    }


def _answers(model: RegisterViT, cases: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The source's outputs in float32, computed in a dtype: {case: {output: tensor}}."""
    with torch.inference_mode():
        return {
            name: {output: value.float() for output, value in zip(OUTPUTS, model(images.to(dtype)))}
            for name, images in cases.items()
        }


def _finite(value: float) -> float | None:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else None


def _failure(name: str, form: Format, check: Mapping[str, Any]) -> str:
    height, width = check["size"]
    relative = check["relative_difference"]
    by = "no finite number" if relative is None else f"{relative:.1e} of its scale, bound {check['bound']:.1e}"
    return (
        f"format={name}: {form.peer} differs from the source: {check['output']} at {height}x{width} in "
        f"{check['dtype']} by {by}; nothing written"
    )


def listing(folder: Path) -> dict[str, Any]:
    """Size and digest of every file of an artefact."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}


def _source_facts(source: Source) -> dict[str, Any]:
    facts: dict[str, Any] = {"weights": source.given, "architecture": source.model.architecture()}
    facts["parameters"] = sum(parameter.numel() for parameter in source.model.parameters())
    if source.path is not None and source.path.is_file():
        facts["sha256"] = digest(source.path)
    facts |= {key: source.metadata[key] for key in ("step", "config_hash") if key in source.metadata}
    return facts
