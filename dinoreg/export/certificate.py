"""The certificate: the artefact's own library is run without ours, and its outputs are compared with the source's.

Two image sizes, two dtypes, every output. In float32 the largest difference, relative to the largest value of the
output, must stay below the format's bound. In the lower dtype both sides round, and differently; there it must stay
below three times what rounding alone does to the source. A difference that is no number is above every bound.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoreg.data.preprocess import Preprocessing
from dinoreg.export import peer
from dinoreg.export.formats import Format, hub_text
from dinoreg.export.source import Source, prepare_code, resized, write_pictures
from dinoreg.models.registry import resampling
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.device import per_channel
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import RunError
from dinoreg.weights.resolve import Weights

OUTPUTS = ("cls", "registers", "patches")
ROUNDING_FACTOR = 3.0
MIN_COSINE = 0.9999  # of class tokens from image files
MAX_LEVELS = 1.0  # of 255: mean absolute difference of the inputs; Pillow and torch resize within one on average
SEED = 0
ONE_SIZE = "takes one image size; batches of 1 and 3"
OVERFLOW = "the source itself overflows in this dtype, which is not for this model"


@dataclass(frozen=True)
class Trial:
    """One folder that the peer loads, and the images it is run on.

    cases    {name: images (B, C, H, W) float32, already normalised}
    bounded  whether a difference fails the export; `note` says why not, or what is special
    """

    model: RegisterViT
    folder: Path
    cases: dict[str, Tensor]
    bounded: bool = True
    note: str = ""


def certify(form: Format, source: Source, folder: Path, scratch: Path) -> dict[str, Any]:
    """Compare the artefact in `folder` with `source`; returns the certificate, but for the list of files, fit for JSON.

    scratch  an empty folder for inputs, outputs and artefacts of other sizes
    raises   RunError if the peer cannot load or run it, or if a difference is above its bound
    """
    checks: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    paths = write_pictures(scratch, source)
    of_files: dict[str, Tensor] = {}
    for number, trial in enumerate(_trials(form, source, folder, scratch)):
        place = scratch / f"trial_{number}"
        place.mkdir()
        files = {} if of_files else {name: str(path) for name, path in paths.items()}  # the first is of the artefact
        answers, facts = _ask(form, trial, place, prepare_code(form.name, source.preprocessing), files)
        of_files = of_files or answers
        for check in _compare(form, trial, answers):
            checks.append(check)
            if check["bounded"] and not check["passed"]:
                relative, where = check["relative_difference"], f"{check['size'][0]}x{check['size'][1]}"
                far = f"{relative:.1e} of its scale, bound {check['bound']:.1e}" if relative else "no finite number"
                what = f"{check['output']} at {where} in {check['dtype']} by {far}"
                raise RunError(f"format={form.name}: {form.peer} differs from the source: {what}; nothing written")
    pictures = _compare_pictures(form, source, paths, of_files)
    check_read_back(form, source, folder)
    bounded = [(check["dtype"], check["relative_difference"]) for check in checks if check["bounded"]]
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    weights = {"weights": source.given, "architecture": source.model.architecture(), "parameters": parameters}
    if source.path is not None:
        weights["sha256"] = digest(source.path)
    return {
        "format": "dinoreg-certificate",
        "version": 1,
        "artefact": {"format": form.name},
        "source": weights | source.origin,
        "peer": facts,
        "bounds": {
            "float32": form.bound,
            form.low: f"{ROUNDING_FACTOR:g} x the source's own rounding in {form.low}, plus one unit of rounding",
            "relative_to": "the largest absolute value of the source's output",
        },
        "inputs": f"standard normal noise, torch.manual_seed({SEED})",
        "checks": checks,
        "largest_relative_difference": {
            dtype: max((far for each, far in bounded if each == dtype), default=None) for dtype in ("float32", form.low)
        },
        "pictures": pictures,
        "passed": True,
    }


def summary(certificate: Mapping[str, Any]) -> str:
    """The certificate in one line: the library that was run, the number of checks, the largest relative difference.

    What is not bounded is said behind it, as a user whose pictures have another size than the native one meets it.
    """
    library, versions = certificate["peer"]["library"], certificate["peer"]["versions"]
    worst, known = certificate["largest_relative_difference"]["float32"], versions.get(library)
    count = sum(check["bounded"] for check in certificate["checks"])
    bound = certificate["bounds"]["float32"]
    files = [check["cosine"] for check in certificate["pictures"]["checks"]]
    loose = [c for c in certificate["checks"] if not c["bounded"] and c["note"] != OVERFLOW and c["dtype"] == "float32"]
    elsewhere = ""
    if loose:
        native = "x".join(map(str, certificate["source"]["architecture"]["image_size"]))
        found = (check["relative_difference"] for check in loose)
        most = max(math.inf if difference is None else difference for difference in found)
        elsewhere = f"; at other sizes than {native} it differs by {most:.1e}, export with size= for the one you use"
    return (
        f"{library} ({known or 'PyTorch ' + versions['torch']}) agrees in {count} checks; "
        f"largest relative difference in float32 {worst:.1e} of {bound:g}; "
        f"{len(files)} picture files through its own processor: cosine {min(files):.6f} or more{elsewhere}"
    )


def check_read_back(form: Format, source: Source, folder: Path) -> None:
    """RunError unless dinoreg reads the artefact as the model that was written; an ONNX graph it does not read."""
    if form.name == "onnx":
        return
    back, model = Weights(folder), source.model
    kept = Preprocessing.of(back.preprocessing, model.in_channels, model.image_size, model.patch_size, folder)
    same = kept == source.preprocessing
    if form.name not in ("timm", "transformers"):  # which have their own ways: their peers say whether they agree
        state = model.state_dict()
        same &= back.architecture(model.heads) == model.architecture()
        same &= all(torch.equal(value, state[key]) for key, value in back.backbone.items())
    if not same:
        raise RunError(f"format={form.name}: the artefact is not read back as it was written; nothing written")


def _compare_pictures(
    form: Format, source: Source, paths: Mapping[str, Path], answers: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The part of a certificate that is about image files; RunError for the first that is not seen alike.

    answers  {"NAME/pixels": (1, C, H, W), "NAME/cls": (1, D)} of the other side

    The inputs always have to agree; class tokens where the library resamples positions as the source does, if at all.
    """
    model, stated, checks = source.model, source.preprocessing, []
    bounded = stated.size == model.image_size or _resampling(form, model) == _resampling(None, model)
    std = per_channel(stated.std, "cpu")
    for name, path in paths.items():
        pixels, theirs = stated(path)[None], answers[f"{name}/pixels"]
        levels = cosine = math.nan
        if theirs.shape == pixels.shape:
            levels = float(((theirs - pixels) * std).abs().mean() * 255)
            with torch.inference_mode():
                ours = model(pixels).cls
            cosine = float(torch.cosine_similarity(ours.double(), answers[f"{name}/cls"].double()))
        if not (levels <= MAX_LEVELS and (cosine >= MIN_COSINE or not bounded)):  # NaN is neither
            apart = f"{levels} of 255 levels apart, cosine {cosine}"
            else_ = f"its own processor makes something else of the file {name!r} than dinoreg: {apart}"
            raise RunError(f"format={form.name}: {else_}; nothing written")
        checks.append({"picture": name, "cosine": cosine, "levels": levels, "passed": True})
    return {
        "compared": "class tokens, and inputs as mean absolute difference in levels of 255",
        "bounds": {"cosine": MIN_COSINE if bounded else None, "levels": MAX_LEVELS},
        "checks": checks,
    }


