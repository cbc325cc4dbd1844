"""The verbs as functions: their values are what the command line writes, and a notebook shows them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted import planted_vit, save, write_images
from small_runs import tiny_model, write_run
from test_embed import read_features
from training import TINY

import dinoreg
from dinoreg.commands.main import main
from dinoreg.runtime.errors import UserError

HERE = Path(__file__).resolve().parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny_model(image_size=32))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Nine pictures in the folders of three classes, and one that cannot be read."""
    draw = np.random.default_rng(0)
    for number in range(9):
        path = tmp_path / "labelled" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "labelled" / "a" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    return tmp_path / "labelled"


def read_page(shown: Any) -> str:
    """What a notebook shows of a result with a page, which is the page itself."""
    import html

    text = html.unescape(shown._repr_html_())
    assert shown.page.read_text() in text
    return text


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_embed_returns_what_the_command_writes(suffix: str, run: Path, classes: Path, tmp_path: Path) -> None:
    file = tmp_path / f"features{suffix}"
    assert main(["embed", str(classes), f"weights={run}", f"out={file}", "token=cls+mean", "precision=fp32"]) == 0
    features, names = read_features(file)
    found = dinoreg.embed(classes, run, token="cls+mean", precision="fp32")
    assert (found.features == features).all()
    assert found.paths == names
    assert found.labels is not None
    assert [found.class_names[label] for label in found.labels] == [Path(name).parent.name for name in names]
    assert list(found.skipped) == [str(classes / "a" / "torn.png")]
    assert repr(found) == "<features 9 x 24 of images; 3 classes, 1 skipped>"
    kept = tmp_path / f"kept{suffix}"
    again = dinoreg.embed([str(classes)], dinoreg.load(run), kept, token="cls+mean", precision="fp32")
    assert (again.features == features).all()
    assert again.labels is None  # of several sources
    assert (read_features(kept)[0] == features).all()
    with pytest.raises(UserError, match="overwrite=true"):
        dinoreg.embed(classes, run, kept)
    with pytest.raises(UserError, match=r"did you mean token\?"):
        dinoreg.embed(classes, run, tokens="cls")


def test_plan_returns_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: dict[str, Any] = {
        **TINY,
        "data": "scenes:count=40,size=32",
        "steps": 20,
        "gpus": 2,
        "gpu": "t4",
        "device": "auto",
    }
    given = [f"{key}={str(value).replace(' ', '')}" for key, value in keys.items()]
    assert main(["plan", "quickstart", *given, f"out={tmp_path / 'command.json'}"]) == 0
    printed = capsys.readouterr().out
    found = dinoreg.plan("quickstart", out=tmp_path / "function.json", **keys)
    written = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("command", "function")]
    assert written[0] == written[1] == found.as_dict()
    assert repr(found) == f"<plan of {found.job.config.model.name}: {found.verdict}>"
    shown = found._repr_html_()
    assert shown.startswith("<pre>")
    assert all(line.split()[0] in shown for line in printed.splitlines() if line.strip() and "plan:" not in line)
    with pytest.raises(UserError, match=r"did you mean batch_size\?"):
        dinoreg.plan("quickstart", batchsize=3)


def test_view_returns_the_pictures_that_the_command_writes(run: Path, classes: Path, tmp_path: Path) -> None:
    assert main(["view", "norms", str(classes), f"weights={run}", f"out={tmp_path / 'command'}"]) == 0
    found = dinoreg.view("norms", weights=run, images=classes, out=tmp_path / "function")
    assert found.page == tmp_path / "function" / "norms.html"
    for path in found.pictures:
        assert path.read_bytes() == (tmp_path / "command" / "norms" / path.name).read_bytes()
    assert found.record == json.loads((tmp_path / "command" / "norms" / "view.json").read_text())
    assert repr(found) == f"<View: {found.page}>"
    read_page(found)


