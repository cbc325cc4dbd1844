"""Continuing from weights: the stages of a run with `init=`, its anchor, its general probe, and resuming it."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_step import new_batch
from torch import Tensor
from training import given, loss_trace, read_lines, stopped_after, tiny_config

from dinoreg.checkpoint import format as checkpoint
from dinoreg.commands.main import main
from dinoreg.config.load import Config, load_config
from dinoreg.config.schema import AdaptConfig, ScheduleConfig
from dinoreg.losses.anchor import anchor_loss
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError
from dinoreg.scenes import render as scenes
from dinoreg.train.health import REMEDIES, Health
from dinoreg.train.loop import pretrain
from dinoreg.train.prepare import Setup
from dinoreg.train.probes import Measured, Probe
from dinoreg.train.schedules import Schedules
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.step import backward, teacher_targets
from dinoreg.weights.load import load

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to continue from."""
    return pretrain(tiny_config(tmp_path_factory.mktemp("first") / "run", steps=3))


def continued(out: Path, first: Path, **overrides: Any) -> Config:
    """Ten steps from `first`: three with a frozen backbone, three in which its rate rises."""
    stages = {"adapt__heads": 0.3, "adapt__warmup": 0.3, "loss__anchor_weight": 2.0}
    options = {"init": str(first), "steps": 10, "seed": 3, "checkpoint__every": 100, **stages}
    return tiny_config(out, **{**options, **overrides})


def teacher_of(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "teacher" / f"{checkpoint.step_name(step)}.safetensors")


# ----------------------------------------------------------------------------------------------------------------
# The loss


def test_the_anchor_loss_equals_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    cls, patches, cls_there, patches_there = (torch.randn(count, 7) for count in (4, 11, 4, 11))

    def mean_distance(here: Tensor, there: Tensor) -> float:
        return sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(here, there)) / len(here)

    expected = (mean_distance(cls, cls_there) + mean_distance(patches, patches_there)) / 2
    found = anchor_loss(cls, patches, cls_there, patches_there, torch.tensor(11.0))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_anchor_loss_is_zero_at_the_anchor_whatever_the_length_and_two_opposite() -> None:
    tokens, patches, six = torch.randn(3, 5), torch.randn(6, 5), torch.tensor(6.0)
    assert float(anchor_loss(3 * tokens, patches, tokens, 0.1 * patches, six)) == pytest.approx(0.0, abs=1e-6)
    assert float(anchor_loss(-tokens, -patches, tokens, patches, six)) == pytest.approx(2.0, abs=1e-5)
    assert anchor_loss(*(t.bfloat16() for t in (tokens, patches, tokens, patches)), six).dtype == torch.float32


