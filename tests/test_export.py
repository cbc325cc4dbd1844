"""Exports as a whole: what is written, what proves it, and that nothing is left behind when the proof fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dinoreg
from dinoreg.commands.main import main
from dinoreg.export import certificate, formats
from dinoreg.export.certificate import summary
from dinoreg.export.run import read_certificate, write_card
from dinoreg.export.source import Source
from dinoreg.runtime.errors import RunError, UserError
from tests.exporting import ROPE, ask_stranger, assert_same_tokens, card_code, images, vit, write_run
from tests.warm_interpreter import WarmInterpreter

GATED = {"ffn": "swiglu", "ffn_ratio": 6.0, "layerscale": None, "rope_base": 30.0}
PEERS = (
    "torch",
    "safetensors.torch",
    "timm",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
    "transformers.models.dinov3_vit.modeling_dinov3_vit",
)


def cases(model: object, *sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"{height}x{width}": images(model, 2, height, width) for height, width in sizes}  # type: ignore[arg-type]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.strip()


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder and its export for torch.hub. Read only."""
    folder = tmp_path_factory.mktemp("light")
    run = write_run(folder / "my_run", vit())
    return run, dinoreg.export(run, "meta", folder / "out")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[WarmInterpreter]:
    """Processes without dinoreg that need not import the peers again."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with WarmInterpreter(*PEERS) as started:
        yield started


@pytest.fixture
def peers(interpreter: WarmInterpreter, monkeypatch: pytest.MonkeyPatch) -> WarmInterpreter:
    """Certificates run their peers there. (`light` and the test of the libraries' own readers start new processes.)"""
    monkeypatch.setattr(certificate, "subprocess", SimpleNamespace(run=interpreter.run))
    return interpreter


# What strangers read


@pytest.mark.parametrize("options", [{}, {"ffn": "swiglu", "num_registers": 8}, ROPE, {**ROPE, **GATED}])
@pytest.mark.parametrize("format", ["timm", "transformers"])
@pytest.mark.slow
def test_a_stranger_reads_what_the_source_computes(
    format: str, options: dict[str, Any], tmp_path: Path, peers: WarmInterpreter
) -> None:
    model = vit(**options)
    run = write_run(tmp_path / "run", model)
    out = dinoreg.export(run, format=format, out=tmp_path / "out")
    asked = cases(model, (40, 40), (24, 64), (72, 72))
    answers = ask_stranger(out, format, asked, tmp_path / "ask", model.num_registers, run=peers.run)
    assert_same_tokens(model, asked, answers, 1e-5)
    again = dinoreg.load(out)
    asked = cases(model, (40, 40))
    assert_same_tokens(model, asked, {name: list(again(x)) for name, x in asked.items()}, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("options", [{"antialias": False, "position_offset": 0.1}, ROPE])
@pytest.mark.parametrize("format", ["meta", "safetensors"])
def test_the_light_formats_are_read_too(format: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = vit(image_size=(32, 40), layerscale=None, **options)
    run = write_run(tmp_path / "run", model, image_size=[32, 40])
    out = dinoreg.export(run, format, tmp_path / "out")
    asked = cases(model, (32, 40), (24, 64))
    answers = ask_stranger(out, format, asked, tmp_path / "ask", 4, block=format != "safetensors")
    assert_same_tokens(model, asked, answers, 1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ask", "out", "run"]
    # Shapes alone tell neither the heads nor the rectangular grid of this model, so a .pth is read as tensors.
    meta = format == "meta"
    state = torch.load(out / "model.pth", weights_only=True) if meta else dinoreg.load(out).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_without_registers_each_library_resamples_its_own_way_and_the_certificate_says_so(
    tmp_path: Path, peers: WarmInterpreter
) -> None:
    model = vit(num_registers=0, antialias=False, position_offset=0.1)
    run = write_run(tmp_path / "run", model)
    for format in ("timm", "transformers"):
        out = dinoreg.export(run, format, tmp_path / format)
        certificate = read_certificate(out)
        checks = certificate["checks"]
        free = [check for check in checks if not check["bounded"]]
        apart = max(check["relative_difference"] for check in free if check["dtype"] == "float32")
        assert f"{apart:.1e}" in summary(certificate)  # the line in the terminal tells it, too
        assert {tuple(check["size"]) for check in free} == {(16, 24)}
        assert max(check["relative_difference"] for check in free) > 1e-3
        assert len({tuple(check["size"]) for check in checks if check["bounded"]}) == 2
        assert "Export with `size=`" in (out / "README.md").read_text()
        # Made for another size, it is exact there.
        other = dinoreg.export(run, format, tmp_path / f"{format}_24", size=24)
        asked = cases(model, (24, 24))
        answers = ask_stranger(other, format, asked, tmp_path / "ask", 0, run=peers.run)
        assert_same_tokens(model, asked, answers, 1e-5)


@pytest.mark.slow
def test_timm_and_transformers_read_their_own_formats_without_our_code(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    model = vit(in_channels=4)
    run = write_run(tmp_path / "run", model)
    folder = dinoreg.export(run, "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(model, 1, 40, 40)
    torch.testing.assert_close(theirs.forward_features(x)[:, 0], model(x).cls, rtol=0, atol=1e-5)
    data = timm.data.resolve_model_data_config(theirs)
    assert data["mean"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    folder = dinoreg.export(run, "transformers", tmp_path / "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert processor.image_std == pytest.approx([0.2, 0.21, 0.22, 0.23])
    assert processor.crop_size["height"] == 40
    folder = dinoreg.export(run, "meta", tmp_path / "meta")
    known = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=40, patch_size=8, in_chans=4, embed_dim=48, depth=2, num_heads=3,
        num_classes=0,
    )  # fmt: skip
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = torch.load(folder / "model.pth", weights_only=True)
    known.load_state_dict(checkpoint_filter_fn(state, known))  # timm takes it for a file of the hub
    torch.testing.assert_close(known.eval().forward_features(x)[:, 0], model(x).cls, rtol=0, atol=1e-5)


# The certificate


def test_the_certificate_holds_two_sizes_two_dtypes_and_every_output(light: tuple[Path, Path]) -> None:
    out = light[1]
    found = read_certificate(out)
    kinds = {(tuple(check["size"]), check["dtype"], check["output"]) for check in found["checks"]}
    assert kinds == {
        (size, dtype, output)
        for size in ((40, 40), (16, 24))
        for dtype in ("float32", "bfloat16")
        for output in ("cls", "registers", "patches")
    }
    assert found["passed"]
    assert all(check["passed"] for check in found["checks"])
    assert 0 <= found["largest_relative_difference"]["float32"] <= found["bounds"]["float32"] == 1e-5
    assert found["peer"]["dinoreg_importable"] is False
    assert found["source"]["step"] == 20
    for name, facts in found["artefact"]["files"].items():
        assert (out / name).stat().st_size == facts["bytes"]
    assert "/home" not in (out / "certificate.json").read_text()


def break_cls(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moved = state["cls_token"].clone()
    moved[..., 0] += 1e-3  # one channel: a shift of all of them would vanish in the norms
    return {**state, "cls_token": moved}


def break_shape(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key != "norm.bias"}


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(("broken", "said"), [(break_cls, "differs from the source"), (break_shape, "could not load")])
def test_a_broken_converter_fails_closed(
    broken: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", vit())
    monkeypatch.setattr(formats, "to_meta", broken)
    # Parents of `out` that were made for it go as well.
    assert main(["export", f"weights={run}", "format=meta", f"out={tmp_path / 'deep' / 'er' / 'out'}"]) == 1
    assert said in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(("format", "name"), [("timm", "to_timm"), ("transformers", "to_transformers")])
def test_a_swapped_pair_of_norms_fails_closed(
    format: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", vit())
    right = getattr(formats, name)

    def swapped(state: dict[str, torch.Tensor], *rest: object) -> dict[str, torch.Tensor]:
        names = {"blocks.0.norm1.weight": "blocks.0.norm2.weight", "blocks.0.norm2.weight": "blocks.0.norm1.weight"}
        return right({names.get(key, key): value for key, value in state.items()}, *rest)

    monkeypatch.setattr(formats, name, swapped)
    with pytest.raises(RunError, match=f"format={format}: {format} differs from the source"):
        dinoreg.export(run, format, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
def test_weights_that_are_no_numbers_are_not_certified(tmp_path: Path) -> None:
    model = vit()
    with torch.no_grad():
        model.norm.bias[0] = float("nan")
    run = write_run(tmp_path / "run", model)
    with pytest.raises(UserError, match=r"norm\.bias is not finite"):
        dinoreg.export(run, "meta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_once_the_peer_has_begun_dinoreg_cannot_be_imported() -> None:
    code = "import dinoreg.export.peer as peer; peer.block_dinoreg(); import dinoreg"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 1
    assert "import of dinoreg halted" in done.stderr


def test_the_second_size_differs_from_the_first_and_divides() -> None:
    for grid in ((1, 1), (2, 3), (3, 2), (16, 16), (37, 37), (37, 14)):
        model = vit(image_size=(grid[0] * 8, grid[1] * 8))
        for square in (False, True):
            height, width = certificate.other_size(model, square)
            assert (height // 8, width // 8) != grid
            assert height % 8 == width % 8 == 0
            assert not square or height == width


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "tim"}, "did you mean timm"),
        ({"format": "keras"}, "expected one of timm, transformers, meta, safetensors, onnx"),
        ({"weights": "nowhere"}, "'nowhere': no such file or run folder"),
        ({"size": "45"}, "45, expected a multiple of the patch size 8, as 40 or 48"),
        ({"size": "0"}, "not a size"),
        ({"size": "big"}, "size=big"),
        ({"sise": "40"}, "unknown key (command line)"),
        ({"weights": None}, "weights= is missing"),
        ({"format": None}, "format= is missing"),
        ({"out": None}, "out= is missing"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(
    change: dict[str, str | None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", vit())
    given = {"weights": str(run), "format": "meta", "out": str(tmp_path / "out"), **change}
    assert main(["export", *(f"{key}={value}" for key, value in given.items() if value is not None)]) == 2
    assert said in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
def test_out_must_be_new_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", vit())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, said in (("full", "not empty"), ("file", "is a file, expected a folder")):
        assert main(["export", f"weights={run}", "format=meta", f"out={tmp_path / out}"]) == 2
        assert said in one_line(capsys)
    assert (tmp_path / "full" / "note.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(["export", f"weights={run}", "format=meta", f"out={tmp_path / 'empty'}"]) == 0
    assert "torch.hub (PyTorch" in capsys.readouterr().out
    assert (tmp_path / "empty" / "hubconf.py").is_file()


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", vit())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'dinoreg\[export\]'"):
        dinoreg.export(run, "onnx", tmp_path / "out")


def test_what_transformers_cannot_say_is_refused_in_words(tmp_path: Path) -> None:
    wide = write_run(tmp_path / "wide", vit(image_size=(32, 40)), image_size=[32, 40])
    with pytest.raises(UserError, match="position grid is square, this model's is 4x5; export with size=32"):
        dinoreg.export(wide, "transformers", tmp_path / "out")
    odd = write_run(tmp_path / "odd", vit(ffn_ratio=2.5))
    with pytest.raises(UserError, match="whole multiple of the model's; this one is 120 over 48"):
        dinoreg.export(odd, "transformers", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "wide"]


def test_a_gated_width_has_a_whole_ratio_in_transformers_and_the_right_one_in_timm() -> None:
    for dim, ratio in ((48, 4), (96, 4), (1536, 4), (64, 2)):
        model = vit(dim=dim, heads=2, depth=1, ffn="swiglu", ffn_ratio=ratio)
        hidden = model.state_dict()["blocks.0.mlp.w3.weight"].shape[1]
        assert formats._transformers_ratio(model) == ratio
        assert int(dim * formats._timm_ratio(dim, 2 * hidden)) == 2 * hidden
    assert all(int(dim * formats._timm_ratio(dim, h)) == h for dim in (48, 96, 384, 1000) for h in range(1, 2000, 7))


# The call, and the card


def test_export_stays_callable_whatever_is_imported_from_its_package() -> None:
    import importlib

    importlib.import_module("dinoreg.export.run")
    assert callable(dinoreg.export)
    importlib.reload(importlib.import_module("dinoreg.export"))
    assert callable(dinoreg.export)
    assert "export" in dinoreg.__all__


def test_the_card_tells_data_steps_results_statistics_and_loading_in_four_lines(
    light: tuple[Path, Path], tmp_path: Path
) -> None:
    run, out = light
    text = (out / "README.md").read_text()
    for told in (
        "| data | photos |", "| steps | 20 of 30 |", "| images seen | 120 |", "| learning rate | 0.002 |",
        "| pets | accuracy, linear | 87.4 % | 86.1 % to 88.8 % | 3,669 | random init 11.1 % |",
        "In-run probe at step 20: knn\\_top1: 25.0 %.", "| mean | 0.1, 0.2, 0.3 |",
        "my\\_run/teacher/step\\_0000020.safetensors",
        "Not stated yet", "| 16x24 | bfloat16 |",
    ):  # fmt: skip
        assert told in text, told
    assert "secret" not in text
    assert card_code(out).count("\n") == 3
    for name in formats.FORMATS:
        card(run, out, tmp_path, name)
        assert len(card_code(tmp_path).splitlines()) <= 4, name


def card(weights: Path, exported: Path, folder: Path, name: str = "meta") -> str:
    """The card of `weights`, with the certificate of another export."""
    write_card(folder, formats.FORMATS[name], Source(weights), read_certificate(exported))
    return (folder / "README.md").read_text()


def test_a_card_shows_hostile_text_as_text(light: tuple[Path, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", vit())
    record = {
        "dataset": "a|b <script>x</script>\n# Title",
        "metric": "[x](http://y)",
        "value": 0.5,
        "low": "a",
        "n_test": "b",
    }
    (run / "eval" / "0000020" / "bad.json").write_text(json.dumps(record))
    (run / "eval" / "0000020" / "torn.json").write_text('{"value": ')
    text = card(run, light[1], tmp_path)
    assert "<script>" not in text
    assert "\n# Title" not in text
    assert "](http" not in text
    assert "unknown to unknown" in text


def test_weights_without_a_run_say_what_is_not_known(light: tuple[Path, Path], tmp_path: Path) -> None:
    model = vit(in_channels=5, dim=64, heads=1)
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    text = card(tmp_path / "backbone.pth", light[1], tmp_path)
    assert "those above are assumed" in text
    assert "| mean | 0.5, 0.5, 0.5, 0.5, 0.5 |" in text
    assert "without the folder of the run" in text
    assert "No evaluation came with these weights." in text
