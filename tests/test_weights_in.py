"""Files and folders of Meta, timm and transformers: they answer as in the library that wrote them, or are refused."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from dinoreg.evaluation.backbones.encoder import NativeEncoder, TimmEncoder, TransformersEncoder
from dinoreg.evaluation.backbones.open import open_encoder
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights import convert
from dinoreg.weights.load import load, load_into, load_reported
from tests.hostile import Payload
from tests.peer_models import redrawn, with_lost_terms

CASES = [(ffn, registers) for ffn in ("mlp", "swiglu") for registers in (0, 4)]
SIZES = [(518, 518), (224, 224), (98, 98), (224, 308)]


def timms(ffn: str = "mlp", registers: int = 4, **changes: Any) -> Any:
    options: dict[str, Any] = {"img_size": 518, "embed_dim": 64, "depth": 2, "num_heads": 1}
    if ffn == "swiglu":
        options |= {"mlp_ratio": 2 * 176 / 64, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    if registers:
        options["reg_tokens"] = registers
    return redrawn(timm.create_model(name, num_classes=0, dynamic_img_size=True, **(options | changes)))


def transformerss(ffn: str = "mlp", registers: int = 4, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14,
        "use_swiglu_ffn": ffn == "swiglu",
    } | changes  # fmt: skip
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        return redrawn(transformers.Dinov2WithRegistersModel(config))
    return redrawn(transformers.Dinov2Model(transformers.Dinov2Config(**options)))


def assert_equal_at_all_sizes(ours: RegisterViT, theirs: Any, sizes: list[tuple[int, int]] = SIZES) -> None:
    for height, width in sizes:
        images = torch.randn(1, 3, height, width)
        with torch.no_grad():
            tokens = ours(images)
            expected = theirs(images)
        found = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ equal to the library it comes from


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_a_timm_file_answers_as_timm_does(tmp_path: Path, ffn: str, registers: int) -> None:
    theirs = timms(ffn, registers)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "timm.pth")
    loaded = load_reported(tmp_path / "timm.safetensors")
    assert (loaded.model.num_registers, loaded.model.ffn) == (registers, ffn)
    assert_equal_at_all_sizes(loaded.model, theirs.forward_features)
    assert loaded.weights.source == "timm"
    assert loaded.fresh == ("mask_token",)
    torched = load_reported(tmp_path / "timm.pth")
    assert torched.weights.left_out == ("epoch",)
    assert all(torch.equal(a, b) for a, b in zip(torched.model.parameters(), loaded.model.parameters()))


@pytest.mark.parametrize(("ffn", "registers"), CASES)
def test_a_transformers_folder_answers_as_transformers_does(tmp_path: Path, ffn: str, registers: int) -> None:
    theirs = transformerss(ffn, registers)
    theirs.save_pretrained(tmp_path)
    loaded = load_reported(tmp_path)
    assert (loaded.model.num_registers, loaded.model.ffn, loaded.model.heads) == (registers, ffn, 2)
    assert_equal_at_all_sizes(loaded.model, lambda images: theirs(images).last_hidden_state)
    assert (loaded.fresh, loaded.weights.left_out) == ((), ())
    assert len(loaded.loaded) == len(loaded.model.state_dict())
    again = load(tmp_path / "model.safetensors")  # the file in it means the same
    assert again.architecture() == loaded.model.architecture()


def test_another_epsilon_of_the_norms_is_computed_with_and_goes_out_again(tmp_path: Path) -> None:
    theirs = transformerss(layer_norm_eps=1e-2, image_size=56)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert_equal_at_all_sizes(model, lambda images: theirs(images).last_hidden_state, [(56, 56), (28, 42)])
    assert model.architecture()["norm_eps"] == 1e-2


def metas_positions(positions: Tensor, grid: int, height: int, width: int) -> Tensor:
    """The published models without registers: scale factors with an offset of 0.1, no antialiasing."""
    image = positions[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = ((height + 0.1) / grid, (width + 0.1) / grid)
    image = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat([positions[:, :1], image.permute(0, 2, 3, 1).reshape(1, height * width, -1)], dim=1)


def test_a_meta_file_without_registers_resamples_as_meta_does_and_the_three_libraries_differ(tmp_path: Path) -> None:
    theirs = timms(registers=0)
    state = theirs.state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2_vits14_pretrain.pth")
    loaded = load_reported(tmp_path / "dinov2_vits14_pretrain.pth")
    for height, width in SIZES:
        images = torch.randn(1, 3, height, width)
        rows, columns = height // 14, width // 14
        sized = timms(registers=0, img_size=(height, width))
        positions = state["pos_embed"]
        if (rows, columns) != (37, 37):
            positions = metas_positions(positions, 37, rows, columns)
        sized.load_state_dict(state | {"pos_embed": positions})
        tokens = loaded.model(images)
        found = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
        torch.testing.assert_close(found, sized.forward_features(images), rtol=0, atol=1e-5)
    save_file(state, tmp_path / "timm.safetensors")
    transformers_folder = tmp_path / "transformers"
    transformerss(registers=0, num_attention_heads=1).save_pretrained(transformers_folder)
    save_file(convert.to_transformers(load(tmp_path / "dinov2_vits14_pretrain.pth").state_dict()),
              transformers_folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    small, native = torch.randn(1, 3, 98, 98), torch.randn(1, 3, 518, 518)
    models = [loaded.model, load(tmp_path / "timm.safetensors"), load(transformers_folder)]
    a, b, c = (model(small).patches for model in models)
    assert min((a - b).abs().max(), (a - c).abs().max(), (b - c).abs().max()) > 0.01
    a, b, c = (model(native).patches for model in models)
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_the_tour_through_the_libraries_own_models_ends_where_it_began(tmp_path: Path) -> None:
    for ffn, registers in CASES:
        folder = tmp_path / f"{ffn}{registers}"
        torch.manual_seed(0)
        options = {"image_size": 56, "dim": 64, "depth": 2, "heads": 1, "num_registers": registers, "ffn": ffn}
        meta = redrawn(RegisterViT(**options, layerscale=1.0)).state_dict()
        theirs = timms(ffn, registers, img_size=56)
        theirs.load_state_dict(convert.to_timm(meta))
        ours = with_lost_terms(convert.from_timm(theirs.state_dict()), meta)
        hf = transformerss(ffn, registers, image_size=56, num_attention_heads=1)
        hf.save_pretrained(folder)
        save_file(convert.to_transformers(ours), folder / "model.safetensors", {"format": "pt"})
        hf, info = type(hf).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for state in (hf.state_dict(), load_file(folder / "model.safetensors")):
            back = convert.to_meta(convert.from_transformers(state))
            assert back.keys() == meta.keys()
            assert all(torch.equal(back[key], meta[key]) for key in meta)


# ------------------------------------------------------------------ what a config says


def written(tmp_path: Path, ffn: str = "mlp", registers: int = 4, **changes: Any) -> Path:
    """A folder of transformers whose config was changed after the fact; None removes a key."""
    folder = tmp_path / "folder"
    transformerss(ffn, registers, image_size=56).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, r"config.json says hidden_size=128, the tensors say 64"),
        ({"num_hidden_layers": 12}, r"config.json says num_hidden_layers=12, the tensors say 2"),
        ({"patch_size": 16}, r"config.json says patch_size=16, the tensors say 14"),
        ({"patch_size": None}, r"config.json says patch_size=16, the tensors say 14"),  # the library's default
        ({"num_register_tokens": 1}, r"config.json says num_register_tokens=1, the tensors say 4"),
        ({"model_type": "dinov2"}, r"config.json says num_register_tokens=0, the tensors say 4"),
        ({"use_swiglu_ffn": True}, r"config.json says use_swiglu_ffn='swiglu', the tensors say 'mlp'"),
        ({"mlp_ratio": 2}, r"config.json says mlp_ratio=2, the tensors have a hidden width of 256"),
        ({"image_size": 70}, r"config.json says image_size=70, the tensors have 16 patch positions"),
        ({"num_attention_heads": 3}, r"config.json says num_attention_heads=3, which does not divide the width 64"),
        ({"num_attention_heads": "2"}, r"config.json says num_attention_heads='2', which does not divide"),
        ({"num_channels": 4}, r"config.json says num_channels=4, the tensors say 3"),
        ({"num_attention_heads": 10**400}, r"num_attention_heads=10+…, which does not divide"),
        ({"mlp_ratio": 10**400}, r"the tensors have a hidden width of 256"),
        ({"model_type": ["dinov2"]}, r"model_type is .*, expected dinov2 or dinov2_with_registers"),
        ({"model_type": "vit"}, r"model_type is 'vit', expected dinov2 or dinov2_with_registers"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps=0\.0, expected a positive number"),
        ({"qkv_bias": False}, r"qkv_bias=False, the encoder has True"),
        ({"hidden_act": "relu"}, r"hidden_act='relu', the encoder has 'gelu'"),
    ],
)
def test_a_config_that_contradicts_the_file_or_asks_for_more_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = written(tmp_path, **change)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_of_one_library_beside_the_tensors_of_another_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    save_file(timms(img_size=56).state_dict(), folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"config.json is of transformers, the key names in model.safetensors are of timm"
    ):
        load(folder)
    for text, message in (("[1]", "holds a JSON list"), ("{", "not JSON"), ("[" * 10**5, "not JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load(folder)
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"a folder of transformers without weights; expected one of model.safetensors"):
        load(folder)


def test_registers_of_number_zero_are_none_but_positions_are_resampled_as_with_them(tmp_path: Path) -> None:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56, patch_size=14, num_register_tokens=0
    )
    theirs = redrawn(transformers.Dinov2WithRegistersModel(config))
    theirs.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.num_registers, loaded.antialias) == (0, True)
    assert_equal_at_all_sizes(loaded, lambda images: theirs(images).last_hidden_state, [(56, 56), (28, 42)])


def test_a_model_with_a_head_a_sharded_one_and_an_old_file_are_read(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, num_labels=5
    )
    theirs = redrawn(transformers.Dinov2ForImageClassification(config))
    theirs.save_pretrained(tmp_path / "whole")
    whole = load_reported(tmp_path / "whole")
    assert set(whole.weights.left_out) == {"classifier.weight", "classifier.bias"}
    assert_equal_at_all_sizes(whole.model, lambda x: theirs.dinov2(x).last_hidden_state, [(56, 56), (28, 42)])
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    state = load_file(tmp_path / "whole" / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    torch.save(state, old / "pytorch_model.bin")
    for folder in (tmp_path / "sharded", old):
        found = load(folder).state_dict()
        assert all(torch.equal(found[key], value) for key, value in whole.model.state_dict().items())
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for name, message in (
        ("../whole/model.safetensors", "is no safetensors file of this folder"),
        ("model-00009-of-00002.safetensors", "which is missing"),
        (sorted(set(content["weight_map"].values()))[-1], "does not hold the tensors that the index says"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {first: name}}))
        with pytest.raises(UserError, match=message):
            load(tmp_path / "sharded")


def timm_folder(folder: Path, model: Any, **changes: Any) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    content = {
        "architecture": "vit_small_patch14_reg4_dinov2",
        "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 2},
        "pretrained_cfg": {"input_size": [3, 28, 42], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
    }
    (folder / "config.json").write_text(json.dumps(content | changes))
    return folder


def test_a_folder_of_timm_says_heads_rectangle_and_statistics(tmp_path: Path) -> None:
    theirs = timms(img_size=(28, 42), num_heads=2)
    folder = timm_folder(tmp_path / "timm", theirs)
    opened = open_encoder(str(folder), "cpu", torch.float32)
    assert (opened.encoder.preprocessing.mean, opened.encoder.preprocessing.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    model = opened.encoder.module  # type: ignore[attr-defined]
    assert (model.grid, model.heads, opened.encoder.name) == ((2, 3), 2, "timm")
    assert_equal_at_all_sizes(model, theirs.forward_features, [(28, 42), (42, 28), (56, 56)])
    other = timm_folder(tmp_path / "b", theirs, pretrained_cfg={"input_size": [3, 28, 56]})
    with pytest.raises(UserError, match="pos_embed has 6 positions, which fit no grid of 2x4"):
        load(other)
    for number, change in enumerate(({"architecture": "resnet50"}, {"model_args": {"norm_layer": "rmsnorm"}})):
        with pytest.raises(
            UserError, match=r"expected a ViT of the DINOv2 or DINOv3 kind|'norm_layer', which the encoder"
        ):
            load(timm_folder(tmp_path / str(number), theirs, **change))


# ------------------------------------------------------------------ runs, checkpoints, folders


def test_a_checkpoint_and_a_pointer_mean_the_teacher_of_that_step(tmp_path: Path) -> None:
    for step in (1, 2):
        path = tmp_path / "teacher" / f"step_000000{step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        model = RegisterViT(image_size=28, dim=64, depth=step, heads=1)
        save_file({f"backbone.{k}": v for k, v in model.state_dict().items()}, path)
        (tmp_path / "checkpoints" / f"step_000000{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").write_text("step_0000001\n")
    assert load(tmp_path / "checkpoints" / "step_0000002").depth == 2
    assert load(tmp_path / "checkpoints" / "last").depth == 1
    (tmp_path / "checkpoints" / "step_0000003").mkdir()
    with pytest.raises(UserError, match="the teacher file of this checkpoint is not in"):
        load(tmp_path / "checkpoints" / "step_0000003")


def test_a_folder_with_one_weight_file_means_it_and_with_two_neither(tmp_path: Path) -> None:
    torch.save(RegisterViT(image_size=28, dim=64, depth=1, heads=1).state_dict(), tmp_path / "a.pth")
    assert load(tmp_path).depth == 1
    (tmp_path / "b.pth").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 weight files; name one"):
        load(tmp_path)


# ------------------------------------------------------------------ adapting


def metas_file(folder: Path, registers: int = 0, **options: Any) -> tuple[Path, RegisterViT]:
    arguments: dict[str, Any] = {"image_size": 56, "dim": 64, "depth": 2, "heads": 1, "layerscale": 1.0}
    if not registers:
        arguments |= {"antialias": False, "position_offset": 0.1}
    model = redrawn(RegisterViT(**(arguments | {"num_registers": registers} | options)))
    torch.save(model.state_dict(), folder / "meta.pth")
    return folder / "meta.pth", model


def test_resizing_on_loading_gives_the_sources_own_function_at_that_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, source = metas_file(tmp_path)
    with caplog.at_level(logging.INFO):
        loaded = load_reported(path, image_size=(28, 42))
    assert loaded.model.grid == (2, 3)
    assert loaded.reshaped == "pos_embed: 4x4 -> 2x3"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "reshaped pos_embed: 4x4 -> 2x3" in caplog.text
    images = torch.randn(1, 3, 28, 42)
    torch.testing.assert_close(loaded.model(images).patches, source(images).patches, rtol=0, atol=1e-6)


def test_channels_are_adapted_in_the_way_that_is_asked_for(tmp_path: Path) -> None:
    path, source = metas_file(tmp_path)
    key = "patch_embed.proj.weight"
    weight = source.state_dict()[key]
    grey = torch.randn(1, 1, 56, 56)
    expected = source(grey.expand(-1, 3, -1, -1)).cls
    for number in (1, 2, 5, 6):
        loaded = load_reported(path, in_channels=number, adapt_channels="mean")
        assert loaded.adapted == f"{key}: 3 -> {number} channels (mean)"
        assert key not in loaded.loaded
        torch.testing.assert_close(loaded.model(grey.expand(-1, number, -1, -1)).cls, expected, rtol=0, atol=1e-5)
    six = load(path, in_channels=6, adapt_channels="repeat")
    torch.testing.assert_close(six(grey.expand(-1, 6, -1, -1)).cls, expected, rtol=0, atol=1e-5)
    five = load(path, in_channels=5, adapt_channels="repeat").state_dict()[key]
    torch.testing.assert_close(five, torch.stack([weight[:, i] for i in (0, 1, 2, 0, 1)], dim=1) * 3 / 5)
    zero = load(path, in_channels=5, adapt_channels="zero")
    images = torch.randn(1, 5, 56, 56)
    torch.testing.assert_close(zero(images).cls, source(images[:, :3]).cls, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 5}, r"in_channels is 3, the model's is 5; adapt_channels=mean\|repeat\|zero says how"),
        ({"in_channels": 5, "adapt_channels": "max"}, r"adapt_channels='max': expected one of mean"),
        ({"adapt_channels": "max"}, r"adapt_channels='max': expected"),
        ({"in_channels": 1, "adapt_channels": "zero"}, r"adapt_channels=zero: would drop 2 of 3 channels"),
        ({"in_channels": 2, "adapt_channels": "repeat"}, r"would drop 1 of 3 channels; expected mean"),
        ({"dim": 128}, r"dim is 64, what was asked for is 128"),
        ({"heads": 4, "ffn": "swiglu"}, r"ffn is mlp, what was asked for is swiglu"),
        ({"image_size": 50}, r"image_size 50x50 is not a multiple of patch_size 14"),
        ({"num_register": 4}, r"model option 'num_register' is not known; did you mean 'num_registers'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path, _ = metas_file(tmp_path)
    with pytest.raises(UserError, match=message):
        load(path, **options)


def test_registers_are_grafted_onto_a_backbone_without_and_reported(tmp_path: Path) -> None:
    path, source = metas_file(tmp_path)
    loaded = load_reported(path, num_registers=4)
    assert loaded.grafted == "register_tokens: 4 fresh registers"
    assert loaded.fresh == ("register_tokens",)
    assert "grafted register_tokens: 4 fresh registers; positions" in str(loaded)
    tokens = loaded.model.register_tokens
    assert 0 < tokens.abs().max() < 1e-5
    assert len({tuple(row) for row in tokens[0].tolist()}) == 4
    assert torch.equal(tokens, load(path, num_registers=4).register_tokens)  # the same ones every time
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    registers, _ = metas_file(tmp_path, registers=2)
    with pytest.raises(UserError, match="num_registers is 2, what was asked for is 4; registers are only grafted"):
        load(registers, num_registers=4)


def test_a_run_starts_from_any_library_with_its_own_registers_channels_and_size(tmp_path: Path) -> None:
    theirs = transformerss(registers=0, image_size=56)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(1)
    student = RegisterViT(image_size=28, dim=64, depth=2, heads=2, num_registers=4, in_channels=5, layerscale=1.0)
    fresh = student.register_tokens.detach().clone()
    report = load_into(student, tmp_path, adapt_channels="zero")
    assert torch.equal(student.register_tokens, fresh)
    assert (report.reshaped, report.grafted, report.adapted) == (
        "pos_embed: 4x4 -> 2x2",
        "register_tokens: 4 fresh registers",
        "patch_embed.proj.weight: 3 -> 5 channels (zero)",
    )
    plain = RegisterViT(image_size=28, dim=64, depth=2, heads=2, num_registers=0, layerscale=1.0)
    load_into(plain, tmp_path)
    images = torch.randn(1, 3, 28, 28)
    expected = theirs(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(plain(images).patches, expected, rtol=0, atol=1e-5)


def test_a_refused_start_changes_nothing(tmp_path: Path) -> None:
    path, _ = metas_file(tmp_path, registers=4)
    student = RegisterViT(image_size=28, dim=64, depth=2, heads=1, in_channels=5, layerscale=1.0)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(UserError, match="adapt_channels"):
        load_into(student, path)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"blocks.1.norm2.bias": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"'blocks.1.norm2.bias' has shape \(3,\), expected \(64,\)"):
        load_into(student, path, adapt_channels="mean")
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_heads_are_given_where_a_file_cannot_tell_them(tmp_path: Path) -> None:
    path, source = metas_file(tmp_path, dim=72, heads=3)
    with pytest.raises(UserError, match="the width 72 does not tell the number of heads; give heads="):
        load(path)
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(load(path, heads=3)(images).cls, source(images).cls)
    target = RegisterViT(**source.architecture())
    load_into(target, path)
    assert torch.equal(target(images).cls, source(images).cls)


# ------------------------------------------------------------------ corrupt and hostile files


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.ones(4), "cls_token": torch.ones(1, 1, 2)}, path)
    header, body = header_of(path)

    def with_entry(**changes: Any) -> dict[str, Any]:
        return header | {"a": header["a"] | changes}

    start, stop = header["a"]["data_offsets"]
    whole = json.dumps(header)
    sizes = "invalid shape, data type, or offset"
    cases: list[tuple[Any, bytes, str]] = [
        (with_entry(dtype="I32"), body, "'a' has dtype int32, expected floating point"),
        (with_entry(dtype="F4", shape=[32]), body, "'a' has dtype float4"),
        (with_entry(dtype="X9"), body, "X9"),
        (with_entry(dtype="F64"), body, sizes),
        (with_entry(shape=[5]), body, sizes),
        (with_entry(shape=[2**40, 2**40]), body, "overflow"),
        (with_entry(shape=[-4]), body, "-4"),
        (with_entry(shape="4"), body, "expected a sequence"),
        (with_entry(shape=[True, 4]), body, "boolean"),
        (with_entry(data_offsets=[stop, start]), body, "offset"),
        (with_entry(data_offsets=[start + 10**6, stop + 10**6]), body, "offset"),
        (header | {"b": header["a"]}, body, "offset"),
        (header, body + b"1234", "not fully covered"),
        (header, body[:-4], "not fully covered"),
        ({"a": 3}, b"", "expected struct TensorInfo"),
        ([1], b"", "expected struct"),
        (f'{whole[:-1]}, "a": {json.dumps(header["a"])}}}'.encode(), body, "a name is there twice"),
        (b"\xff\xfe", b"", "invalid UTF-8"),
        (b"[" * 100_000, b"", "header"),
    ]
    for content, data, message in cases:
        rewrite(path, content, data)
        with pytest.raises(UserError) as caught:
            load(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    for raw in (b"", b"1234567", struct.pack("<Q", 10**18) + b"{}", struct.pack("<Q", 3) + b"{}"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_of_any_library_runs(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    folder = written(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.cls_token": Payload(target)}, folder / "pytorch_model.bin")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"reg_token": Payload(target)}))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"reg_token": Payload(target)}))
    timm_name = f"timm:vit_tiny_patch16_224:{tmp_path / 'plain.pth'}"
    for source in (folder, tmp_path / "plain.pth", tmp_path / "pickle.safetensors", timm_name):
        with pytest.raises(UserError) as caught:
            open_encoder(str(source), "cpu", torch.float32)
        assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_a_file_never_becomes_more_tensors_than_it_has_bytes(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"cls_token": torch.ones(1, 1, 64), "pos_embed": huge}, tmp_path / "stride.pth")
    with pytest.raises(UserError, match=r"a tensor of shape \(1000000, 1000000\) is more than the file has bytes for"):
        load(tmp_path / "stride.pth")
    torch.save({"cls_token": torch.zeros(10**5)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="its entries are compressed or overlap"):
        load(tmp_path / "bomb.pth")
    sparse = torch.eye(4).to_sparse()
    torch.save({"cls_token": sparse}, tmp_path / "sparse.pth")
    with pytest.raises(UserError, match="more than the file has bytes for"):
        load(tmp_path / "sparse.pth")


# ------------------------------------------------------------------ as an encoder


def test_what_the_encoder_holds_is_opened_as_one_and_the_rest_in_its_own_library(tmp_path: Path) -> None:
    theirs = transformerss(image_size=56)
    theirs.save_pretrained(tmp_path / "dinov2")
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    opened = open_encoder(str(tmp_path / "dinov2"), "cpu", torch.float32)
    assert isinstance(opened.encoder, NativeEncoder)
    assert opened.encoder.name == "dinov2"
    assert (opened.encoder.preprocessing.mean, opened.encoder.preprocessing.std) == (
        (0.1, 0.2, 0.3),
        (0.229, 0.224, 0.225),
    )

    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    other = open_encoder(str(tmp_path / "vit"), "cpu", torch.float32)
    assert isinstance(other.encoder, TransformersEncoder)
    assert other.encoder.name == "vit"
    state = load_file(tmp_path / "vit" / "model.safetensors")
    del state[next(key for key in state if "layernorm" in key)]
    save_file(state, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 tensors are missing"):
        open_encoder(str(tmp_path / "vit"), "cpu", torch.float32)

    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    named = open_encoder(f"timm:vit_tiny_patch16_224:{tmp_path / 'tiny.safetensors'}", "cpu", torch.float32)
    plain = open_encoder(str(tmp_path / "tiny.safetensors"), "cpu", torch.float32)
    assert isinstance(named.encoder, TimmEncoder)
    assert isinstance(plain.encoder, NativeEncoder)
    assert_equal_at_all_sizes(plain.encoder.module, named.encoder.module.forward_features, [(64, 96), (224, 224)])