# --------------------------------------------------------------------------------------------------- the trials


def other_size(model: RegisterViT, square: bool = False) -> tuple[int, int]:
    """An image size (height, width) in pixels besides the native one: smaller, and rectangular unless `square`."""
    rows, columns = max(2, round(0.43 * model.grid[0])), max(3, round(0.6 * model.grid[1]))
    columns = rows if square else columns
    if (rows, columns) == model.grid:
        rows, columns = rows + 1, columns + 1
    return rows * model.patch_size, columns * model.patch_size


def _trials(form: Format, source: Source, folder: Path, scratch: Path) -> list[Trial]:
    model, native = source.model, source.model.image_size
    at_native = _cases(model, native, 1)
    if form.name == "onnx" and source.size_given:
        return [Trial(model, folder, at_native | _cases(model, native, 3), note=ONE_SIZE)]
    elsewhere = _cases(model, other_size(model), 2)
    ours, theirs = _resampling(None, model), _resampling(form, model)
    if ours == theirs:
        return [Trial(model, folder, at_native | elsewhere)]
    how, source_how = ("antialias={antialias}, offset={position_offset:g}".format(**each) for each in (theirs, ours))
    differs = f"{form.peer} resamples positions with {how}, the source with {source_how}: other sizes differ"
    # The weights are checked at a second size by an artefact made for that size, which resamples nothing.
    square = other_size(model, square=True)
    moved = source.of(resized(model, square))
    made = scratch / "second_size"
    made.mkdir()
    form.write(made, moved)
    note = "exported for this size, positions resampled as the source does"
    return [
        Trial(model, folder, at_native),
        Trial(moved.model, made, _cases(model, square, 2), note=note),
        Trial(model, folder, elsewhere, bounded=False, note=differs),
    ]