def test_view_draws_the_crops_of_a_config(run: Path, tmp_path: Path) -> None:
    keys = {"data": "scenes:count=30,size=48", "seed": 3}
    given = [f"{key}={value}" for key, value in keys.items()]
    assert main(["view", "crops", str(run), *given, "num=2", f"out={tmp_path / 'command'}"]) == 0
    found = dinoreg.view("crops", config=run, num=2, out=tmp_path / "function", **keys)
    (path,) = found.pictures
    assert path.read_bytes() == (tmp_path / "command" / "crops" / path.name).read_bytes()
    with pytest.raises(UserError, match="config="):
        dinoreg.view("crops", data="scenes")
    with pytest.raises(UserError, match=r"did you mean norms\?"):
        dinoreg.view("norm", weights=run)


def test_registers_returns_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, images = save(planted_vit(), tmp_path / "planted.safetensors"), write_images(tmp_path / "images", 8)
    common = ["test_time=false", "size=64"]
    command = ["registers", str(images), f"weights={weights}", f"out={tmp_path / 'command'}", *common]
    assert main(command) == 0
    found = dinoreg.registers(weights, images, out=tmp_path / "function", test_time=False, size=64)
    written = json.loads((tmp_path / "command" / "registers" / "view.json").read_text())["models"]
    for record in (*written, found.measured[0].record):
        record.pop("seconds")
    assert json.loads(json.dumps([found.measured[0].record])) == written
    (said,) = found.verdicts.values()
    assert said.headline in capsys.readouterr().out
    assert repr(found) == f"<RegisterReport: {found.page}>"
    read_page(found)


NOTEBOOK = (
    "import dinoreg\nfrom training import TINY",
    "dinoreg.pretrain(None, **TINY, out='run')",
    "dinoreg.plan('small', data='scenes', probe=False)",
    "dinoreg.view('norms', weights='run', images='scenes:count=2,size=40', out='pictures')",
)


@pytest.mark.slow
def test_a_notebook_has_one_bar_and_one_display_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE.parent, HERE))))
    cells = [nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, trained, planned, viewed = book.cells
    shown = [output.data for output in trained.outputs if output.output_type == "display_data"]
    assert sum("application/vnd.jupyter.widget-view+json" in each for each in shown) == 1
    assert not any("step 4/8" in str(each) for each in shown)  # what is printed where there is no bar
    states = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    (bar,) = [state["state"]["outputs"] for state in states if state["model_name"] == "OutputModel"]
    assert "8/8" in str(bar[-1])
    for cell, start in ((planned, "<pre>"), (viewed, "<iframe ")):
        (result,) = [output.data for output in cell.outputs if "data" in output]
        assert result["text/html"].startswith(start)


def test_packages_that_are_functions_keep_both_meanings() -> None:
    code = """
import sys, dinoreg
called = [dinoreg.export, dinoreg.plan, dinoreg.registers]
assert all(map(callable, called))
assert "torch" not in sys.modules
import dinoreg.plan.devices, dinoreg.registers.page, dinoreg.export.formats
assert called == [dinoreg.export, dinoreg.plan, dinoreg.registers]
assert dinoreg.plan.devices.find_device("t4").kind == "cuda"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [*inspect.signature(dinoreg.registers).parameters] == ["weights", "images", "options"]
    export = "weights format out options"
    assert [*inspect.signature(dinoreg.export).parameters] == export.split()
    for name in dinoreg.__all__:
        assert getattr(dinoreg, name) is not None


@pytest.mark.parametrize("weights", ["RUN", "random:vitt8_reg4"])
def test_a_loaded_model_keeps_no_gradients_until_it_is_asked_to(weights: str, run: Path) -> None:
    model = dinoreg.load(run if weights == "RUN" else weights)
    images = torch.rand(2, 3, 32, 32)
    assert not model.training
    assert not model(images).cls.requires_grad
    with pytest.raises(UserError, match=r"Image: expected a tensor, as dinoreg.transform"):
        model(Image.new("RGB", (32, 32)))
    model.train().requires_grad_(True)
    model(images).cls.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
