"""Test-time registers in exported files: what is written computes what the hooked model does, without its hooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planted import BLOCK, UNIT, patchy_images, planted_vit, save, write_images

import dinoreg
from dinoreg.commands.main import main
from dinoreg.evaluation.backbones.encoder import wrap
from dinoreg.evaluation.backbones.open import open_native
from dinoreg.export import certificate, formats
from dinoreg.export.run import read_certificate
from dinoreg.export.source import Source
from dinoreg.models.vit import RegisterViT
from dinoreg.registers.outliers import find
from dinoreg.registers.test_time import RegisterNeuron, with_test_time_register
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.visualize.norms import token_norms
from dinoreg.weights.load import load_into
from tests.exporting import ask_stranger, assert_same_tokens
from tests.warm_interpreter import WarmInterpreter

HOOKED = [RegisterNeuron(BLOCK, UNIT, 1.0)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with planted.safetensors, clean.safetensors, and images. Read only."""
    folder = tmp_path_factory.mktemp("planted")
    save(planted_vit(), folder / "planted.safetensors")
    save(planted_vit(norm=0), folder / "clean.safetensors")
    write_images(folder / "images")
    return folder


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[WarmInterpreter]:
    with WarmInterpreter("torch", "safetensors.torch") as started:
        monkeypatch.setattr(certificate, "subprocess", SimpleNamespace(run=started.run))
        yield started


def described(model: RegisterViT, folder: Path) -> Path:
    """Our own file of a model with a test-time register, as the export writes it, without a certificate."""
    save(model, folder / "source" / "model.safetensors")
    (folder / "out").mkdir()
    formats.write_described(folder / "out", Source(folder / "source"))
    return folder / "out"


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_file_of_ours_is_loaded_with_its_neurons_and_shows_no_outliers(ffn: str, tmp_path: Path) -> None:
    hooked = with_test_time_register(planted_vit(ffn=ffn), HOOKED)
    again = dinoreg.load(described(hooked, tmp_path), image_size=96)
    assert again.register_neurons == [[BLOCK, UNIT]]
    images = wrap(again).prepare(patchy_images(6)[0])
    for ours, theirs in zip(hooked(images), again(images), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert find(token_norms(planted_vit(ffn=ffn), images).patches).outliers.kind == "group"
    assert find(token_norms(again, images).patches).outliers.kind == "none"


def test_features_of_other_neurons_have_another_identity() -> None:
    models = [with_test_time_register(planted_vit(), [RegisterNeuron(BLOCK, unit, 1.0)]) for unit in (3, UNIT)]
    assert len({wrap(model, "same").identity for model in models}) == 2


@pytest.mark.parametrize("neurons", [7, [7], [[1]], [[1, 500]], [[4, 0]], [[1, True]], [[-1, 0]], "ab"])
def test_neurons_that_the_tensors_do_not_have_are_refused(neurons: object, tmp_path: Path) -> None:
    out = described(with_test_time_register(planted_vit(), HOOKED), tmp_path)
    stated = json.loads((out / "model.json").read_text())
    stated["architecture"]["register_neurons"] = neurons
    (out / "model.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"register_neurons=.* pairs of a block and a unit"):
        dinoreg.load(out)


def test_a_test_time_register_is_not_trained_on(tmp_path: Path) -> None:
    out = described(with_test_time_register(planted_vit(), HOOKED), tmp_path)
    with pytest.raises(UserError, match=r"register_neurons is \[\[1, 17\]\], the model's is \[\]; .* are not trained"):
        load_into(planted_vit(registers=1), out)


@pytest.mark.parametrize(
    ("weights", "format", "given", "said"),
    [
        ("planted", "timm", {}, "cannot have test-time registers; meta, safetensors, onnx can"),
        ("planted", "transformers", {}, "cannot have test-time registers"),
        ("clean", "meta", {}, "no outlier tokens, of 1,536 patches the largest norm is 1."),
        ("planted", "meta", {"images": None}, "registers=test_time images=None: expected"),
        ("planted", "meta", {"registers": None}, "expected test_time and a folder, or neither"),
        ("planted", "meta", {"registers": "trained"}, "expected test_time and a folder, or neither"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_words(
    weights: str, format: str, given: dict, said: str, planted: Path, tmp_path: Path
) -> None:
    options = {"registers": "test_time", "images": str(planted / "images")} | given
    with pytest.raises(UserError, match=said):
        dinoreg.export(planted / f"{weights}.safetensors", format, tmp_path / "exports" / "out", **options)
    assert not (tmp_path / "exports").exists()


def test_registers_are_not_added_to_registers_nor_lost_in_another_format(planted: Path, tmp_path: Path) -> None:
    save(planted_vit(registers=2), tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="has 2 registers already"):
        dinoreg.export(
            tmp_path / "two.safetensors", "meta", tmp_path / "out", registers="test_time", images=planted / "images"
        )
    out = described(with_test_time_register(planted_vit(), HOOKED), tmp_path)
    with pytest.raises(UserError, match="cannot have test-time registers"):
        dinoreg.export(out, "timm", tmp_path / "timm")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["meta", "safetensors", "onnx"])
def test_strangers_read_what_the_hooked_model_computes(
    format: str, planted: Path, tmp_path: Path, peers: WarmInterpreter, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [f"weights={planted / 'planted.safetensors'}", "registers=test_time", f"images={planted / 'images'}"]
    assert main(["export", *words, f"format={format}", f"out={out}"]) == 0
    assert "agrees in" in capsys.readouterr().out
    hooked = with_test_time_register(planted_vit(), HOOKED)
    asked = {"flat": wrap(hooked).prepare(patchy_images(3)[0]), "noise": torch.randn(2, 3, 32, 48)}
    answers = ask_stranger(out, format, asked, tmp_path / "ask", 1, block=format != "safetensors", run=peers.run)
    assert_same_tokens(hooked, asked, answers, 1e-4 if format == "onnx" else 1e-5)
    said = "In 24 images (images) 14.062% of 1,536 patches were outliers, 0.000% are left"
    assert read_certificate(out)["source"]["test_time"] == said
    assert "in an image goes of 1\nhidden unit," in (card := (out / "README.md").read_text())
    assert "1,536 patches" in card
    if format != "onnx":
        assert open_native(str(out), "cpu").model.register_neurons == [[BLOCK, UNIT]]
    if format == "safetensors":  # and on from there
        assert read_certificate(dinoreg.export(out, "meta", tmp_path / "again"))["source"]["test_time"] == said


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("format", ["meta", "onnx"])
def test_a_file_without_its_neurons_is_not_certified(
    format: str, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = formats.hub_arguments
    monkeypatch.setattr(formats, "hub_arguments", lambda model: right(model) | {"register_neurons": []})
    with pytest.raises(RunError, match="differs from the source"):
        dinoreg.export(
            planted / "planted.safetensors",
            format,
            tmp_path / "exports" / "out",
            registers="test_time",
            images=planted / "images",
        )
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
def test_neurons_that_leave_the_outliers_are_not_exported(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.registers.outliers.onset", lambda *_: 0)  # too early a block
    with pytest.raises(RunError, match=r"1,536 patches were outliers, 1\d\.\d+% are left, with the best of up to 100"):
        dinoreg.export(
            planted / "planted.safetensors",
            "meta",
            tmp_path / "exports" / "out",
            registers="test_time",
            images=planted / "images",
        )
    assert not (tmp_path / "exports").exists()
