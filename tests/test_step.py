from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training import tiny_config

from dinoreg.config.load import Config
from dinoreg.data.loader import Batch
from dinoreg.data.masks import mask_tensors
from dinoreg.models import vit
from dinoreg.models.stochastic_depth import Kept, draw_kept, token_rows
from dinoreg.train.micro_batch import micro_batches
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.step import (
    StepResult,
    backward,
    koleo_of_views,
    student_losses,
    teacher_targets,
    train_step,
)

NOW = Now(lr=1e-2, last_layer_lr=1e-2, weight_decay=0.05, momentum=0.9, teacher_temp=0.05)
CPU, FP32 = torch.device("cpu"), torch.float32


def new_state(config: Config, device: torch.device = CPU) -> TrainState:
    state = TrainState(config, *build_networks(config), device, FP32)
    with torch.no_grad():  # a teacher of its own, and registers that matter
        for parameter in state.teacher.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
            parameter.add_(0.05 * noise.to(device))
    return state


def new_batch(num_images: int = 6, num_local: int = 2, seed: int = 0, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2 * num_images, 16, generator=generator) < 0.3
    mask[::2] = False
    if not masked:
        mask[:] = False
    indices, weights = mask_tensors(mask)
    return Batch(
        global_crops=torch.randn(2 * num_images, 3, 32, 32, generator=generator),
        local_crops=torch.randn(num_local * num_images, 3, 16, 16, generator=generator) if num_local else None,
        mask=mask,
        mask_indices=indices,
        mask_weights=weights,
        hidden=mask.sum(dim=1).numpy(),
        sample_ids=torch.arange(num_images).numpy(),
        position=num_images,
        data_time=0.0,
    )


def step(state: TrainState, batch: Batch) -> StepResult:
    return train_step(state, batch, NOW)


def literal_losses(state: TrainState, batch: Batch, config: Config) -> dict[str, torch.Tensor]:
    """The total of DINOv2 §4 written out term by term, image by image, without packing."""
    loss, num_images = config.loss, len(batch.sample_ids)
    student, teacher = state.student, state.teacher

    def entropy(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -(target * F.log_softmax(logits / loss.student_temp, dim=-1)).sum()

    with torch.no_grad():
        seen = teacher["backbone"](batch.global_crops)
        cls_targets = F.softmax((teacher["dino_head"](seen.cls) - state.centers["dino"]) / NOW.teacher_temp, -1)
    shown = student["backbone"](batch.global_crops, batch.mask)
    small = student["backbone"](batch.local_crops)
    global_logits = student["dino_head"](shown.cls)
    local_logits = student["dino_head"](small.cls)
    num_local = len(local_logits) // num_images
    terms = 2 + 2 * num_local
    global_loss, local_loss = torch.zeros(()), torch.zeros(())
    for image in range(num_images):
        one, two = image, num_images + image
        global_loss = global_loss + entropy(cls_targets[two], global_logits[one]) / num_images / terms
        global_loss = global_loss + entropy(cls_targets[one], global_logits[two]) / num_images / terms
        for crop in range(num_local):
            for view in (one, two):
                row = local_logits[crop * num_images + image]
                local_loss = local_loss + entropy(cls_targets[view], row) / num_images / terms
    ibot = torch.zeros(())
    for crop in range(2 * num_images):
        hidden = batch.mask[crop].nonzero()[:, 0].tolist()
        for patch in hidden:
            with torch.no_grad():
                logits = teacher["dino_head"](seen.patches[crop, patch][None])[0]
                target = F.softmax((logits - state.centers["ibot"][0]) / NOW.teacher_temp, -1)
            predicted = student["dino_head"](shown.patches[crop, patch][None])[0]
            ibot = ibot + entropy(target, predicted) / len(hidden) / (2 * num_images)
    koleo = torch.zeros(())
    for view in range(2):
        rows = F.normalize(shown.cls[view * num_images : (view + 1) * num_images], dim=-1)
        for i in range(num_images):
            nearest = min((rows[i] - rows[j]).norm() for j in range(num_images) if j != i)
            koleo = koleo - nearest.log() / num_images
    return {
        "dino_global": global_loss,
        "dino_local": local_loss,
        "ibot": ibot,
        "koleo": loss.koleo_weight * koleo,
    }


def test_a_step_has_the_losses_and_gradients_of_the_sums_written_out() -> None:
    config = tiny_config(model__drop_path=0.0)
    state, batch = new_state(config), new_batch()
    state.centers["dino"].normal_(generator=torch.Generator().manual_seed(1))
    expected = literal_losses(state, batch, config)
    sum(expected.values()).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for p in state.student.parameters()]
    state.optimizer.zero_grad()

    targets = teacher_targets(state, batch, NOW.teacher_temp)
    losses = backward(state, batch, targets, seed=0)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["total"], sum(expected.values()).detach(), atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    for parameter, gradient in zip(state.student.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_gpu_takes_the_cpus_step(centering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model__drop_path=0.3, model__layerscale=0.5, loss__centering=centering)

    def drawn_on_the_cpu(shapes: Any, rates: Any, device: torch.device) -> list[Kept]:
        kept = []
        for each in draw_kept(shapes, rates, CPU):
            tokens = token_rows(shapes, [index[None] for index in each.images])[0].to(device)
            images = [index.to(device) for index in each.images]
            kept.append(Kept(images, tokens if device.type == "cuda" else None, each.zero.to(device)))
        return kept

    monkeypatch.setattr(vit, "draw_kept", drawn_on_the_cpu)
    results = []
    for device in (CPU, torch.device("cuda")):
        state, batch = new_state(config, device), new_batch()
        tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        taken = step(state, replace(batch, **tensors))
        values = [*taken.losses.values(), *taken.norms.values(), *(p.grad for p in state.student.parameters())]
        results.append([value.cpu() for value in values])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("separate", [False, True])
def test_micro_batches_give_the_losses_and_gradients_of_the_whole_batch(centering: str, separate: bool) -> None:
    config = tiny_config(model__drop_path=0.0, loss__centering=centering, head__separate=separate)
    batch = new_batch()
    results = []
    for accumulate in (1, 3):
        state = new_state(config)
        state.optim = replace(state.optim, accumulate=accumulate)
        targets = teacher_targets(state, batch, NOW.teacher_temp)
        losses = backward(state, batch, targets, seed=0)
        results.append((losses, targets, [p.grad for p in state.student.parameters()]))
    (whole, whole_targets, whole_gradients), (parts, parts_targets, parts_gradients) = results
    torch.testing.assert_close(parts_targets.dino, whole_targets.dino)
    torch.testing.assert_close(parts_targets.ibot, whole_targets.ibot)
    torch.testing.assert_close(parts_targets.centers, whole_targets.centers)
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-5)
    for ours, expected in zip(parts_gradients, whole_gradients):
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-3)


