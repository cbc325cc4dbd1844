"""Distillation: a student of another size learns from a frozen network, and its run is a run like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import on_processes, pretrain_each
from safetensors.torch import load_file
from test_step import new_batch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training import read_lines, tiny_config

from dinoreg.checkpoint import format as checkpoint
from dinoreg.commands.main import main
from dinoreg.config.load import Config
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.losses.distill import distill_loss, resample_tokens
from dinoreg.models.vit import RegisterViT
from dinoreg.plan.devices import find_device
from dinoreg.plan.job import describe
from dinoreg.plan.memory import checkpoint_of, memory_of, operations_of
from dinoreg.runtime.errors import UserError
from dinoreg.train.distill import distill_backward
from dinoreg.train.loop import pretrain
from dinoreg.train.prepare import Setup
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.tutor import Tutor, as_cut
from dinoreg.weights.load import load, load_reported

CPU, FP32 = torch.device("cpu"), torch.float32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network is learnt from: patches of 8, 32 wide."""
    return pretrain(
        tiny_config(tmp_path_factory.mktemp("first") / "run", steps=2, augment__mean=MEAN, augment__std=STD)
    )


def distilled(out: Path | None, first: Path | str, **overrides: Any) -> Config:
    """A student with patches of 16, 48 wide, on crops of 32 pixels, of which the other network sees 48."""
    student = {"model__name": "vitt16_reg2", "model__dim": 48, "distill": str(first), "distill_size": 48}
    return tiny_config(out, **{**student, "steps": 6, "checkpoint__every": 3, **overrides})


def teacher_of(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "teacher" / f"{checkpoint.step_name(step)}.safetensors")


# ----------------------------------------------------------------------------------------------------------------
# The loss


def test_the_loss_equals_a_loop_over_tokens() -> None:
    here, there, center = torch.randn(3, 4, 5), 3 + torch.randn(3, 4, 5), torch.full((1, 5), 3.0)
    expected = 0.0
    for own, target in zip(here.flatten(0, 1), there.flatten(0, 1)):
        target = target - center[0]
        expected += float(1 - own @ target / (own.norm() * target.norm())) / 12
    assert float(distill_loss(here, there, center)) == pytest.approx(expected, rel=1e-5)
    assert float(distill_loss(2 * (there - center), there, center)) == pytest.approx(0.0, abs=1e-6)


def test_tokens_of_another_grid_keep_their_places() -> None:
    # A plane in both directions stays one: the centres of 2 x 3 cells lie at these shares of the 4 x 6 cells' range.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    plane = torch.stack([rows, columns, rows + columns], dim=-1).view(1, 24, 3)
    small = resample_tokens(plane, (4, 6), (2, 2))
    assert small.shape == (1, 4, 3)
    torch.testing.assert_close(small[..., 2], small[..., 0] + small[..., 1])
    torch.testing.assert_close(small.mean(dim=1), plane.mean(dim=1))
    assert bool(small[0, 0, 0] < small[0, 2, 0]) and bool(small[0, 0, 1] < small[0, 1, 1])  # noqa: PT018
    assert resample_tokens(plane, (4, 6), (4, 6)) is plane


