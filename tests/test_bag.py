"""A bag of channels: trained on one channel of each image, then used with any of them, side by side or averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import vit
from exporting import write_run as write_exported
from small_runs import tiny_model, write_run
from training import loss_trace, read_lines, stopped_after, tiny_config
from zoo import write_planes

import dinoreg
from dinoreg import RegisterViT, select_channels
from dinoreg.commands.main import main
from dinoreg.config.load import load_config
from dinoreg.config.schema import DataConfig
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.open import open_source
from dinoreg.data.source import ScenesSource
from dinoreg.data.statistics import with_statistics
from dinoreg.export.certificate import check_read_back
from dinoreg.export.formats import FORMATS
from dinoreg.export.source import Source
from dinoreg.models.vit import CHANNELS
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain

STILL: dict[str, Any] = {
    **dict.fromkeys(("jitter_probability", "grayscale", "blur_global1", "blur_global2", "blur_local"), 0.0),
    **{"solarize_global2": 0.0, "mean": (0.0,), "std": (1.0,)},
}
BAGS = CHANNELS[1:]
SCENES = ScenesSource(12, 24)
ONE_OF_THREE = {"in_channels": 1, "bag_of": 3}


def bag(kind: str, channels: int, **options: Any) -> RegisterViT:
    return tiny_model(2, in_channels=channels, channels=kind, image_size=32, **options)


def alone(model: RegisterViT) -> RegisterViT:
    """The network that every channel goes through."""
    plain = tiny_model(2, in_channels=1, image_size=32)
    plain.load_state_dict(model.state_dict())
    return plain


def put_together(kind: str, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=-1) if kind == "bag" else torch.stack(parts).mean(dim=0)


@pytest.mark.parametrize("kind", BAGS)
def test_a_bag_computes_what_its_network_does_of_every_channel(kind: str) -> None:
    model, images = bag(kind, 3), torch.randn(2, 3, 16, 24)
    each = [images[:, channel : channel + 1] for channel in range(3)]
    plain = alone(model)
    for own, *parts in zip(model(images), *map(plain, each)):
        torch.testing.assert_close(own, put_together(kind, parts))
    torch.testing.assert_close(model.prenorm(images), put_together(kind, [*map(plain.prenorm, each)]))
    torch.testing.assert_close(model.attention(images, 1), torch.cat([plain.attention(x, 1) for x in each], dim=1))
    found = model.get_intermediate_layers(images, [0, 2], reshape=True)
    for own, *parts in zip(found, *(plain.get_intermediate_layers(x, [0, 2], reshape=True) for x in each)):
        torch.testing.assert_close(own.movedim(1, -1), put_together(kind, [part.movedim(1, -1) for part in parts]))
    assert model(images).cls.shape == (2, model.width)


@pytest.mark.parametrize("kind", BAGS)
def test_a_channel_subset_equals_the_model_built_for_it(kind: str) -> None:
    model, images = bag(kind, 4), torch.randn(2, 4, 16, 16)
    model.preprocessing = {"mean": [0.3], "std": [0.2], "range": [0, 1, 0, 2, 0, 3, 0, 4]}
    built = bag(kind, 2)
    built.load_state_dict(model.state_dict())
    some = select_channels(model, [3, 1])
    for own, expected, direct in zip(some(images[:, [3, 1]]), built(images[:, [3, 1]]), model(images[:, [3, 1]])):
        assert torch.equal(own, expected)
        assert torch.equal(own, direct)
    if kind == "bag":
        whole = model(images).cls.unflatten(1, (4, -1))
        torch.testing.assert_close(some(images[:, [3, 1]]).cls.unflatten(1, (2, -1)), whole[:, [3, 1]])
    assert some.preprocessing == {"mean": [0.3], "std": [0.2], "range": [0, 4, 0, 2]}
    one = select_channels(model, [2])
    assert (one.channels, one.in_channels) == ("joint", 1)
    torch.testing.assert_close(one(images[:, 2:3]).cls, alone(model)(images[:, 2:3]).cls)


def test_other_channels_than_the_trained_ones_need_no_word_but_their_number(tmp_path: Path) -> None:
    model = bag("bag", 3)
    run = write_run(tmp_path / "run", model, mean=[0.3], std=[0.2], range=[0, 4095])
    seven = dinoreg.load(run, in_channels=7)
    assert seven.preprocessing is not None
    assert {key: seven.preprocessing[key] for key in ("mean", "std", "range")} == {
        **{"mean": [0.3], "std": [0.2]},
        "range": [0, 4095],
    }
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32, 7)).astype(np.uint16)
    tokens = seven(dinoreg.transform(seven)(pixels)[None])
    assert tokens.cls.shape == (1, 7 * model.dim)
    unit = torch.from_numpy((pixels[..., 5:6] / 4095 - 0.3) / 0.2).float().permute(2, 0, 1)[None]
    torch.testing.assert_close(tokens.cls[:, 5 * model.dim : 6 * model.dim], alone(model)(unit).cls)


def first(view_options: dict[str, Any], position: int = 0, workers: int = 0, **augment: Any) -> Batch:
    settings = AugmentSettings(**{**STILL, **augment})
    views = Views(CropSettings(16, 8, 2), settings, MaskSettings(), 8, **view_options)
    reading = DataConfig(workers=workers)
    with BatchLoader(SCENES, views, reading, batch_size=4, position=position) as loader:
        return next(loader)


def drawn(joint: torch.Tensor, own: torch.Tensor) -> list[int]:
    """The one channel of each joint crop that the crop of a bag is equal to."""
    same = (joint == own).flatten(2).all(dim=2)
    assert bool((same.sum(dim=1) == 1).all())
    return same.int().argmax(dim=1).tolist()


def test_all_crops_of_an_image_show_one_channel_that_is_drawn_anew_in_every_epoch() -> None:
    chosen = []
    for position in range(0, 96, 4):  # eight epochs
        joint = first({"clean_size": 16}, position)
        own = first({"clean_size": 16, **ONE_OF_THREE}, position)
        assert own.local_crops is not None
        assert joint.local_crops is not None
        assert joint.clean_crops is not None
        assert own.clean_crops is not None
        channels = drawn(joint.global_crops, own.global_crops)
        assert channels == 2 * channels[:4]
        assert drawn(joint.local_crops, own.local_crops) == 2 * channels[:4]
        assert drawn(joint.clean_crops, own.clean_crops) == channels
        chosen += [*zip(own.sample_ids.tolist(), channels[:4])]
    counts = np.bincount([channel for _, channel in chosen], minlength=3)
    assert counts.min() > 20  # of 96, a third expected
    assert len({channel for image, channel in chosen if image == 3}) > 1


def test_what_is_drawn_does_not_depend_on_workers_nor_does_a_lost_channel_leave_nothing() -> None:
    one, other = (
        first(ONE_OF_THREE, 4, workers, channel_drop=0.9, turn=0.5, brightness=0.4, jitter_probability=1.0)
        for workers in (0, 2)
    )
    assert torch.equal(one.global_crops, other.global_crops)
    assert bool(one.global_crops.flatten(1).any(dim=1).all())


def test_a_run_measures_one_normalisation_for_all_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, [[[3000]], [[700]], [[65535]]], (5, 3, 40, 40)).astype(np.uint16)
    for number, planes in enumerate(pixels):
        write_planes(tmp_path / f"{number}", planes)
    options = ["model.channels=bag", f"data={tmp_path}", "data.range=0,65535", "out=x"]
    config, lines = with_statistics(load_config("small", options), open_source(tmp_path, value_range=[0, 65535]))
    np.testing.assert_allclose(config.augment.mean, [(pixels / 65535).mean()], atol=1e-4)
    np.testing.assert_allclose(config.augment.std, [(pixels / 65535).std()], atol=1e-4)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["augment.mean=[0.1,0.2,0.4]"], r"augment\.mean=.*: expected one number"),
        (["loss.diet_weight=1", "init=x"], r"loss\.diet_weight=1"),
    ],
)
def test_what_a_bag_cannot_have_is_refused(options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(None, ["model.channels=bag", *options])


@pytest.mark.slow
def test_a_resumed_run_of_a_bag_equals_the_unbroken_one_and_is_probed_on_all_channels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model__channels": "bag", "probe__every": 4, "probe__data": "scenes:", "steps": 8}
    options |= {"augment__preset": "microscopy", "loss__gram_weight": 1.0, "probe__num_images": 40}
    unbroken, out = pretrain(tiny_config(tmp_path / "a", **options)), tmp_path / "b"
    with stopped_after(5, out):
        pretrain(tiny_config(out, **options))
    pretrain(load_config(out, ["resume=true"]))
    assert loss_trace(out) == loss_trace(unbroken)
    assert "export weights=" in (log := (out / "train.log").read_text())
    assert "format=timm" not in log  # which has no bag
    drop = ("probe_time", "dse_low", "dse_high")
    one, other = (
        [{key: value for key, value in line.items() if key not in drop} for line in read_lines(run / "probe.jsonl")]
        for run in (unbroken, out)
    )
    assert one == other
    model = dinoreg.load(out)
    assert (model.channels, model.in_channels, model.patch_embed.proj.in_channels) == ("bag", 3, 1)
    assert model(torch.zeros(1, 3, 32, 32)).cls.shape == (1, 96)


@pytest.mark.slow
def test_a_bag_starts_from_weights_that_see_channels_together(tmp_path: Path) -> None:
    start = tiny_model(4, in_channels=3, image_size=32, depth=2, dim=32, heads=2)
    options = {"init": str(write_run(tmp_path / "start", start)), "model__channels": "bag", "steps": 1}
    out = pretrain(tiny_config(tmp_path / "run", adapt__channels="mean", **options))
    assert dinoreg.load(out).patch_embed.proj.weight.shape[1] == 1


def write_cells(root: Path, channels: int) -> Path:
    """Two classes that the last channel tells apart."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 800), ("bright", 3200)):
        for number in range(12):
            noise = rng.integers(0, 4096, (channels, 40, 40))
            noise[-1] = level + rng.integers(-400, 400, (40, 40))
            write_planes(root / name / f"{number:02}", noise.astype(np.uint16))
    return root


