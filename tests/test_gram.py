"""Gram anchoring: the loss against its literal form, the teacher that is held to, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_step import CPU, FP32, NOW, new_batch
from training import loss_trace, read_lines, stopped_after, tiny_config

import dinoreg
from dinoreg.commands.main import main
from dinoreg.config.load import Config, load_config
from dinoreg.config.schema import DataConfig, ScheduleConfig
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.source import ScenesSource
from dinoreg.losses.gram import gram_loss, on_grid
from dinoreg.runtime import tiling
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from dinoreg.train.schedules import Schedules
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.step import StepResult, train_step


def literal(patches: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Pair by pair."""
    terms = []
    for own, held in zip(patches, anchors):
        for i in range(len(own)):
            for j in range(len(own)):
                cosines = [torch.cosine_similarity(tokens[i], tokens[j], dim=0) for tokens in (own, held)]
                terms.append((cosines[0] - cosines[1]) ** 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_value_and_gradient_are_those_of_all_pairs_written_out(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CPU_CHUNK", piece)  # image by image, and all at once
    generator = torch.Generator().manual_seed(0)
    patches, anchors = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=generator)
    results = []
    for loss in (gram_loss, literal):
        own = patches.clone().requires_grad_()
        value = loss(own, anchors)
        results.append((value.detach(), *torch.autograd.grad(3 * value, own)))
    torch.testing.assert_close(results[0], results[1])


def test_scale_turns_and_the_norm_of_patches_do_not_matter() -> None:
    patches = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))
    assert float(gram_loss(patches, 5 * patches @ turn)) == pytest.approx(0, abs=1e-12)
    assert 0 < float(gram_loss(patches, patches.flip(1))) <= 4


def test_patches_of_a_larger_image_come_to_the_same_places() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = torch.stack([rows, columns], dim=-1).reshape(1, 64, 2)
    small = on_grid(ramp, 4).unflatten(1, (4, 4))[0]
    inner = slice(1, 3)  # away from the border, where the kernel finds its last row again
    torch.testing.assert_close(small[inner, 0, 0], torch.tensor([2.5, 4.5]))
    torch.testing.assert_close(small[0, inner, 1], torch.tensor([2.5, 4.5]))
    assert on_grid(ramp, 8) is ramp


VIEWS = Views(CropSettings(24, 16, 2), AugmentSettings(), MaskSettings(), 8)


def held_state() -> tuple[TrainState, Config]:
    config = tiny_config(loss__gram_weight=2.0, model__drop_path=0.0)
    student, teacher = build_networks(config)
    anchor = build_networks(replace(config, seed=7))[1].backbone
    return TrainState(config, student, teacher, CPU, FP32, anchor), config


def step(state: TrainState, config: Config, gram: bool = True, accumulate: int = 1) -> StepResult:
    state.optim = replace(config.optim, accumulate=accumulate)
    return train_step(state, new_batch(), replace(NOW, gram=gram))


def test_a_step_holds_all_patches_of_the_masked_global_crops_to_those_that_the_anchor_sees() -> None:
    state, config = held_state()
    batch = new_batch()
    own, held = state.student.backbone(batch.global_crops, batch.mask), state.anchor(batch.global_crops)
    expected = 2.0 * literal(own.patches.detach(), held.patches.detach())
    assert float(step(state, config).losses["gram"]) == pytest.approx(float(expected), rel=1e-4)
    assert "gram" not in step(state, config, gram=False).losses  # before its time


