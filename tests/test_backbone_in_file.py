"""The backbone in what training programs save: every form gives the plain state's tensors, bit for bit."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dinoreg.commands.main import main
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights.files import find_backbone
from dinoreg.weights.load import load, load_reported

State = dict[str, Tensor]


def network(seed: int) -> State:
    torch.manual_seed(seed)
    model = RegisterViT(image_size=28, patch_size=14, dim=64, depth=2, heads=1, num_registers=2)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


THIS, OTHER = network(0), network(1)
HEAD = {"dino_head.last_layer.weight": torch.ones(3, 2), "dino_loss.center": torch.ones(1, 3)}


def under(prefix: str, state: State = THIS) -> State:
    return {prefix + key: value for key, value in state.items()}


def wrapped(names: str, wrapper: str) -> Callable[[State], State]:
    """Put a wrapper behind every part of a name that the pattern `names` matches."""
    return lambda state: {re.sub(names, rf"\g<0>{wrapper}.", key): value for key, value in state.items()}


ONE_NETWORK: dict[str, Any] = {
    "compiled": under("_orig_mod."),
    "ddp and compiled": {"model": under("module._orig_mod.")},
    "compiled block by block": wrapped(r"^blocks\.\d+\.", "_orig_mod")(THIS),
    "compiled within a teacher": {"teacher": under("backbone.", wrapped(r"\.attn\.", "_orig_mod")(THIS)) | HEAD},
    "fsdp": under("_fsdp_wrapped_module.", wrapped(r"^blocks\.\d+\.", "_fsdp_wrapped_module")(THIS)),
    "checkpointed blocks": wrapped(r"^blocks\.\d+\.", "_checkpoint_wrapped_module")(THIS),
    "an average of torch": under("module.") | {"n_averaged": torch.tensor(3)},
    "lightning": {"state_dict": under("model.backbone.") | under("model.", HEAD), "epoch": 3, "loops": {"a": {"b": 1}}},
    "deep": {"state_dict": under("trainer.ssl_model.encoder.vit.")},
    "a student alone": {"student": under("backbone.")},
    "an optimizer beside": {"model": THIS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
    "the same network twice": under("net.") | under("compiled._orig_mod."),
}
SEVERAL: dict[str, Any] = {
    "dino": {"student": under("module.backbone.", OTHER), "teacher": under("backbone.") | HEAD, "epoch": 1},
    "consolidated": {
        "model": under("student.backbone.", OTHER) | under("teacher.backbone.") | under("teacher.", HEAD) | HEAD,
        "iteration": 5,
    },
    "lightning": {"state_dict": under("student.backbone.", OTHER) | under("teacher.backbone.")},
    "words": under("student_backbone.", OTHER) | under("teacher_backbone."),
    "timm": {"state_dict": OTHER, "state_dict_ema": THIS},
    "model and average": {"model": OTHER, "model_ema": THIS},
    "average first": {"ema": under("module."), "model": OTHER},
    "online": {"online": OTHER, "encoder": THIS},
}


def assert_this(found: State) -> None:
    assert found.keys() == THIS.keys()
    assert all(torch.equal(found[key], value) for key, value in THIS.items())


@pytest.mark.parametrize("form", [*ONE_NETWORK, *(f"several: {name}" for name in SEVERAL)])
def test_every_form_gives_the_bits_of_the_plain_state(tmp_path: Path, form: str) -> None:
    several = form.startswith("several: ")
    content = SEVERAL[form.removeprefix("several: ")] if several else ONE_NETWORK[form]
    found = find_backbone(content)
    assert_this(found.state)
    assert bool(found.others) == several
    torch.save(content, tmp_path / "file.pth")
    loaded = load_reported(tmp_path / "file.pth")
    assert_this(dict(loaded.model.state_dict()))
    assert (loaded.weights.where, loaded.weights.others) == (found.where, found.others)
    assert set(found.others) <= set(re.findall(r"'([^']+)'", str(loaded))) | {""}


def test_what_is_left_out_is_named() -> None:
    assert find_backbone(SEVERAL["dino"]).left_out == (*HEAD, "student", "epoch")
    found = find_backbone(SEVERAL["consolidated"])
    assert (found.where, found.others) == ("model.teacher.backbone", ("model.student.backbone",))
    assert {"dino_loss.center", "teacher.dino_loss.center", "student.backbone.cls_token", "iteration"} <= set(
        found.left_out
    )
    assert "teacher.backbone.cls_token" not in found.left_out


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"teacher": THIS, "model_ema": OTHER}, ["teacher", "model_ema"]),
        ({"model": THIS, "state_dict": OTHER}, ["model", "state_dict"]),
        (under("encoder_q.") | under("encoder_k.", OTHER), ["encoder_q", "encoder_k"]),
    ],
)
def test_networks_of_equal_standing_are_refused_by_name(content: Any, names: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        find_backbone(content)
    assert all(repr(name) in str(caught.value) for name in names)


def test_what_is_no_backbone_is_refused() -> None:
    for content in ([1], {}, {"model": {}}, {"fc.weight": torch.ones(2, 2)}, {"cls_token": "text"}):
        with pytest.raises(UserError):
            find_backbone(content)
    with pytest.raises(UserError, match=r"'norm.bias' is there twice"):
        find_backbone(under("backbone.") | {"backbone.module.norm.bias": torch.ones(1)})
    with pytest.raises(UserError, match=r"'norm.bias' has dtype int64"):
        find_backbone(THIS | {"norm.bias": torch.ones(64, dtype=torch.int64)})


def test_a_real_compiled_and_averaged_module_is_read(tmp_path: Path) -> None:
    model = RegisterViT(image_size=28, patch_size=14, dim=64, depth=2, heads=1, num_registers=2)
    model.load_state_dict(THIS)
    for block in model.blocks:
        block.compile()  # in place: changes no names
    trained = nn.ModuleDict({"backbone": torch.compile(model), "head": nn.Linear(2, 2)})
    torch.save(torch.optim.swa_utils.AveragedModel(trained).state_dict(), tmp_path / "swa.pth")
    assert_this(dict(load(tmp_path / "swa.pth").state_dict()))


def test_values_of_other_classes_beside_the_tensors_are_left_out_and_not_made(tmp_path: Path) -> None:
    beside = {
        "best": np.float64(0.5), "epoch": np.int64(3), "array": np.arange(3), "args": argparse.Namespace(lr=1e-3),
        "path": tmp_path, "counts": defaultdict(int, a=1),
    }  # fmt: skip
    for legacy in (True, False):
        path = tmp_path / f"{legacy}.pth"
        torch.save({"model": THIS, **beside}, path, _use_new_zipfile_serialization=not legacy)
        loaded = load_reported(path)
        assert_this(dict(loaded.model.state_dict()))
        assert set(beside) <= set(loaded.weights.left_out)


@pytest.mark.parametrize("form", [*ONE_NETWORK, *(f"several: {name}" for name in SEVERAL)])
def test_the_command_line_computes_with_the_network_that_is_meant_and_says_which_of_several(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = form.startswith("several: ")
    torch.save(SEVERAL[form.removeprefix("several: ")] if several else ONE_NETWORK[form], tmp_path / "file.pth")
    torch.save(THIS, tmp_path / "plain.pth")
    rows = []
    for name in ("file", "plain"):
        out = tmp_path / f"{name}.safetensors"
        command = ["embed", "data=scenes:count=3,size=28", f"weights={tmp_path}/{name}.pth", f"out={out}", "workers=0"]
        assert main([*command, "precision=fp32", "device=cpu"]) == 0
        rows.append(load_file(out)["features"])
        if name == "file":
            said = capsys.readouterr().err
            taken = find_backbone(torch.load(tmp_path / "file.pth", weights_only=True)).where
            assert (f"by file ({taken})" in said) == several
    assert rows[0].abs().max() > 0
    assert torch.equal(*rows)


@pytest.mark.parametrize("names", [("rope.freqs",), ("blocks.0.gamma_1",)])
def test_rotary_positions_that_are_not_dinov3s_are_refused_in_words(
    names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {key: value for key, value in THIS.items() if key != "pos_embed"}
    torch.save(
        {"teacher": {f"backbone.{key}": value for key, value in (state | dict.fromkeys(names, torch.ones(2))).items()}},
        tmp_path / "three.pth",
    )
    assert (
        main(["embed", "data=scenes:count=3,size=28", f"weights={tmp_path}/three.pth", f"out={tmp_path}/x.safetensors"])
        == 2
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "DINOv3" in said
    assert not (tmp_path / "x.safetensors").exists()