def command(*arguments: object) -> None:
    assert main([str(each) for each in arguments]) == 0


@pytest.mark.slow
def test_verbs_take_a_bag_and_some_of_its_channels(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bag("bag", 4, depth=2), mean=[0.4], std=[0.3], range=[0, 4095])
    data, some = write_cells(tmp_path / "cells", 4), write_cells(tmp_path / "some", 2)
    machine = ("device=cpu", "precision=fp32")
    command("export", f"weights={run}", "format=safetensors", f"out={tmp_path / 'two'}", "channels=1,3")
    for weights, images, width in ((run, data, 48), (tmp_path / "two", some, 24)):
        found = dinoreg.embed(str(images), str(weights), device="cpu", precision="fp32", workers=0)
        assert found.features.shape == (24, width)
        assert not found.skipped
        out = tmp_path / f"out{width}"
        options = ("protocols=logistic", "logistic.num_c=5", "report=false", "baselines=false", "workers=0")
        command("eval", images, f"weights={weights}", f"out={out}", "own.folds=1", *options, *machine)
        (record,) = (json.loads(path.read_text()) for path in out.glob("eval/[0-9]*/*.json"))
        assert record["value"] > 0.9
    for kind in ("attention", "pca", "norms"):
        drawn = dinoreg.view(kind, weights=str(run), images=str(data), out=str(tmp_path / "view"), num=2, device="cpu")
        assert len(drawn.record["images"]) == 8
        assert drawn.record["images"][1].endswith(".tif, channel 1")
    report = dinoreg.registers(str(run), str(data), out=str(tmp_path / "registers"), num_images=4, device="cpu")
    assert report.measured[0].record["images"] == 16