def guided(config: Config) -> TrainState:
    """The state of a run that learns from a random network, 40 wide with patches of 8, whose crops are 48 pixels."""
    network = RegisterViT(image_size=48, patch_size=8, dim=40, depth=2, heads=2, num_registers=1, layerscale=None)
    tutor = Tutor(NativeEncoder(network, "other", {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}), 48, 32, MEAN, STD)
    return TrainState(config, *build_networks(config, tutor), CPU, FP32, tutor=tutor)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_has_the_gradients_of_the_distances_written_out(accumulate: int) -> None:
    config = distilled(None, "x", model__drop_path=0.0, loss__distill_patch_weight=0.5)
    state = guided(config)
    for center in state.centers.values():
        center.normal_()
    crops = torch.randn(12, 3, 48, 48)
    losses, features, centers = distill_backward(state, crops, [1] * accumulate, frozen=False)

    tutor, student = state.tutor, build_networks(config, state.tutor)[0]
    assert tutor is not None
    small = F.interpolate(crops, (32, 32), mode="bicubic", antialias=True)
    tokens = student.backbone(small)
    pixels = (crops * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    shown = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    with torch.no_grad():
        seen = tutor.network(shown)
    head, targets = student.distill_head, seen.patches.transpose(1, 2).unflatten(2, (6, 6))
    targets = F.interpolate(targets, (2, 2), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    cosine = F.cosine_similarity
    of_cls = 1 - cosine(head.cls(tokens.cls), seen.cls - state.centers["cls"], dim=-1).mean()
    of_patches = 0.5 - 0.5 * cosine(head.patch(tokens.patches), targets - state.centers["patch"], dim=-1).mean()
    (of_cls + of_patches).backward()

    torch.testing.assert_close(losses["distill_cls"], of_cls.detach())
    torch.testing.assert_close(losses["distill_patch"], of_patches.detach())
    torch.testing.assert_close(losses["total"], losses["distill_cls"] + losses["distill_patch"])
    torch.testing.assert_close(features, tokens.cls.detach())
    torch.testing.assert_close(centers["cls"], 0.9 * state.centers["cls"] + 0.1 * seen.cls.mean(dim=0))
    torch.testing.assert_close(centers["patch"], 0.9 * state.centers["patch"] + 0.1 * seen.patches.mean(dim=(0, 1)))
    for (name, own), literal in zip(state.student.named_parameters(), student.parameters(), strict=True):
        assert (own.grad is None) == (literal.grad is None) == (name == "backbone.mask_token"), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, literal.grad, msg=name, atol=1e-6, rtol=1e-4)


def test_while_the_backbone_is_frozen_only_the_projections_learn() -> None:
    config = distilled(None, "x")
    state = guided(config)
    distill_backward(state, new_batch().global_crops, [1], frozen=True)
    learning = {name for name, parameter in state.student.named_parameters() if parameter.grad is not None}
    assert learning == {f"distill_head.{kind}.{part}" for kind in ("cls", "patch") for part in ("weight", "bias")}


def test_a_crop_is_cut_at_the_larger_size() -> None:
    tutor, crops = guided(distilled(None, "x")).tutor, distilled(None, "x").crops
    assert as_cut(None, crops, 16) == (crops, 16)
    cut, patch_size = as_cut(tutor, crops, 16)
    assert (cut.global_size, patch_size) == (48, 8)


# ----------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.slow
def test_a_run_on_the_command_line_learns_and_exports_a_plain_backbone(first: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "student.yaml"
    file.write_text(
        "{model: {name: vitt16_reg2, dim: 48, depth: 2, heads: 2, layerscale: none, drop_path: 0.0}, batch_size: 6,"
        " crops: {global_size: 32}, probe: {every: 0}, log: {every: 1}, optim: {lr: 1.0e-2}, steps: 25,"
        " schedule: {momentum: [0.5, 0.5]}, data: {source: 'scenes:count=12,size=40', workers: 1}}"
    )
    assert main(["pretrain", str(file), f"out={out}", f"distill={first}", "device=cpu", "precision=fp32"]) == 0
    lines = read_lines(out / "metrics.jsonl")
    assert {"distill_cls_loss", "distill_patch_loss", "feature_rank", "grad_norm_distill_head"} <= lines[0].keys()
    assert not {"dino_global_crops_loss", "ibot_loss", "koleo_loss", "teacher_entropy"} & lines[0].keys()
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["distill_cls_loss"] + lines[-1]["distill_patch_loss"])
    assert "from here to step" not in (out / "train.log").read_text()  # the loader is opened once
    losses = [line["loss"] for line in lines]
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:5]) / 5
    # What is exported is the moving average, without the projections.
    found = load_reported(out)
    assert (found.model.dim, found.model.patch_size, found.model.num_registers) == (48, 16, 2)
    assert {name.partition(".")[0] for name in found.weights.left_out} == {"distill_head"}
    assert torch.equal(found.model.patch_embed.proj.weight, teacher_of(out, 25)["backbone.patch_embed.proj.weight"])


