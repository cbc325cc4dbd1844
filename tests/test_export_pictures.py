"""An export is certified from image files: its own processor, and the code of its card, see what dinoreg sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import vit, write_run
from PIL import Image
from safetensors.torch import load_file

import dinoreg
from dinoreg.commands.main import main
from dinoreg.export import certificate
from dinoreg.export.certificate import MAX_LEVELS, MIN_COSINE
from dinoreg.export.formats import FORMATS
from dinoreg.export.source import Source, write_pictures
from dinoreg.runtime.errors import RunError

SHAPES = ((48, 80), (80, 48), (17, 23), (40, 40), (31, 210), (333, 90), (40, 83))  # height, width
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the model, and of what is stated with it
    "rgb, no LayerScale": ({"layerscale": None}, {}),
    "wide crop": ({"image_size": (24, 40)}, {"image_size": [24, 40]}),
    "grey, other short side": ({"in_channels": 1}, {"short_side": 46, "interpolation": "bilinear"}),
    "grey of 16 bits": ({"in_channels": 1}, {"range": [0, 4095]}),
    "5 channels": ({"in_channels": 5}, {}),
    "16 bits": ({}, {"range": [100, 4095]}),
    "5 channels of floats": ({"in_channels": 5}, {"range": [-1000, 1000]}),
}


def draw(folder: Path) -> Path:
    folder.mkdir()
    for number, (height, width) in enumerate(SHAPES):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (3 + number) + y / 9), np.cos(y / (4 + number)), np.sin((x + y) / (5 + number))]
        Image.fromarray((127 + 100 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def card_prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`prepare` of the card, whose blocks of code are run one after the other in the folder."""
    scope: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    for block in re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL):
        exec(block, scope)
    return scope["prepare"]  # type: ignore[no-any-return]


def check_card(form: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, stated = KINDS[kind]
    run = write_run(tmp_path / "run", vit(**options), **stated)
    folder = dinoreg.export(run, form, tmp_path / "out")
    proof = json.loads((folder / "certificate.json").read_text())["pictures"]
    assert len(proof["checks"]) == 6
    assert min(check["cosine"] for check in proof["checks"]) >= MIN_COSINE
    transform, prepare = dinoreg.transform(run), card_prepare(folder, monkeypatch)
    std = torch.tensor(transform.std).view(-1, 1, 1)
    for path in write_pictures(tmp_path, Source(run)).values():
        theirs = torch.as_tensor(prepare(str(path)))
        assert theirs.dtype == torch.float32
        assert theirs.shape == (1, *transform(path).shape)
        assert ((theirs[0] - transform(path)) * std).abs().mean() * 255 <= MAX_LEVELS


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("meta", "5 channels of floats"),
        *(
            pytest.param(form, kind, marks=pytest.mark.slow)
            for form in FORMATS
            for kind in KINDS
            if form != "onnx" or "rgb" in kind or "floats" in kind  # the slowest; its card has the others' code
        ),
    ],
)
def test_every_cards_code_makes_what_dinoreg_makes(
    form: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (form, kind) == ("transformers", "wide crop"):
        pytest.skip("its position grid is square")
    check_card(form, kind, tmp_path, monkeypatch)


def tampered(form: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = FORMATS[form].write

    def write(folder: Path, source: Any) -> None:
        original(folder, source)
        change(folder)

    monkeypatch.setitem(FORMATS, form, replace(FORMATS[form], write=write))


def edit(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return change


PROCESSOR = "preprocessor_config.json"
TAMPERED = [
    ("meta", edit("model.json", "preprocessing", "short_side", value=46)),
    ("transformers", edit(PROCESSOR, "size", value={"shortest_edge": 46})),
    ("transformers", edit(PROCESSOR, "do_rescale", value=False)),
    ("transformers", edit(PROCESSOR, "size", value={"height": 40, "width": 40})),
    ("timm", edit("config.json", "pretrained_cfg", "crop_pct", value=0.9)),
    ("timm", edit("config.json", "pretrained_cfg", "std", value=[0.3] * 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "change"), TAMPERED)
def test_a_processor_that_does_something_else_is_not_certified(
    form: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", vit())
    tampered(form, change, monkeypatch)
    monkeypatch.setattr(certificate, "check_read_back", lambda *_: None)
    with pytest.raises(RunError, match="its own processor makes something else of the file"):
        dinoreg.export(run, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_not_read_back_is_not_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tampered("meta", edit("model.json", "architecture", "antialias", value=False), monkeypatch)
    with pytest.raises(RunError, match="not read back as it was written"):
        dinoreg.export(write_run(tmp_path / "run", vit()), "meta", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("short_side", [40, 46])
def test_embed_gives_the_features_of_the_exported_folder_with_its_own_processor(
    short_side: int, tmp_path: Path
) -> None:
    """Through the command line, as case 27 of the findings does."""
    transformers = pytest.importorskip("transformers")
    run, pictures = write_run(tmp_path / "run", vit(), short_side=short_side), draw(tmp_path / "pictures")
    place = [f"weights={run}", f"out={tmp_path / 'x'}"]
    assert main(["export", *place, "format=transformers"]) == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "x").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x")
    for weights in (run, tmp_path / "x"):
        out = tmp_path / f"{weights.name}.safetensors"
        options = [f"weights={weights}", f"out={out}", "device=cpu", "precision=fp32"]
        assert main(["embed", f"data={pictures}", *options]) == 0
        for number, row in enumerate(load_file(out)["features"]):
            image = Image.open(pictures / f"{number}.png")
            with torch.inference_mode():
                theirs = model(**processor(image, return_tensors="pt")).last_hidden_state[0, 0]
            assert torch.cosine_similarity(row, theirs, dim=0) >= MIN_COSINE