@pytest.mark.parametrize("kind", BAGS)
def test_a_bag_is_read_back_from_its_export(kind: str, tmp_path: Path) -> None:
    model = bag(kind, 4)
    source = Source(write_exported(tmp_path / "run", model, mean=[0.3], std=[0.2]))
    FORMATS["safetensors"].write(tmp_path, source)
    check_read_back(FORMATS["safetensors"], source, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"format=timm: not for a bag of channels; channels=\[0\]"):
        dinoreg.export(tmp_path / "run", "timm", tmp_path / "timm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAGS)
@pytest.mark.parametrize("form", ["meta", "safetensors", "onnx"])
def test_a_bag_is_exported_whole(form: str, kind: str, tmp_path: Path) -> None:
    run = write_exported(tmp_path / "run", vit(in_channels=4, channels=kind), mean=[0.3], std=[0.2], range=[0, 4095])
    folder = dinoreg.export(run, form, tmp_path / form)
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["largest_relative_difference"]["float32"] < FORMATS[form].bound


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_one_channel_of_a_bag_is_exported_for_any_library(form: str, tmp_path: Path) -> None:
    run = write_exported(tmp_path / "run", vit(in_channels=4, channels="bag"), mean=[0.3], std=[0.2])
    folder = dinoreg.export(run, form, tmp_path / form, channels=[2])
    images = torch.randn(2, 1, 40, 40)
    torch.testing.assert_close(dinoreg.load(folder)(images).cls, dinoreg.load(run)(images).cls, atol=1e-5, rtol=1e-5)