def test_a_resumed_run_equals_the_unbroken_one(first: Path, tmp_path: Path) -> None:
    whole = pretrain(distilled(tmp_path / "whole", first))
    parts = distilled(tmp_path / "parts", first)
    pretrain(parts)
    for path in (tmp_path / "parts").glob("*/step_0000006*"):  # as if it had been killed before these were written
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pretrain(distilled(tmp_path / "parts", first, resume=True))
    for key in ("loss", "grad_norm_backbone", "grad_norm_distill_head"):
        one, two = (
            {line["step"]: line[key] for line in read_lines(out / "metrics.jsonl")}
            for out in (whole, Path(str(parts.out)))
        )
        assert one == two
    for name, value in teacher_of(whole, 6).items():
        assert torch.equal(teacher_of(Path(str(parts.out)), 6)[name], value), name


@pytest.mark.slow
def test_a_resumed_run_keeps_the_network_that_it_learns_from(first: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    out = pretrain(distilled(tmp_path / "run", source, steps=3))
    with pytest.raises(UserError, match=r"distill=elsewhere: the run in .* was started from distill="):
        pretrain(distilled(out, "elsewhere", resume=True))
    pretrain(tiny_config(source, steps=2, seed=4, overwrite=True))  # other weights under the same name
    with pytest.raises(UserError, match="was distilled from other weights"):
        pretrain(distilled(out, source, resume=True))


def test_what_does_not_fit_is_refused_before_anything_is_written(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for options, message in (
        ({"distill_size": 44}, "distill_size=44: expected a multiple of the patch size 8"),
        ({"model__in_channels": 1, "distill_size": None}, "a network of 1 channels, as crops have; it takes 3"),
        ({"distill": None}, "distill: missing"),
    ):
        with pytest.raises(UserError, match=message):
            Setup(distilled(out, **{"first": first, **options}))
    with pytest.raises(UserError, match=r"loss.anchor_weight=1: expected 0 with distill="):
        distilled(out, first, loss__anchor_weight=1.0)
    shipped = ["pretrain", "distill_vitt16_reg4", "data=scenes:count=40", f"out={out}", "device=cpu"]
    assert main(shipped) == 2
    assert "distill=WEIGHTS" in capsys.readouterr().err
    assert main([*shipped, f"distill={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does_and_can_be_resumed(first: Path, tmp_path: Path, strategy: str) -> None:
    options = {"model__drop_path": 0.0, "parallel__strategy": strategy, "parallel__check_every": 2, "steps": 6}
    alone = pretrain(distilled(tmp_path / "alone", first, **options))
    half = distilled(tmp_path / "both", first, batch_size=3, **options)
    longer = distilled(tmp_path / "both", first, batch_size=3, resume=True, **{**options, "steps": 8})
    on_processes(2, pretrain_each, [half, longer])
    one, two = (read_lines(out / "metrics.jsonl") for out in (alone, tmp_path / "both"))
    for a, b in zip(one, two[:6], strict=True):
        for key in ("loss", "distill_cls_loss", "grad_norm_backbone", "feature_rank"):
            assert b[key] == pytest.approx(a[key], rel=1e-3), (a["step"], key)
    assert [line["step"] for line in two] == list(range(1, 9))
    assert load(tmp_path / "both").dim == 48


# ----------------------------------------------------------------------------------------------------------------
# The plan


def test_a_plan_counts_the_network_that_is_mean_count(first: Path) -> None:
    config = distilled(None, first)
    job = describe(config, 1, 1, find_device("h100"))
    operations, memory = operations_of(job), memory_of(job)
    tutor = job.sizes.tutor
    assert tutor is not None
    with FlopCounterMode(display=False) as counter:
        tutor.tokens(torch.rand(2 * config.batch_size, 3, 48, 48))
    # Which that counter does not know:
    attention = 2 * config.batch_size * tutor.encoder.depth * 4 * (1 + 4 + 36) ** 2 * tutor.encoder.dim
    assert operations.tutor == (counter.get_total_flops() + attention) / config.batch_size
    assert operations.teacher == 0
    parameters = sum(p.numel() for p in load(first).parameters())
    assert memory.moments[memory.peak]["tutor weights"] == 4 * parameters
    assert checkpoint_of(job).size == 16 * job.sizes.student + 2 * 4 * tutor.encoder.dim
