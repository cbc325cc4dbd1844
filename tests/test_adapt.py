"""Going on from weights with few images: the last blocks alone, and DIET."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import on_processes, pretrain_each
from safetensors.torch import load_file
from test_step import new_batch
from torch import Tensor
from training import read_lines, stopped_after, tiny_config

import dinoreg
from dinoreg.checkpoint import format as checkpoint
from dinoreg.config.load import Config, load_config
from dinoreg.losses.diet import TEMPERATURE, diet_loss
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from dinoreg.train.prepare import Setup
from dinoreg.train.schedules import Now
from dinoreg.train.step import train_step
from dinoreg.weights.load import load

DIET = {"loss__dino_weight": 0.0, "loss__ibot_weight": 0.0, "loss__koleo_weight": 0.0, "loss__diet_weight": 1.0}
NOW = Now(lr=1e-2, last_layer_lr=1e-2, weight_decay=0.1, momentum=0.5, teacher_temp=0.05)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to continue from."""
    return pretrain(tiny_config(tmp_path_factory.mktemp("first") / "run", steps=1))


def continued(out: Path, first: Path, **overrides: Any) -> Config:
    """Six steps from `first`; the backbone learns from the first one on."""
    options: dict[str, Any] = {
        "init": str(first),
        "steps": 6,
        "adapt__heads": 0.0,
        "adapt__warmup": 0.0,
        "checkpoint__every": 100,
    }
    return tiny_config(out, **{**options, **overrides})


def weights_of(out: Path) -> dict[str, Tensor]:
    """The backbone in the last teacher file."""
    path = max((out / "teacher").glob("*.safetensors"))
    return {k.removeprefix("backbone."): v for k, v in load_file(path).items() if k.startswith("backbone.")}


def changed(out: Path) -> set[str]:
    """The names of the teacher's parameters that are not, bit for bit, those the run began with."""
    start = load(out / "init.safetensors").state_dict()
    end = weights_of(out)
    assert end.keys() == start.keys()
    return {name for name, value in end.items() if not torch.equal(value, start[name])}


def test_diet_is_the_log_probability_of_the_image_among_all_by_cosines_about_their_mean() -> None:
    seen, tokens, images = torch.randn(7, 4) + 3, torch.randn(5, 4) + 3, [3, 0, 6, 3, 1]
    mean = sum(seen) / 7
    found = []
    for token, image in zip(tokens, images):
        cosines = [torch.dot(token - mean, row - mean) / (token - mean).norm() / (row - mean).norm() for row in seen]
        powers = [torch.exp(cosine / TEMPERATURE) for cosine in cosines]
        found.append(-(powers[image] / sum(powers)).log())
    torch.testing.assert_close(diet_loss(tokens, seen, torch.tensor(images)), torch.stack(found).mean())