def _resampling(form: Format | None, model: RegisterViT) -> dict[str, Any]:
    """How a format's library resamples positions; None: how the model itself does. Rotary ones it need not."""
    if model.rope is not None:
        return {}
    if form is not None and form.name in ("timm", "transformers"):
        return resampling(form.name, model.num_registers)
    return {"antialias": model.antialias, "position_offset": float(model.position_offset)}


def _cases(model: RegisterViT, size: tuple[int, int], batch: int) -> dict[str, Tensor]:
    """{name: images (B, C, H, W)} of one size."""
    generator = torch.Generator().manual_seed(SEED)
    return {f"{batch}x{size[0]}x{size[1]}": torch.randn(batch, model.in_channels, *size, generator=generator)}


# ------------------------------------------------------------------------------------------------ the other side


def _ask(
    form: Format, trial: Trial, place: Path, prepare: str, pictures: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run the peer in a process without dinoreg; returns its answers and what it says of itself."""
    script = shutil.copyfile(peer.__file__, place / "ask.py")
    save_file(trial.cases, place / "cases.safetensors")
    code = form.load(for_peer=True)
    request = {
        "format": form.name,
        "peer": form.peer,
        "packages": form.packages,
        "folder": str(trial.folder.resolve()),
        "load": {"float32": code, form.low: code.replace("model.onnx", f"model_{form.low}.onnx")},
        "prepare": prepare,
        "pictures": pictures,
        "num_registers": trial.model.num_registers,
        "threads": torch.get_num_threads(),
    }
    if form.name == "safetensors":  # the file is read by that library, and its weights are run by the plain encoder
        (place / "plain.py").write_text(hub_text(trial.model), encoding="utf-8")
    (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # Without bytecode, so that a hubconf.py leaves no cache in the artefact.
    offline = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(place / "request.json")],
        cwd=place,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        errors="replace",
    )
    about = f"format={form.name}: {form.peer}"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        raise RunError(f"{about} could not load or run the artefact ({reason}); nothing written")
    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    return load_file(place / "answers.safetensors"), facts


# ------------------------------------------------------------------------------------------------ the comparison


def _compare(form: Format, trial: Trial, answers: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """A check for every dtype, case and output; RunError where an answer is missing or has another shape."""
    exact = _answers(trial, torch.float32)
    for dtype in ("float32", form.low):
        own = exact if dtype == "float32" else _answers(trial, getattr(torch, dtype))
        for (case, output), value in own.items():
            theirs = answers.get(f"{dtype}/{case}/{output}")
            if theirs is None or theirs.shape != value.shape:
                shape = None if theirs is None else tuple(theirs.shape)
                what = f"{output} at {case} has shape {shape}, expected {tuple(value.shape)}"
                raise RunError(f"{form.peer}: {what}; nothing written")
            if not value.numel():  # the registers of a model that has none
                continue
            scale, difference = float(exact[case, output].abs().max()) or 1.0, float((theirs - value).abs().max())
            bound, overflow = form.bound, False
            if dtype != "float32":
                rounding = float((value - exact[case, output]).abs().max()) / scale
                bound = ROUNDING_FACTOR * rounding + torch.finfo(getattr(torch, dtype)).eps
                overflow = not bool(value.isfinite().all())
            numbers = {"max_difference": difference, "relative_difference": difference / scale, "bound": bound}
            yield {
                "size": list(trial.cases[case].shape[2:]),
                "batch": len(value),
                "dtype": dtype,
                "output": output,
                "scale": scale,
                **{key: each if math.isfinite(each) else None for key, each in numbers.items()},  # as JSON can hold it
                "bounded": trial.bounded and not overflow,
                "passed": difference / scale <= bound,  # False for NaN
                "note": OVERFLOW if overflow else trial.note,
            }


def _answers(trial: Trial, dtype: torch.dtype) -> dict[tuple[str, str], Tensor]:
    """The source's outputs in float32, computed in a dtype: {(case, output): tensor}."""
    model = copy.deepcopy(trial.model).to(dtype)
    with torch.inference_mode():
        found = {case: zip(OUTPUTS, model(images.to(dtype))) for case, images in trial.cases.items()}
    return {(case, output): value.float() for case, each in found.items() for output, value in each}


def listing(folder: Path) -> dict[str, Any]:
    """{path: {"bytes", "sha256"}} of every file of an artefact."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}