def test_the_anchor_loss_pulls_the_first_network_only() -> None:
    here, there = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    anchor_loss(here, here, there, there, torch.tensor(3.0)).backward()
    assert here.grad is not None
    assert there.grad is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_pulls_every_visible_token_towards_the_anchors_of_the_whole_image(accumulate: int) -> None:
    """Gradients of a backward pass with the anchor, less those without it, against a literal computation."""
    config = tiny_config(model__drop_path=0.0, loss__koleo_weight=0.0, init="x", loss__anchor_weight=3.0)
    anchor = build_networks(tiny_config(seed=8))[0].backbone.requires_grad_(False).eval()
    batch = new_batch()

    def gradients(anchor: RegisterViT | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = TrainState(config, *build_networks(config), CPU, FP32, anchor)
        state.optim = replace(state.optim, accumulate=accumulate)
        losses = backward(state, batch, teacher_targets(state, batch, 0.05), seed=0)
        return losses, {name: p.grad for name, p in state.student.backbone.named_parameters() if p.grad is not None}

    losses, with_anchor = gradients(anchor)
    plain, without = gradients(None)
    student = build_networks(config)[0].backbone.train()
    here, there = student(batch.global_crops, batch.mask), anchor(batch.global_crops)
    cosine = torch.nn.functional.cosine_similarity
    if accumulate == 1:
        literal = 1.5 * (1 - cosine(here.cls, there.cls, dim=-1)).mean()
        literal = literal + 1.5 * (1 - cosine(here.patches, there.patches, dim=-1))[~batch.mask].mean()
        literal.backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(with_anchor[name] - without[name], parameter.grad, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(losses["anchor"], literal.detach(), atol=1e-6, rtol=1e-5)
    assert "anchor" not in plain
    torch.testing.assert_close(losses["total"], plain["total"] + losses["anchor"], atol=1e-5, rtol=1e-5)
    assert 0 < float(losses["anchor"]) <= 6


def test_without_a_weight_there_is_no_anchor_to_pay_for(first: Path, tmp_path: Path) -> None:
    setup = Setup(continued(tmp_path / "run", first, loss__anchor_weight=0.0))
    assert setup.init is not None
    assert setup.new_state().anchor is None


def test_the_anchor_is_not_computed_while_the_backbone_stands_still(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = RegisterViT.forward

    def counted(self: RegisterViT, *args: Any, **kwargs: Any) -> Any:
        calls.append(id(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RegisterViT, "forward", counted)
    setup = Setup(continued(tmp_path / "run", first))
    assert setup.init is not None
    pretrain(continued(tmp_path / "run", first))
    assert sorted(calls.count(network) for network in set(calls)) == [7, 10, 10]  # anchor, student, teacher
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert ["anchor_loss" in line for line in lines] == [False] * 3 + [True] * 7
    for line in lines:
        parts = sum(line[key] for key in line if key.endswith("_loss") and key != "total_loss")
        assert line["total_loss"] == pytest.approx(parts, rel=1e-5)
        assert line["loss"] == pytest.approx(parts + line["ibot_loss"] + line.get("koleo_loss", 0), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Stages


def test_the_backbones_rate_is_zero_then_rises_to_its_share_and_stays() -> None:
    schedules = Schedules(20, 1e-2, ScheduleConfig(), AdaptConfig(heads=0.25, warmup=0.2, lr=0.5))
    rates = [schedules.at(step).backbone for step in range(20)]
    assert rates[:5] == [0.0] * 5
    assert rates[5:9] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[9:] == [0.5] * 11


def test_a_run_without_init_knows_no_stages() -> None:
    schedules = Schedules(20, 1e-2, ScheduleConfig())
    assert {schedules.at(step).backbone for step in range(20)} == {1.0}
    config = tiny_config("unused", adapt__heads=0.5, adapt__layer_decay=0.1, adapt__lr=0.01)
    setup = Setup(config)
    assert setup.init is None
    assert setup.schedules.at(0).backbone == 1.0
    multipliers = {group["lr_multiplier"] for group in setup.new_state().optimizer.param_groups}
    assert min(multipliers) == pytest.approx(0.9**3 * 0.2)


def test_first_only_the_heads_learn_and_then_the_backbone_from_its_last_layer_down(first: Path, tmp_path: Path) -> None:
    config = continued(tmp_path / "run", first, checkpoint__every=1, checkpoint__keep=20, adapt__layer_decay=0.5)
    out = pretrain(config)
    start = load(first).state_dict()
    after_stage = teacher_of(out, 3)
    for name, value in start.items():
        assert torch.equal(after_stage[f"backbone.{name}"], value), name
    heads = [name for name in after_stage if name.startswith("dino_head.mlp") and name.endswith("weight")]
    assert heads
    for name in heads:
        assert not torch.equal(after_stage[name], teacher_of(out, 1)[name]), name
    end = teacher_of(out, 10)
    moved = {name: (end[f"backbone.{name}"] - value).norm() / value.norm() for name, value in start.items()}
    assert moved["blocks.1.mlp.fc1.weight"] > moved["blocks.0.mlp.fc1.weight"] > moved["patch_embed.proj.weight"] > 0
    lines = read_lines(out / "metrics.jsonl")
    assert [line["backbone_lr"] for line in lines[:3]] == [0.0] * 3
    assert ["grad_norm_backbone" in line for line in lines] == [False] * 3 + [True] * 7
    for line, share in zip(lines[3:], [1 / 3, 2 / 3] + [1] * 5):
        assert line["backbone_lr"] == pytest.approx(line["lr"] * 0.1 * share)
    assert read_lines(out / "health" / "events.jsonl") == []  # a frozen backbone is no frozen student


def test_the_lower_of_the_two_layer_decays_holds(first: Path) -> None:
    assert continued(Path("x"), first).layer_decay() == 0.75
    assert continued(Path("x"), first, optim__layer_decay=0.6).layer_decay() == 0.6
    assert continued(Path("x"), first, adapt__layer_decay=1.0).layer_decay() == 0.9
    assert tiny_config("x", adapt__layer_decay=0.3).layer_decay() == 0.9


def test_without_stages_a_start_from_weights_takes_the_rates_of_a_fresh_run(first: Path, tmp_path: Path) -> None:
    naive = {"adapt__heads": 0.0, "adapt__warmup": 0.0, "adapt__lr": 1.0, "adapt__layer_decay": 1.0}
    setup = Setup(continued(tmp_path / "run", first, **naive))
    fresh = Setup(tiny_config(tmp_path / "other", steps=10, seed=3))
    assert [setup.schedules.at(step) for step in range(10)] == [fresh.schedules.at(step) for step in range(10)]
    one, two = (prepared.new_state().optimizer.param_groups for prepared in (setup, fresh))
    assert [group["lr_multiplier"] for group in one] == [group["lr_multiplier"] for group in two]


# ----------------------------------------------------------------------------------------------------------------
# The copy in the run folder, and resuming


def test_the_run_folder_keeps_the_weights_it_started_from_with_their_digest(first: Path, tmp_path: Path) -> None:
    out = pretrain(continued(tmp_path / "run", first, steps=1))
    kept, start = load(out / "init.safetensors").state_dict(), load(first).state_dict()
    assert kept.keys() == start.keys()
    assert all(torch.equal(kept[name], start[name]) for name in start)
    source = json.loads((out / "init.json").read_text())["init"]
    assert source["source"] == str(first)
    assert source["source_sha256"] == digest(Path(source["path"]))
    assert Path(source["path"]).parent == first / "teacher"
    assert not (tmp_path / "fresh" / "init.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 6])
def test_a_run_resumed_in_any_stage_equals_the_unbroken_one_though_its_source_is_gone(
    first: Path, tmp_path: Path, stop: int
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    whole = pretrain(continued(tmp_path / "whole", source))
    with stopped_after(stop, tmp_path / "parts", 10):
        pretrain(continued(tmp_path / "parts", source))
    shutil.rmtree(source)
    parts = pretrain(continued(tmp_path / "parts", source, resume=True))
    for key in ("total_loss", "grad_norm_dino_head", "backbone_lr"):
        one, two = ([line[key] for line in read_lines(out / "metrics.jsonl")] for out in (whole, parts))
        assert one == two
    for name, value in teacher_of(whole, 10).items():
        assert torch.equal(teacher_of(parts, 10)[name], value), name


def test_a_resumed_run_keeps_its_start(first: Path, tmp_path: Path) -> None:
    out = pretrain(continued(tmp_path / "run", first, steps=1))
    with pytest.raises(UserError, match=r"init=elsewhere: the run in .* was started from init="):
        pretrain(continued(out, first, steps=2, resume=True, init="elsewhere"))
    fresh = pretrain(tiny_config(tmp_path / "fresh", steps=1))
    with pytest.raises(UserError, match="was started without init="):
        pretrain(continued(fresh, first, steps=2, resume=True))


def test_a_copy_that_was_altered_is_refused(first: Path, tmp_path: Path) -> None:
    out = pretrain(continued(tmp_path / "run", first, steps=1))
    content = bytearray((out / "init.safetensors").read_bytes())
    content[-3] ^= 1
    (out / "init.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        pretrain(continued(out, first, steps=2, resume=True))


def test_a_start_that_cannot_be_read_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["data=scenes:count=40", f"out={out}", "steps=1", "device=cpu"]
    assert main(["pretrain", "quickstart", f"init={tmp_path / 'nowhere'}", *options]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["pretrain", "quickstart", "loss.anchor_weight=1", *options]) == 2
    assert "loss.anchor_weight=1: expected 0 without init=" in capsys.readouterr().err
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------------
# The general probe


def figures(monkeypatch: pytest.MonkeyPatch, general: list[float]) -> None:
    """Let the general probe (of 40 images) measure these, in turn, and the domain's 0.5 always."""
    values: Iterator[float] = iter(general)

    def measure(self: Probe, *args: object) -> Measured:
        return given(next(values) if len(self.images) == 40 else 0.5, len(self.images) // 2)

    monkeypatch.setattr(Probe, "measure", measure)


PROBED = {
    "probe__every": 2,
    "probe__data": "scenes:count=30,first=500",
    "probe__general": "scenes:count=40,first=900",
    "probe__max_share": 1.0,
}


def test_both_probes_are_followed_side_by_side_from_before_the_first_step(first: Path, tmp_path: Path) -> None:
    out = pretrain(continued(tmp_path / "run", first, **PROBED))
    lines = read_lines(out / "probe.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10]
    ends = ("", "_low", "_high", "_chance", "_majority")
    measured = {"rankme", *(f"knn_top1{end}" for end in ends)}
    names = {"step", "probe_time", *measured, *(f"general_{name}" for name in measured)}
    against = {"start_step", *(f"{of}knn_top1_start" for of in ("", "general_"))}
    against |= {f"knn_top1_gain{end}" for end in ("", "_low", "_high", "_verdict")}
    found = [{key for key in line if not key.startswith("dse")} for line in lines]
    assert found == [names, *(names | against for _ in lines[1:])]
    assert all(line["general_knn_top1_start"] == lines[0]["general_knn_top1"] for line in lines[1:])
    setup = Setup(continued(tmp_path / "again", first, **PROBED))
    assert setup.probe is not None
    assert setup.general is not None
    for prefix, probe in (("", setup.probe), ("general_", setup.general)):
        expected = probe.measure(load(first), CPU, FP32).values
        for key in ("rankme", "knn_top1"):
            assert lines[0][prefix + key] == pytest.approx(expected[key], rel=1e-5), prefix + key
    assert lines[0]["general_rankme"] == lines[1]["general_rankme"]  # the backbone has not moved yet
    assert lines[0]["general_rankme"] != lines[-1]["general_rankme"]


def test_a_fall_beyond_the_margin_is_warned_of_once_with_its_remedy(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures(monkeypatch, [0.40, 0.38, 0.36, 0.34, 0.30, 0.30])
    out = pretrain(continued(tmp_path / "run", first, probe__margin=0.05, **PROBED))
    events = read_lines(out / "health" / "events.jsonl")
    assert [(event["name"], event["step"]) for event in events] == [("forgetting", 6)]
    message = "k-NN on probe.general fell from 40.0% at step 0 to 34.0%, by more than probe.margin (5 points)"
    assert events[0]["message"] == message
    assert events[0]["remedy"] == REMEDIES["forgetting"]
    assert f"health: forgetting at step 6: {message}" in capsys.readouterr().err
    # What `best` follows is the run's own domain, which did not get better.
    assert "best" not in checkpoint.verify(out / "checkpoints" / "step_0000010")["history"]


def test_a_fall_within_the_margin_is_no_reason_to_warn(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures(monkeypatch, [0.40, 0.36, 0.44, 0.36, 0.36, 0.36])
    out = pretrain(continued(tmp_path / "run", first, probe__margin=0.05, **PROBED))
    assert read_lines(out / "health" / "events.jsonl") == []
    exactly = Health(24, grace=0)
    assert exactly.forgetting(0.5, 0, 0.25, 0.25) == []
    assert len(exactly.forgetting(0.5, 0, 0.2499, 0.25)) == 1


@pytest.mark.slow
def test_a_resumed_run_compares_with_what_it_started_with(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures(monkeypatch, [0.40, 0.40, 0.37, 0.33, 0.33, 0.33])
    out = pretrain(continued(tmp_path / "run", first, **{**PROBED, "steps": 4, "probe__margin": 0.05}))
    pretrain(continued(out, first, **{**PROBED, "resume": True, "probe__margin": 0.05}))
    assert [line["step"] for line in read_lines(out / "probe.jsonl")] == [0, 2, 4, 6, 8, 10]
    events = read_lines(out / "health" / "events.jsonl")
    assert [event["step"] for event in events] == [6]
    assert "from 40.0% at step 0" in events[0]["message"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_measures_its_start_once(first: Path, tmp_path: Path) -> None:
    config = continued(tmp_path / "run", first, **PROBED)
    out = pretrain(config)
    shutil.rmtree(out / "checkpoints")
    (out / "status.json").unlink()  # which would say that something had been saved
    pretrain(continued(tmp_path / "run", first, resume=True, **PROBED))
    assert [line["step"] for line in read_lines(out / "probe.jsonl")] == [0, 2, 4, 6, 8, 10]


def test_what_cannot_be_probed_as_general_is_refused_by_its_name(first: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            Setup(continued(tmp_path / "run", first, **{**PROBED, **options}))

    refused("nowhere", probe__general=str(tmp_path / "nowhere"))
    refused("probe.general=scenes:count=3: expected at least 4 readable", probe__general="scenes:count=3")
    refused("probe.general=scenes.*needs at least 4 images", data__source="scenes:count=3,size=32", probe__data=None)
    setup = Setup(continued(tmp_path / "run", first, **{**PROBED, "probe__every": 0, "probe__general": "nowhere"}))
    assert setup.general is None


# ----------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("adapt.heads", 1.0, "[0, 1)"),
        ("adapt.heads", -0.1, "[0, 1)"),
        ("adapt.warmup", 0.9, "0.8"),  # what the default heads=0.2 leaves
        ("adapt.lr", 0.0, "(0, 1]"),
        ("adapt.lr", 1.5, "(0, 1]"),
        ("adapt.layer_decay", 0.0, "(0, 1]"),
        ("adapt.layer_decay", 1.1, "(0, 1]"),
        ("loss.anchor_weight", -1.0, "at least 0"),
        ("probe.margin", 0.0, "(0, 1)"),
        ("probe.margin", 1.0, "(0, 1)"),
    ],
)
def test_options_out_of_range_are_refused_by_name(key: str, value: float, accepted: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("quickstart", {key: value, "init": "x"})
    given, _, expected = str(refused.value).partition(": expected ")
    assert given.partition("=")[0] == key
    assert float(given.partition("=")[2]) == value
    assert accepted in expected


def test_a_fresh_run_is_what_it_was(tmp_path: Path) -> None:
    """No new names in its metrics, no copy of weights."""
    out = pretrain(tiny_config(tmp_path / "run", probe__every=4, probe__num_images=20))
    assert [line["step"] for line in read_lines(out / "probe.jsonl")] == [0, 4, 8]
    assert not {"backbone_lr", "anchor_loss"} & set(read_lines(out / "metrics.jsonl")[0])
    assert not list(out.glob("init*"))
    assert len(loss_trace(out)) == 8


# ----------------------------------------------------------------------------------------------------------------
# The measurement of docs/results/continue.md


def test_shifted_scenes_keep_the_class_and_the_outlines_and_change_what_fills_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    forgetting = importlib.import_module("forgetting")
    for index in (3, 30_000_017):
        scene = scenes.render(index, 40)
        picture, label = forgetting.shifted(index, 40)
        assert picture.shape == (40, 40, 3)
        assert label == scene.label
        assert np.array_equal(picture, forgetting.shifted(index, 40)[0])
        red, green, blue = picture.reshape(-1, 3).astype(int).T
        assert (green >= np.maximum(red, blue)).mean() > 0.95  # one hue
        edge = np.diff(scene.instances.astype(int), axis=1) != 0
        steps = np.abs(np.diff(picture.astype(float).mean(axis=2), axis=1))
        assert steps[edge].mean() > 1.5 * np.median(steps)


def test_the_ways_that_are_compared_are_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    forgetting = importlib.import_module("forgetting")
    for options in forgetting.WAYS.values():
        load_config("quickstart", {"init": "x", **options})
    naive = load_config("quickstart", {"init": "x", **forgetting.NAIVE})
    assert naive.layer_decay() == load_config("quickstart").layer_decay()


def test_weights_for_three_channels_start_a_run_on_one_when_told_how(first: Path, tmp_path: Path) -> None:
    source = tmp_path / "grey"
    source.mkdir()
    grey = {"model__in_channels": 1, "augment__mean": [0.5], "augment__std": [0.25], "data__source": str(source)}
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 44), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    with pytest.raises(UserError, match=r"adapt\.channels"):
        pretrain(continued(tmp_path / "refused", first, **grey))
    run = pretrain(continued(tmp_path / "run", first, adapt__channels="mean", steps=2, **grey))
    before = teacher_of(first, 3)["backbone.patch_embed.proj.weight"]
    kept = load_file(run / "init.safetensors")["backbone.patch_embed.proj.weight"]
    torch.testing.assert_close(kept, before.sum(dim=1, keepdim=True))
    with pytest.raises(UserError, match=r"adapt\.channels=max"):
        continued(tmp_path / "wrong", first, adapt__channels="max")