def test_micro_batches_replay_drop_path_in_both_passes() -> None:
    config = tiny_config(model__drop_path=0.4, optim__accumulate=3)
    state, batch = new_state(config), new_batch()
    targets = teacher_targets(state, batch, 0.05)
    losses = backward(state, batch, targets, seed=11)

    tokens = []
    for index, part in enumerate(micro_batches(batch, 3)):
        torch.manual_seed(11 * 1_000_003 + index)
        tokens.append((part.rows, student_losses(state, part, targets)[1]))
    rows = torch.cat([rows for rows, _ in tokens]).argsort()
    features = torch.cat([found for _, found in tokens])[rows]
    torch.testing.assert_close(losses["koleo"], config.loss.koleo_weight * koleo_of_views(features.detach()))


def test_micro_batches_hold_every_crop_and_masked_patch_once() -> None:
    batch = new_batch()
    parts = list(micro_batches(batch, 2))
    rows = torch.cat([part.rows for part in parts])
    assert sorted(rows.tolist()) == list(range(12))
    assert sorted(torch.cat([part.masked_rows for part in parts]).tolist()) == list(range(len(batch.mask_indices)))
    for part in parts:
        torch.testing.assert_close(part.global_crops, batch.global_crops[part.rows])
        assert torch.equal(part.mask.flatten().nonzero()[:, 0], part.mask_indices.sort().values)
        torch.testing.assert_close(part.mask_weights, batch.mask_weights[part.masked_rows])


def test_the_teacher_sees_unmasked_crops_and_gets_no_gradient() -> None:
    config = tiny_config(model__drop_path=0.0)
    state = new_state(config)
    clean, hidden = new_batch(masked=False), new_batch()
    one = teacher_targets(state, clean, 0.05)
    two = teacher_targets(state, hidden, 0.05)
    assert torch.equal(one.dino, two.dino)
    step(state, hidden)
    assert all(parameter.grad is None for parameter in state.teacher.parameters())


def test_targets_use_the_centre_of_earlier_steps_only() -> None:
    config = tiny_config()
    state, batch = new_state(config), new_batch()
    targets = teacher_targets(state, batch, 0.05)
    logits = state.teacher["dino_head"](state.teacher["backbone"](batch.global_crops).cls)
    torch.testing.assert_close(targets.dino, F.softmax(logits / 0.05, dim=-1))
    torch.testing.assert_close(targets.centers["dino"], 0.1 * logits.mean(0, keepdim=True))
    step(state, batch)
    torch.testing.assert_close(state.centers["dino"], targets.centers["dino"])