def test_frozen_blocks_have_no_gradient_no_moments_and_an_unmoved_teacher(first: Path, tmp_path: Path) -> None:
    config = continued(tmp_path / "run", first, adapt__blocks=1)
    setup = Setup(config)
    state = setup.new_state()
    learn = {name for name, _ in state.student.backbone.named_parameters() if name.startswith(("blocks.1.", "norm."))}
    train_step(state, new_batch(), NOW)
    for name, parameter in state.student.backbone.named_parameters():
        assert (parameter.grad is not None) == (name in learn), name
        assert (parameter in state.optimizer.state) == (name in learn), name
    assert changed(pretrain(config)) == learn
    ratios = [line["update_ratio"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert all(ratio > 0 for ratio in ratios[1:])


def test_every_crop_names_its_image_in_micro_batches_too(first: Path, tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 2):
        config = continued(tmp_path / "run", first, **DIET, model__drop_path=0.0, optim__accumulate=accumulate)
        state, batch = Setup(config).new_state(), new_batch(masked=False)
        batch.sample_ids = batch.sample_ids[::-1] + 30
        with torch.no_grad():
            cls = [state.student.backbone(crops).cls for crops in (batch.global_crops, batch.local_crops)]
            literal = diet_loss(torch.cat(cls), state.seen, torch.tensor([35, 34, 33, 32, 31, 30] * 4))
        state.optim = replace(config.optim, clip_grad=None)
        result = train_step(state, batch, NOW)
        found.append((result.losses["total"], state.student.backbone.blocks[0].attn.qkv.weight.grad))
        assert result.losses.keys() == {"diet", "total"}
        torch.testing.assert_close(result.losses["diet"], literal)
        assert result.targets is None
    torch.testing.assert_close(found[1], found[0])


def test_diet_alone_learns_without_a_pass_of_the_teacher_or_moments_of_its_head(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.train.step.teacher_targets", None)
    out = pretrain(continued(tmp_path / "run", first, **DIET, steps=30, schedule__momentum=[0.5, 0.5]))
    lines = read_lines(out / "metrics.jsonl")
    assert lines[-1]["diet_loss"] == lines[-1]["total_loss"] < lines[0]["diet_loss"]
    assert read_lines(out / "health" / "events.jsonl") == []
    stored = checkpoint.Reader(out / "checkpoints" / "step_0000030").stored()
    assert {name.split(".")[1] for name in stored if name.startswith("optimizer.")} == {"backbone"}


def test_what_diet_tells_apart_are_the_class_tokens_of_whole_images_at_the_start(first: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(5):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(source / f"{number}.png")
    (source / "3.png").write_bytes(b"no picture")
    seen = Setup(continued(tmp_path / "run", first, data__source=str(source), **DIET)).new_state().seen
    assert seen is not None
    model, see = load(first).eval(), dinoreg.transform(first)
    for number in range(5):
        token = model(see(source / f"{number}.png")[None]).cls[0] if number != 3 else torch.zeros(32)
        torch.testing.assert_close(seen[number], token)


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapt.blocks=3: expected at most 2"):
        tiny_config(tmp_path, adapt__blocks=3)
    with pytest.raises(UserError, match=r"loss.dino_weight=0: expected a positive .* diet_weight"):
        tiny_config(tmp_path, loss__dino_weight=0, loss__ibot_weight=0.0)
    with pytest.raises(UserError, match=r"adapt.blocks=0: expected at least 1"):
        load_config("quickstart", {"adapt.blocks": 0})
    with pytest.raises(UserError, match=r"adapt.heads=0.2: expected 0: no loss has heads"):
        continued(tmp_path, tmp_path, **DIET, adapt__heads=0.2)
    with pytest.raises(UserError, match=r"loss.diet_weight=1: expected 0 without init="):
        Setup(tiny_config(tmp_path / "run", loss__diet_weight=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("options", [DIET, {"adapt__heads": 0.3, "loss__diet_weight": 0.5}])
def test_a_resumed_run_equals_the_unbroken_one(first: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"adapt__blocks": 1, **options}
    whole = pretrain(continued(tmp_path / "whole", first, **options))
    with stopped_after(3, tmp_path / "parts", 6):
        pretrain(continued(tmp_path / "parts", first, **options))
    parts = pretrain(continued(tmp_path / "parts", first, resume=True, **options))
    one, two = ([line["total_loss"] for line in read_lines(out / "metrics.jsonl")] for out in (whole, parts))
    assert one == two
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(parts).items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_as_one(first: Path, tmp_path: Path, strategy: str) -> None:
    options = {"adapt__blocks": 1, "model__drop_path": 0.0, **DIET}
    pretrain(continued(tmp_path / "one", first, batch_size=6, **options))
    two = continued(tmp_path / "two", first, batch_size=3, parallel__strategy=strategy, **options)
    on_processes(2, pretrain_each, [two])
    losses = [[line["diet_loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    one, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_the_ways_that_are_compared_are_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    continuation = importlib.import_module("continuation")
    for config, options in continuation.METHODS.values():
        load_config(config, {"init": "x", "model.name": "vits14_reg0", **options})
