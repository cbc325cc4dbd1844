"""The torch-only encoder of hubconf.py is the encoder, and its file stands alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

from dinoreg.export import hub_model
from dinoreg.export.formats import hub_arguments, hub_text
from dinoreg.export.hub_model import PlainViT
from dinoreg.models.vit import RegisterViT
from tests.exporting import ROPE, images, vit
from tests.hostile import Payload

KINDS = [
    {},
    {"num_registers": 0, "antialias": False, "position_offset": 0.1},
    {"ffn": "swiglu", "layerscale": None, "image_size": (24, 40), "in_channels": 2},
    {**ROPE, "rope_base": 40.0, "num_registers": 2},
    {"num_registers": 1, "register_neurons": [[0, 3], [1, 7], [0, 90]]},
    {"num_registers": 2, "register_neurons": [[1, 7]], "ffn": "swiglu"},
]


def plain(model: RegisterViT) -> PlainViT:
    other = PlainViT(**hub_arguments(model))
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("options", KINDS)
def test_it_computes_what_the_encoder_computes(options: dict) -> None:
    model = vit(**options)
    other = plain(model)
    for size in (model.image_size, (16, 48)):
        x = images(model, 2, *size)
        mask = torch.rand(2, size[0] * size[1] // 64) < 0.5
        found = other(x, masks=mask, is_training=True)
        names = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")
        for name, expected in zip(names, model(x, mask), strict=True):
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other(x), model(x).cls, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other(x, is_training=True)["x_prenorm"], model.prenorm(x), rtol=1e-5, atol=1e-5)


def test_intermediate_layers_have_the_published_meaning() -> None:
    model = vit(depth=3)
    other, x = plain(model), images(model, 2, 24, 40)
    for options in ({"n": 2}, {"n": [0, 2], "reshape": True}, {"n": 1, "return_class_token": True, "norm": False}):
        expected = model.get_intermediate_layers(x, **options)
        found = other.get_intermediate_layers(x, **options)
        assert len(found) == len(expected)
        for ours, theirs in zip(expected, found):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        other.get_intermediate_layers(x, n=[0, 7])
    with pytest.raises(ValueError, match="not a multiple of the patch size 8"):
        other(images(model, 1, 25, 40))


def test_the_file_needs_torch_and_nothing_else() -> None:
    text = hub_text(vit())
    tree = ast.parse(text)
    roots = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert roots - set(sys.stdlib_module_names) - {"__future__"} == {"torch"}
    filled = next(node for node in tree.body if isinstance(node, ast.AnnAssign))
    assert filled.value is not None
    assert ast.literal_eval(filled.value) == hub_arguments(vit())
    assert hub_model.ARCHITECTURE == {}


def test_weights_with_code_in_them_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"cls_token": Payload(tmp_path / "touched")}, tmp_path / "model.pth")
    monkeypatch.setattr(hub_model, "ARCHITECTURE", hub_arguments(vit()))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        hub_model.backbone(weights=tmp_path / "model.pth")
    assert not (tmp_path / "touched").exists()