def test_the_teacher_moves_towards_the_student_after_its_update() -> None:
    config = tiny_config(model__drop_path=0.0)
    state, batch = new_state(config), new_batch()
    before = copy.deepcopy(state.teacher)
    step(state, batch)
    for average, old, current in zip(state.teacher.parameters(), before.parameters(), state.student.parameters()):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * current.detach())


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_every_batch_size_gives_a_finite_step(num_images: int, centering: str) -> None:
    config = tiny_config(loss__centering=centering)
    state = new_state(config)
    result = step(state, new_batch(num_images))
    assert result.accepted.item() == 1.0
    assert all(math.isfinite(value) for value in result.losses.values())


def test_a_step_without_a_masked_patch_or_local_crop_is_finite_and_its_ibot_loss_is_zero() -> None:
    config = tiny_config(crops__num_local=0)
    state = new_state(config)
    result = step(state, new_batch(num_local=0, masked=False))
    assert result.accepted.item() == 1.0
    assert result.losses["ibot"].item() == 0.0


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters(centering: str) -> None:
    config = tiny_config(loss__centering=centering)
    state = new_state(config)
    step(state, new_batch())
    before = copy.deepcopy(state.tensors())
    bad = new_batch(seed=1)
    bad.global_crops[3, 0, 5, 5] = math.nan
    for expected in (1.0, 2.0):
        result = step(state, bad)
        assert result.accepted.item() == 0.0
        assert state.rejected.item() == expected
    after = state.tensors()
    for section in ("student", "teacher", "centers"):
        for name, value in before[section].items():
            assert torch.equal(after[section][name], value), name
    for name, moments in before["optimizer"].items():
        for key, value in moments.items():
            assert torch.equal(after["optimizer"][name][key], value), (name, key)
    step(state, new_batch(seed=2))
    assert state.rejected.item() == 0.0


def test_teacher_and_centres_move_on_an_overflow_where_asked_for_as_in_the_reference() -> None:
    config = tiny_config(loss__center_momentum=0.7)
    state = new_state(config)
    step(state, new_batch())
    before = copy.deepcopy(state.tensors())
    targets = teacher_targets(state, new_batch(seed=1), NOW.teacher_temp)
    state.loss_scale = torch.tensor(1e38)  # the loss is finite, its gradients are not
    state.optim = replace(state.optim, move_on_skip=True)
    result = train_step(state, new_batch(seed=1), NOW)
    assert (result.accepted.item(), result.losses["total"].isfinite().item()) == (0.0, True)
    for name, value in before["student"].items():
        assert torch.equal(state.tensors()["student"][name], value), name
    for name, value in before["teacher"].items():
        moved = NOW.momentum * value + (1 - NOW.momentum) * before["student"][name]
        torch.testing.assert_close(state.tensors()["teacher"][name], moved, rtol=1e-5, atol=1e-7)
    for name, center in targets.centers.items():
        torch.testing.assert_close(state.centers[name], center)
        assert not torch.equal(center, before["centers"][name])
    bad = new_batch(seed=2)
    bad.global_crops[:] = math.nan  # of which no centre comes
    train_step(state, bad, NOW)
    assert all(value.isfinite().all() for part in ("teacher", "centers") for value in state.tensors()[part].values())


def test_weights_of_the_losses_scale_what_is_optimised_and_logged() -> None:
    batch = new_batch()
    losses = {}
    for weight in (1.0, 0.5):
        config = tiny_config(model__drop_path=0.0, loss__ibot_weight=weight, loss__dino_weight=weight)
        losses[weight] = step(new_state(config), batch).losses
    for name in ("dino_global", "dino_local", "ibot"):
        torch.testing.assert_close(losses[0.5][name], 0.5 * losses[1.0][name])


def test_bf16_autocast_stays_close_to_float32() -> None:
    config = tiny_config(model__drop_path=0.0, loss__centering="sinkhorn")
    batch, results = new_batch(), []
    for dtype in (torch.float32, torch.bfloat16):
        state = TrainState(config, *build_networks(config), CPU, dtype)
        results.append(train_step(state, batch, NOW))
        assert all(p.dtype == torch.float32 for p in state.student.parameters())
    exact, low = results
    for name in ("dino_global", "dino_local", "ibot"):
        assert low.losses[name].item() == pytest.approx(exact.losses[name].item(), rel=0.02)


def test_an_overflow_in_fp16_halves_the_loss_scale_and_finite_steps_keep_it() -> None:
    from dinoreg.train.step import _move_loss_scale

    state = new_state(tiny_config())
    state.loss_scale = torch.tensor(1024.0)
    _move_loss_scale(state, torch.zeros(()))
    assert state.loss_scale.item() == 512.0
    state.scale_age = torch.tensor(1999, dtype=torch.int32)
    _move_loss_scale(state, torch.ones(()))
    assert (state.loss_scale.item(), state.scale_age.item()) == (1024.0, 0)
    _move_loss_scale(state, torch.ones(()))
    assert (state.loss_scale.item(), state.scale_age.item()) == (1024.0, 1)
