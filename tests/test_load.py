"""Models by name, and weights from run folders and files that may be anything."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoreg.evaluation.backbones.open import open_encoder
from dinoreg.export.source import Source
from dinoreg.models.heads import PrototypeHead
from dinoreg.models.registry import build, parse_name
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights.architecture import Stated, infer_architecture
from dinoreg.weights.load import load, load_into
from dinoreg.weights.resolve import Weights, find_weights
from tests.hostile import Payload


def tiny(seed: int = 0, **options: Any) -> RegisterViT:
    torch.manual_seed(seed)
    arguments = {"image_size": 12, "patch_size": 4, "dim": 24, "depth": 2, "heads": 2, "num_registers": 3}
    model = RegisterViT(**(arguments | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def write_teacher(run: Path, model: RegisterViT, step: int) -> Path:
    """A teacher file and its JSON, as the checkpoint writer leaves them."""
    (run / "teacher").mkdir(parents=True, exist_ok=True)
    path = run / "teacher" / f"step_{step:07d}.safetensors"
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    state |= {f"dino_head.{k}": v for k, v in PrototypeHead(model.dim, 7, 9, 4).state_dict().items()}
    save_file(state, path)
    description = {
        "format": "dinoreg-teacher",
        "version": 1,
        "step": step,
        "architecture": model.architecture(),
        "preprocessing": {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 12},
        "config_hash": "0",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(description))
    return path


def point(run: Path, **pointers: str) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    for name, target in pointers.items():
        (run / "checkpoints" / name).write_text(target + "\n")


def assert_same_weights(model: RegisterViT, expected: RegisterViT) -> None:
    assert model.architecture() == expected.architecture()
    assert not model.training
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    x = torch.randn(2, expected.in_channels, 12, 16)
    torch.testing.assert_close(model(x), expected(x))


# ------------------------------------------------------------------ names


def test_a_native_name_says_size_patch_and_registers() -> None:
    assert parse_name("vitb14_reg8") == {
        "dim": 768,
        "depth": 12,
        "heads": 12,
        "ffn_ratio": 4.0,
        "patch_size": 14,
        "num_registers": 8,
        "image_size": 224,
    }
    assert parse_name("vitt8_reg0")["dim"] == 192
    assert parse_name("vitg16_reg4")["ffn"] == "swiglu"


@pytest.mark.parametrize(
    "aliases",
    [
        ["dinov2_vits14_reg", "dinov2_vits14_reg4", "vit_small_patch14_reg4_dinov2",
         "vit_small_patch14_reg4_dinov2.lvd142m", "facebook/dinov2-with-registers-small"],
        ["dinov2_vitg14", "vit_giant_patch14_dinov2", "facebook/dinov2-giant", "dinov2-giant"],
    ],
)  # fmt: skip
def test_published_names_mean_the_same_model(aliases: list[str]) -> None:
    first, *others = [parse_name(alias) for alias in aliases]
    assert all(other == first for other in others)
    assert first["image_size"] == 518
    registers = first["num_registers"]
    resampling = (first["antialias"], first["position_offset"])
    assert (registers, resampling) in [(4, (True, 0.0)), (0, (False, 0.1))]


@pytest.mark.parametrize("name", ["vits14_reg", "vitx14_reg4", "vits14_reg4 extra", "resnet50", "../vits14_reg4", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not known; expected vit"):
        parse_name(name)


def test_a_misspelt_name_or_option_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'vits14_reg4'"):
        parse_name("vits14reg4")
    with pytest.raises(UserError, match="patch size 15 is not one of"):
        parse_name("vits15_reg4")
    with pytest.raises(UserError, match="'drop_pth' is not known; did you mean 'drop_path'"):
        build("vitt16_reg4", drop_pth=0.1)


@pytest.mark.slow
def test_every_name_builds_and_options_override_it() -> None:
    with torch.device("meta"):
        for size in "tsblg":
            for patch in (8, 14, 16):
                assert build(f"vit{size}{patch}_reg2").num_registers == 2
        model = build("vits16_reg4", image_size=(32, 48), depth=1, drop_path=0.2, in_channels=5)
    assert (model.grid, model.depth, model.in_channels) == ((2, 3), 1, 5)


def test_random_weights_have_to_be_asked_for() -> None:
    model = load("random:vitt16_reg2", depth=1, image_size=32)
    assert (model.dim, model.num_registers, model.training) == (192, 2, False)
    with pytest.raises(UserError, match="'runs/nowhere': no such file or run folder"):
        load("runs/nowhere")
    with pytest.raises(UserError, match="did you mean 'vits14_reg4'"):
        load("random:vits14reg4")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vits14_reg4", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
        ("dinov2_vitb14_reg", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
        ("dinov2_vitg14", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth"),
        ("facebook/dinov2-small", "/dinov2_vits14/dinov2_vits14_pretrain.pth "),
        ("dinov2-with-registers-large", "/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth "),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth "),
        ("timm/vit_giant_patch14_dinov2", "/dinov2_vitg14/dinov2_vitg14_pretrain.pth "),
    ],
)
def test_a_published_name_is_refused_with_the_place_of_its_weights(name: str, place: str) -> None:
    for use in (load, Weights, Source, lambda name: open_encoder(name, "cpu", torch.float32)):
        with pytest.raises(UserError) as caught:
            use(name)
        assert place in f"{caught.value} "
        assert f"random:{name.removeprefix('timm/')} " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_under_which_nothing_is_published_is_refused_without_a_place() -> None:
    for name in ("vits16_reg4", "vitt14_reg4", "vits14_reg3"):
        with pytest.raises(UserError) as caught:
            load(name)
        assert "http" not in str(caught.value)
        assert f"random:{name} " in str(caught.value)


# ------------------------------------------------------------------ run folders and teacher files


def test_a_run_folder_means_its_last_state_and_the_best_only_by_name(tmp_path: Path) -> None:
    models = {step: tiny(step) for step in (5, 10, 15)}
    for step, model in models.items():
        write_teacher(tmp_path, model, step)
    assert_same_weights(load(tmp_path), models[15])  # the newest, without a pointer
    point(tmp_path, last="step_0000010")
    assert_same_weights(load(str(tmp_path)), models[10])
    for missing in ("best", "checkpoints/best"):
        with pytest.raises(UserError, match="this run has no best step: no probe was better"):
            load(tmp_path / missing)
    point(tmp_path, best="step_0000005")
    assert_same_weights(load(tmp_path), models[10])
    for name in ("best", "checkpoints/best", "teacher/step_0000005.safetensors"):
        assert_same_weights(load(tmp_path / name), models[5])
    for name in ("last", "checkpoints/last"):
        assert_same_weights(load(tmp_path / name), models[10])
    for target in ("step_0000099", "../../elsewhere/step_0000005"):  # its file is gone; out of the folder
        point(tmp_path, best=target)
        with pytest.raises(UserError, match="the teacher file of this checkpoint is not in"):
            load(tmp_path / "best")
    point(tmp_path, last="step_0000099")
    assert_same_weights(load(tmp_path), models[15])


def test_the_teachers_json_says_what_shapes_cannot(tmp_path: Path) -> None:
    model = tiny(image_size=(8, 20), heads=3, in_channels=2, ffn="swiglu", ffn_ratio=3.0, antialias=False)
    path = write_teacher(tmp_path, model, 1)
    assert_same_weights(load(path), model)
    assert Weights(path).metadata["preprocessing"]["image_size"] == 12
    assert sorted(Weights(path).left_out)[0] == "dino_head.last_layer.weight_g"


def test_an_altered_or_torn_teacher_is_refused(tmp_path: Path) -> None:
    path = write_teacher(tmp_path, tiny(), 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"sha256 is not the one in step_0000001\.json"):
        load(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"dim": 32}}, "metadata says dim=32, the tensors say 24"),
        ({"architecture": {"heads": 5}}, "metadata says heads=5, which does not divide the width 24"),
        (
            {"architecture": {"heads": 2, "image_size": [10**9, 4]}},
            "image_size=[1000000000, 4], the tensors have 9 patch positions",
        ),
        ({"architecture": {"heads": 2, "depth": 10**9}}, "metadata says depth=1000000000, the tensors say 2"),
        ({"version": 2}, "version 2; this dinoreg reads version 1"),
        ({"format": "other"}, "expected a JSON object with format 'dinoreg-teacher'"),
    ],
)
def test_a_json_that_contradicts_the_tensors_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_teacher(tmp_path, tiny(), 1)
    side = path.with_suffix(".json")
    side.write_text(json.dumps(json.loads(side.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(message)):
        load(path)


def test_a_broken_json_and_a_folder_without_teachers_are_refused(tmp_path: Path) -> None:
    path = write_teacher(tmp_path, tiny(), 1)
    path.with_suffix(".json").write_text('{"format": ')
    with pytest.raises(UserError, match=r"step_0000001\.json: not JSON"):
        load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no teacher/step_"):
        load(tmp_path / "empty")


# ------------------------------------------------------------------ Meta's files


def published(**options: Any) -> RegisterViT:
    return tiny(dim=128, heads=2, image_size=12, layerscale=1.0, **options)


def chunked(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    pattern = re.compile(r"^blocks\.(\d+)")
    return {prefix + pattern.sub(r"blocks.0.\1", key): value for key, value in state.items()}


@pytest.mark.parametrize("registers", [0, 4])
def test_a_flat_file_tells_its_architecture_by_shapes(tmp_path: Path, registers: int) -> None:
    options = {"antialias": True, "position_offset": 0.0} if registers else {"antialias": False, "position_offset": 0.1}
    model = published(num_registers=registers, ffn="swiglu", in_channels=5, **options)
    torch.save(model.state_dict(), tmp_path / "flat.pth")
    assert_same_weights(load(tmp_path / "flat.pth"), model)
    save_file(model.state_dict(), tmp_path / "flat.safetensors")
    assert_same_weights(load(tmp_path / "flat.safetensors"), model)


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "module.backbone.", "backbone.module."])
def test_a_training_file_is_freed_of_wrappers_prefixes_and_chunks(tmp_path: Path, prefix: str) -> None:
    model = published()
    state = chunked(dict(model.state_dict()), prefix)
    state["dino_head.last_layer.weight_g"] = torch.ones(3, 1)
    torch.save({"teacher": state, "iteration": 5}, tmp_path / "teacher.pth")
    assert_same_weights(load(tmp_path / "teacher.pth"), model)
    assert Weights(tmp_path / "teacher.pth").left_out == ("dino_head.last_layer.weight_g", "iteration")


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    model = published()
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "half.pth")
    loaded = load(tmp_path / "half.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.norm.weight, model.norm.weight.half().float())


def test_a_missing_mask_token_is_zero_and_anything_else_missing_is_an_error(tmp_path: Path) -> None:
    model = published()
    state = dict(model.state_dict())
    del state["mask_token"]
    torch.save(state, tmp_path / "a.pth")
    assert torch.equal(load(tmp_path / "a.pth").mask_token, torch.zeros(1, 128))
    del state["blocks.1.attn.proj.bias"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"1 tensors are missing, the first is 'blocks.1.attn.proj.bias'"):
        load(tmp_path / "b.pth")
    torch.save(dict(model.state_dict()) | {"extra": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="1 unknown tensors, the first is 'extra'"):
        load(tmp_path / "c.pth")
    torch.save(dict(model.state_dict()) | {"norm.bias": torch.ones(5)}, tmp_path / "d.pth")
    with pytest.raises(UserError, match=r"'norm.bias' has shape \(5,\), expected \(128,\)"):
        load(tmp_path / "d.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"teacher": {"cls_token": Payload(target)}}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(target)))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(UserError, match="nothing in it was executed") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not target.exists()


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    model = published()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    contents = {
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"hello",
        "empty.pth": b"",
        "text.safetensors": b"hi",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    torch.save({"cls_token": torch.ones(1, 1, 8, dtype=torch.int64)}, tmp_path / "integers.pth")
    torch.save({"cls_token": torch.ones(8)}, tmp_path / "flat.pth")
    torch.save({"fc.weight": torch.ones(8, 8)}, tmp_path / "other.pth")
    for path in sorted(tmp_path.iterdir()):
        if path.name != "whole.pth":
            with pytest.raises(UserError) as caught:
                load(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_shapes_that_leave_doubt_are_refused() -> None:
    state = dict(tiny().state_dict())
    with pytest.raises(UserError, match="the width 24 does not tell the number of heads"):
        infer_architecture(state)
    oblong = dict(published().state_dict()) | {"pos_embed": torch.zeros(1, 1 + 12, 128)}
    with pytest.raises(UserError, match="12 patch positions are not a square grid's"):
        infer_architecture(oblong)
    assert infer_architecture(oblong, Stated({"image_size": [12, 16]}))["image_size"] == [12, 16]
    gap = {k: v for k, v in published().state_dict().items() if not k.startswith("blocks.0.")}
    with pytest.raises(UserError, match="are not numbered"):
        infer_architecture(gap)
    with pytest.raises(
        UserError, match="no 'cls_token'; expected the state dict of a ViT of Meta, timm or transformers"
    ):
        infer_architecture({"reg_token": torch.ones(1)})


# ------------------------------------------------------------------ starting from weights


def test_starting_from_weights_copies_them_and_reports(tmp_path: Path) -> None:
    source, model = tiny(1), tiny(2, drop_path=0.3)
    write_teacher(tmp_path, source, 1)
    report = load_into(model, tmp_path)
    assert model.blocks[0].drop_path == 0.3
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    assert set(report.loaded) == set(model.state_dict())
    assert (report.reshaped, report.fresh) == ("", ())
    assert len(report.weights.left_out) == 8
    assert "tensors loaded from" in str(report)
    assert "left out 8 (dino_head)" in str(report)


def test_starting_at_another_image_size_resamples_the_positions_and_says_so(tmp_path: Path) -> None:
    source, model = tiny(1), tiny(2, image_size=(20, 16))
    path = write_teacher(tmp_path, source, 1)
    report = load_into(model, path)
    assert report.reshaped == "pos_embed: 3x3 -> 5x4"
    assert "pos_embed" not in report.loaded
    x = torch.randn(2, 3, 20, 16)
    torch.testing.assert_close(model(x), source(x))  # the same function of images of the new size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 32, "heads": 4, "depth": 3}, "dim is 24, the model's is 32"),
        ({"depth": 3}, "depth is 2, the model's is 3"),
        ({"patch_size": 2}, "patch_size is 4, the model's is 2"),
        ({"ffn": "swiglu"}, "ffn is mlp, the model's is swiglu"),
        ({"ffn_ratio": 2.0}, "ffn width is 96, the model's is 48"),
        ({"heads": 3}, "heads is 2, the model's is 3"),
        ({"in_channels": 4}, "in_channels is 3, the model's is 4"),
        ({"num_registers": 4}, "num_registers is 3, the model's is 4; registers are only grafted onto"),
        ({"num_registers": 0}, "num_registers is 3, the model's is 0"),
        ({"layerscale": None}, "layerscale is True, the model's is False"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_change_nothing(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = write_teacher(tmp_path, tiny(1), 1)
    model = tiny(2, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(message)):
        load_into(model, path)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_random_weights_are_random_whatever_is_called_so_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "random:vitt16_reg2")
    assert find_weights("random:vitt16_reg2") is None
    assert find_weights("./random:vitt16_reg2") == Path("random:vitt16_reg2")


def test_starting_from_a_bare_name_or_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"dinov2_vits14_reg4_pretrain\.pth"):
        load_into(tiny(), "vits14_reg4")
    with pytest.raises(UserError, match="without init= a run starts from random ones"):
        load_into(tiny(), "random:vits14_reg4")
