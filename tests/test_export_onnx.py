"""ONNX Runtime answers as PyTorch does, at fixed and at any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dinoreg
from dinoreg.export import onnx_graph
from dinoreg.export.formats import hub_arguments
from dinoreg.export.run import read_certificate
from dinoreg.models.vit import RegisterViT
from tests.exporting import ROPE, ask_stranger, assert_same_tokens, images, vit, write_run

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def answers(graph: Any, x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(value) for value in graph.run(None, {"images": x.numpy()})]


def assert_equal_at(model: RegisterViT, path: Path, *shapes: tuple[int, int, int]) -> None:
    graph = session(path)
    for batch, height, width in shapes:
        x = images(model, batch, height, width)
        assert_same_tokens(model, {"x": x}, {"x": answers(graph, x)}, 1e-4)


@pytest.mark.slow
def test_a_graph_of_any_size_equals_the_encoder_and_is_certified(tmp_path: Path) -> None:
    model = vit()
    run = write_run(tmp_path / "run", model)
    out = dinoreg.export(run, "onnx", tmp_path / "out")
    assert_equal_at(model, out / "model.onnx", (1, 40, 40), (3, 40, 40), (2, 24, 64), (1, 8, 16), (2, 136, 200))
    checks = read_certificate(out)["checks"]
    assert {check["dtype"] for check in checks} == {"float32", "float16"}
    assert {tuple(check["size"]) for check in checks} == {(40, 40), (16, 24)}
    half = answers(session(out / "model_float16.onnx"), images(model, 2, 24, 40).half())
    assert (half[0].float() - model(images(model, 2, 24, 40)).cls).abs().max() < 0.05
    graph = onnx.load(out / "model.onnx")
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [onnx_graph.OPSET]
    assert [output.name for output in graph.graph.output] == ["cls", "registers", "patches"]
    facts = json.loads((out / "model.json").read_text())
    assert facts["opset"] == onnx_graph.OPSET
    assert facts["image_size"] == "any"
    assert facts["preprocessing"]["mean"] == pytest.approx([0.1, 0.2, 0.3])
    asked = {"a": images(model, 2, 40, 40)}
    assert_same_tokens(model, asked, ask_stranger(out, "onnx", asked, tmp_path / "ask", 4), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
def test_rotary_positions_are_computed_in_the_graph(fixed: bool, tmp_path: Path) -> None:
    model = vit(**ROPE, image_size=(32, 40))
    onnx_graph.write_onnx(tmp_path, model, hub_arguments(model), fixed=fixed)
    sizes = ((32, 40),) if fixed else ((32, 40), (64, 64), (8, 16), (136, 200))
    assert_equal_at(model, tmp_path / "model.onnx", *((batch, *size) for batch in (1, 3) for size in sizes))


@pytest.mark.slow
def test_published_models_without_registers_resample_exactly_in_the_graph(tmp_path: Path) -> None:
    model = vit(
        num_registers=0, antialias=False, position_offset=0.1, ffn="swiglu", layerscale=None, image_size=(32, 40)
    )
    onnx_graph.write_onnx(tmp_path, model, hub_arguments(model), fixed=False)
    assert_equal_at(model, tmp_path / "model.onnx", (1, 32, 40), (2, 32, 64), (1, 64, 40), (2, 16, 24), (1, 72, 120))


@pytest.mark.slow
def test_a_graph_of_one_size_has_its_positions_in_it_and_takes_no_other(tmp_path: Path) -> None:
    model = vit()
    run = write_run(tmp_path / "run", model)
    out = dinoreg.export(run, "onnx", tmp_path / "out", size=(24, 56))
    assert_equal_at(model, out / "model.onnx", (1, 24, 56), (5, 24, 56))
    with pytest.raises(Exception, match=r"[Ii]nvalid"):
        answers(session(out / "model.onnx"), images(model, 1, 40, 40))
    graph = onnx.load(out / "model.onnx").graph
    assert not {node.op_type for node in graph.node} & {"Range", "Resize"}
    assert {(check["batch"], tuple(check["size"])) for check in read_certificate(out)["checks"]} == {
        (1, (24, 56)),
        (3, (24, 56)),
    }
    assert "24x56 pixels and no other" in (out / "README.md").read_text()


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_MAX_INLINE", 1000)
    model = vit(depth=1)
    onnx_graph.write_onnx(tmp_path, model, hub_arguments(model), fixed=True)
    assert (tmp_path / "model.onnx.data").stat().st_size > 4 * 48 * 144
    assert_equal_at(model, tmp_path / "model.onnx", (2, 40, 40))
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("model.onnx*"):
        path.rename(tmp_path / "moved" / path.name)
    assert_equal_at(model, tmp_path / "moved" / "model.onnx", (2, 40, 40))
    (tmp_path / "model.json").write_text(json.dumps({"files": onnx_graph.FILES}))
    onnx_graph.drop_float16(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text()) == {"files": {"float32": "model.onnx"}}
    assert not list(tmp_path.glob("model_float16*"))


@pytest.mark.slow
def test_a_model_that_overflows_in_float16_leaves_in_float32_alone(tmp_path: Path) -> None:
    model = vit(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias.fill_(1e5)  # beyond 65504
        model.blocks[0].mlp.fc2.bias[0] = 0
    run = write_run(tmp_path / "run", model)
    out = dinoreg.export(run, "onnx", tmp_path / "out", size=24)
    assert not list(out.glob("model_float16*"))
    assert "Float16 overflows" in (out / "README.md").read_text()
    found = read_certificate(out)
    assert "model_float16.onnx" not in found["artefact"]["files"]
    assert found["largest_relative_difference"]["float16"] is None
    assert np.isfinite(found["largest_relative_difference"]["float32"])
    assert json.loads((out / "model.json").read_text())["files"] == {"float32": "model.onnx"}