def test_micro_batches_have_the_loss_of_the_whole_batch() -> None:
    whole, parts = (step(*held_state(), accumulate=accumulate) for accumulate in (1, 3))
    torch.testing.assert_close(whole.losses["gram"], parts.losses["gram"])
    torch.testing.assert_close(whole.norms, parts.norms, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_kept_when_its_time_has_come_and_again_after_each_period() -> None:
    schedules = Schedules(40, 1e-3, ScheduleConfig(gram_start=0.5, gram_every=0.2))
    assert [step for step in range(40) if schedules.at(step).renew] == [20, 28, 36]
    assert [schedules.at(step).gram for step in (0, 19, 20, 39)] == [False, False, True, True]
    once = Schedules(40, 1e-3, ScheduleConfig(gram_start=0.0))
    assert [step for step in range(60) if once.at(step).renew] == [0]
    state, _ = held_state()
    state.renew_anchor()
    for own, kept in zip(state.teacher.backbone.parameters(), state.anchor.parameters(), strict=True):
        assert torch.equal(own, kept)


def first(views: Views) -> Batch:
    with BatchLoader(ScenesSource(30, 64), views, DataConfig(workers=0), batch_size=4) as loader:
        return next(loader)


def test_crops_for_the_anchor_are_the_global_ones_mirrored_and_normalised_alone() -> None:
    plain = dict.fromkeys(("jitter_probability", "grayscale", "blur_global1", "blur_global2", "blur_local"), 0.0)
    views = replace(VIEWS, augment=AugmentSettings(solarize_global2=0.0, **plain))
    size = views.crops.global_size
    for num_local in (0, 2):
        crops = replace(views.crops, num_local=num_local)
        same = replace(views, crops=crops, clean_size=size)
        batch = first(same)
        assert torch.equal(batch.clean_crops, batch.global_crops)
        assert (batch.local_crops is None) == (num_local == 0)
        assert torch.equal(first(replace(same, clean_size=None)).global_crops, batch.global_crops)
    loud = replace(VIEWS, clean_size=2 * size)
    assert first(loud).clean_crops.shape == (8, 3, 2 * size, 2 * size)
    with pytest.raises(UserError, match=r"loss\.gram_size=33"):
        replace(views, clean_size=33)


HELD = {"loss__gram_weight": 1.0, "loss__gram_size": 64, "schedule__gram_start": 0.25, "schedule__gram_every": 0.5}


def test_a_run_that_was_stopped_goes_on_with_the_teacher_of_then(tmp_path: Path) -> None:
    pretrain(tiny_config(tmp_path / "whole", **HELD))
    with stopped_after(4, tmp_path / "parts"):
        pretrain(tiny_config(tmp_path / "parts", **HELD))
    pretrain(tiny_config(tmp_path / "parts", resume=True, **HELD))
    assert loss_trace(tmp_path / "whole") == loss_trace(tmp_path / "parts")
    values = [line.get("gram_loss") for line in read_lines(tmp_path / "parts" / "metrics.jsonl")]
    assert values[:2] == [None, None]
    assert all(np.isfinite(values[2:]))
    assert values == [line.get("gram_loss") for line in read_lines(tmp_path / "whole" / "metrics.jsonl")]


def test_a_run_begun_without_it_takes_it_up_when_it_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with stopped_after(5, out):
        pretrain(tiny_config(out))
    pretrain(tiny_config(out, resume=True, loss__gram_weight=1.0, schedule__gram_start=0.5))
    values = [line.get("gram_loss") for line in read_lines(out / "metrics.jsonl")]
    assert values[:5] == [None] * 5
    assert all(value is not None and value >= 0 for value in values[5:])


def test_a_run_is_held_to_one_network_and_to_none_of_random_weights() -> None:
    with pytest.raises(UserError, match=r"loss\.gram_weight=1"):
        tiny_config(loss__gram_weight=1.0, loss__anchor_weight=1.0)
    with pytest.raises(UserError, match=r"loss\.gram_weight=1: expected 0 without init="):
        load_config("highres_vits14_reg4").check_start()
    tiny_config(loss__gram_weight=1.0).check_start()
    tiny_config(loss__gram_weight=1.0, schedule__gram_start=0.0, resume=True).check_start()


@pytest.mark.slow
def test_the_shipped_last_stage_goes_on_from_a_run_at_larger_crops_and_ends_healthy(tmp_path: Path) -> None:
    small = [
        "model.name=vitt8_reg4",
        "model.dim=32",
        "model.depth=2",
        "model.heads=2",
        "head.prototypes=24",
        "device=cpu",
    ]
    small += ["batch_size=4", "data=scenes:count=50,size=80", "log.every=1", "probe.every=0", "crops.num_local=2"]
    first, out = pretrain(tiny_config(tmp_path / "first", steps=2, model__layerscale=1.0)), tmp_path / "run"
    sizes = ["crops.global_size=64", "crops.local_size=24", "crops.stages=[0.5:48/16]", "loss.gram_size=128", "steps=6"]
    assert main(["pretrain", "highres_vits14_reg4", f"init={first}", f"out={out}", *small, *sizes]) == 0
    lines = read_lines(out / "metrics.jsonl")
    assert ["gram_loss" in line for line in lines] == [False] + [True] * 5  # heads alone first
    assert all(0 < line["gram_loss"] < 4 for line in lines[1:])
    assert read_lines(out / "health" / "events.jsonl") == []
    assert "crops in stages: 48 and 16 px to step 3, then 64 and 24 px" in (out / "train.log").read_text()
    assert dinoreg.load(out).image_size == (64, 64)
