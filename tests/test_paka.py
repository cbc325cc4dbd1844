"""Patch-level kernel alignment (PaKA): loss and places against their literal forms, and whole runs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_step import NOW, new_state
from torch import Tensor
from training import loss_trace, read_lines, stopped_after, tiny_config

from dinoreg.config.load import Config
from dinoreg.config.schema import DataConfig
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.data.crops import place_boxes, places, relative_boxes
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.open import open_source
from dinoreg.data.source import ScenesSource
from dinoreg.losses.paka import LEAST_OVERLAP, cka_distance, overlapping, read_at
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from dinoreg.train.step import StepResult, train_step
from dinoreg.train.tutor import views_of


def literal_distance(patches: Tensor, anchors: Tensor) -> Tensor:
    """One minus CKA by HSIC with centring matrices, of patches (N, D) and (N, D')."""
    count = len(patches)
    centring = torch.eye(count, dtype=patches.dtype) - torch.full((count, count), 1 / count, dtype=patches.dtype)
    own, held = patches @ patches.T, anchors @ anchors.T

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        return torch.trace(one @ centring @ other @ centring)

    return 1 - hsic(own, held) / (hsic(own, own) * hsic(held, held)).sqrt()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_that_of_centring_matrices_over_the_places_that_count_and_so_is_its_gradient() -> None:
    patches, anchors, inside = 3 + drawn(3, 7, 5), drawn(3, 7, 4, seed=1), drawn(3, 7, seed=2) > -0.5
    inside[0] = True
    results = []
    for rows in (
        lambda own: cka_distance(own, anchors, inside),
        lambda own: torch.stack([literal_distance(own[i][inside[i]], anchors[i][inside[i]]) for i in range(3)]),
    ):
        own = patches.clone().requires_grad_()
        value = rows(own)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), own)))
    torch.testing.assert_close(results[0], results[1])
    assert torch.autograd.gradcheck(lambda own: cka_distance(own, anchors, inside), patches.requires_grad_())


def test_shifts_turns_and_scale_do_not_matter_and_nothing_to_compare_is_no_number_too_many() -> None:
    patches, everywhere = drawn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    turn, _ = torch.linalg.qr(drawn(4, 4))
    torch.testing.assert_close(cka_distance(patches, 5 * patches @ turn + 7, everywhere), torch.zeros(2).double())
    flat = patches.float().requires_grad_()
    cka_distance(flat, torch.ones(2, 9, 4), ~everywhere).sum().backward()
    assert float(flat.grad.abs().sum()) == 0  # type: ignore[union-attr]


def test_a_pair_counts_where_nine_tenths_of_the_smaller_crops_pixels_are_in_the_larger() -> None:
    settings, rng = CropSettings(32, 16, 3, local_scale=(0.1, 0.4)), np.random.default_rng(0)
    relative = relative_boxes(rng.random((60, 5, 40)), settings)
    boxes = np.array([place_boxes(each, 60, 80, settings.ratio) for each in relative])
    found = overlapping(torch.from_numpy(places(boxes, np.broadcast_to(np.eye(2), (60, 5, 2, 2)))))
    covered = np.zeros((60, 5, 60, 80), dtype=bool)
    for image, view in itertools.product(range(60), range(5)):
        top, left, height, width = boxes[image, view]
        covered[image, view, top : top + height, left : left + width] = True
    share = (covered[:, :2, None] & covered[:, None, 2:]).sum((3, 4)) / covered[:, None, 2:].sum((3, 4))
    expected = torch.from_numpy(share.transpose(1, 2, 0) >= LEAST_OVERLAP)
    assert torch.equal(found, expected)
    assert 0.2 < expected.float().mean() < 0.8


STILL: dict[str, float] = dict.fromkeys(
    ("jitter_probability", "grayscale", "blur_global1", "blur_global2", "blur_local", "solarize_global2"), 0.0
)
PLACES = AugmentSettings(**STILL, vflip=0.5, turn=0.6, mean=(0.0,), std=(1 / 255,))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_place_is_the_pixel_of_the_other_crop_that_shows_the_same(kind: str, tmp_path: Path) -> None:
    """The colour of a pixel says where it is; the JPEG is read at a quarter of its size."""
    rows, columns = np.mgrid[:480, :600]
    for number in range(12):
        pixels = np.stack([columns * 0.4, rows * 0.5, np.full_like(rows, number)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(
            tmp_path / f"{number:02}.{kind}", **({} if kind == "png" else {"quality": 100, "keep_rgb": True})
        )
    crops = CropSettings(64, 32, 3, local_scale=(0.2, 0.4))
    views = Views(crops, PLACES, MaskSettings(), 8, clean_size=64, related=True)
    with BatchLoader(open_source(str(tmp_path)), views, DataConfig(workers=0), batch_size=12) as loader:
        batch = next(loader)
    assert batch.places is not None
    assert batch.clean_crops is not None
    assert batch.local_crops is not None
    local = batch.local_crops[:, :2].unflatten(2, (4, 8)).unflatten(4, (4, 8)).mean((3, 5)).unflatten(0, (3, 12))
    centres = torch.linspace(-0.75, 0.75, 4)
    checked = 0
    for view, crop, image, row, column in itertools.product(range(2), range(3), range(12), range(4), range(4)):
        here = torch.stack([centres[column], centres[row], torch.ones(())])
        place = (batch.places[view, crop, image] @ here + 1) * 32  # pixels of the global crop from its edges
        if ((place < 3) | (place > 61)).any():
            continue
        colour = local[crop, image, :, row, column, None, None]
        apart = (batch.clean_crops[view * 12 + image, :2] - colour).square().sum(0)
        pixel = divmod(int(apart.argmin()), 64)
        assert abs(float(place[0]) - pixel[1] - 0.5) < 1
        assert abs(float(place[1]) - pixel[0] - 0.5) < 1
        checked += 1
    assert checked > 500
    # And so what is read there is what the patches of the local crop show.
    grid = batch.clean_crops[:12, :2].unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean((3, 5)).flatten(2).mT
    read, inside = read_at(grid, batch.places[0], 4)
    shown = local.permute(0, 1, 3, 4, 2).flatten(0, 1).flatten(1, 2)
    assert (read - shown).abs().amax(-1)[inside].quantile(0.8) < 3  # of 240; half a patch of the border is not read


RUN: dict[str, Any] = {"loss__paka_weight": 2.0, "crops__global_size": 40, "crops__local_size": 24}
KINDS: dict[str, dict[str, Any]] = {
    "odd grids": RUN,
    "rotary, no registers, beside Gram": {
        **{"model__name": "vitt8_reg0_rope", "model__rope_rescale": 1.0, "loss__paka_weight": 2.0},
        **{"loss__gram_weight": 1.0, "loss__gram_size": 64},
    },
}


def batch_of(config: Config, **changes: Any) -> Batch:
    views = replace(views_of(config, config.crops, 8, None), **changes)
    with BatchLoader(ScenesSource(30, 64), views, DataConfig(workers=0), batch_size=4) as loader:
        return next(loader)


def literal_loss(local: Tensor, clean: Tensor, batch: Batch) -> tuple[float, int]:
    """The mean over pairs, place by place, and their number; of patches (L·B, N, D) and (2B, M, D)."""
    assert batch.places is not None
    side, grid, found = round(local.shape[1] ** 0.5), round(clean.shape[1] ** 0.5), []
    _, crops, images = batch.places.shape[:3]
    for view, crop, image in itertools.product(range(2), range(crops), range(images)):
        matrix = batch.places[view, crop, image].double()
        corners = torch.stack([matrix @ torch.tensor([x, y, 1.0]).double() for x in (-1, 1) for y in (-1, 1)])
        low, high = corners.amin(0), corners.amax(0)
        if float(((high.clamp(max=1) - low.clamp(min=-1)).clamp(min=0) / (high - low)).prod()) < LEAST_OVERLAP:
            continue
        seen = clean[view * images + image].double().unflatten(0, (grid, grid))
        own, there = [], []
        for row, column in itertools.product(range(side), range(side)):
            x, y = matrix @ torch.tensor([(2 * column + 1) / side - 1, (2 * row + 1) / side - 1, 1.0]).double()
            if max(abs(x), abs(y)) > 1:
                continue
            x, y = (((place + 1) * grid / 2 - 0.5).clamp(0, grid - 1) for place in (x, y))
            left, top = int(x), int(y)
            value = torch.zeros(seen.shape[-1]).double()
            for i, j in itertools.product({top, min(top + 1, grid - 1)}, {left, min(left + 1, grid - 1)}):
                value += seen[i, j] * (y - top if i > top else top + 1 - y) * (x - left if j > left else left + 1 - x)
            own.append(local[crop * images + image, row * side + column].double())
            there.append(value)
        found.append(float(literal_distance(torch.stack(own), torch.stack(there))))
    return float(np.mean(found)), len(found)


def taken(config: Config, batch: Batch, accumulate: int = 1) -> StepResult:
    state = new_state(config)
    state.optim = replace(state.optim, accumulate=accumulate)
    return train_step(state, batch, NOW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_aligns_local_crops_with_what_the_teacher_sees_there_whatever_the_parts(kind: str) -> None:
    config = tiny_config(model__drop_path=0.0, batch_size=4, **KINDS[kind])
    batch, state = batch_of(config), new_state(config)
    with torch.no_grad():
        local, clean = state.student.backbone(batch.local_crops), state.teacher.backbone(batch.clean_crops)
    expected, pairs = literal_loss(local.patches, clean.patches, batch)
    assert 1 < pairs < 16
    whole, parts = taken(config, batch), taken(config, batch, accumulate=2)
    assert float(whole.losses["paka"]) == pytest.approx(2.0 * expected, rel=1e-4)
    torch.testing.assert_close(whole.losses["paka"], parts.losses["paka"])
    torch.testing.assert_close(whole.norms, parts.norms, rtol=1e-4, atol=1e-6)


def test_without_it_a_batch_holds_nothing_more_and_with_it_the_same_besides() -> None:
    config = tiny_config(**RUN)
    with_it, without = batch_of(config), batch_of(config, clean_size=None, related=False)
    assert without.clean_crops is None
    assert without.places is None
    for name in ("global_crops", "local_crops", "mask"):
        assert torch.equal(getattr(with_it, name), getattr(without, name))
    assert "paka" not in taken(tiny_config(**{**RUN, "loss__paka_weight": 0.0}), without).losses


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = {**RUN, "model__name": "vitt8_reg4_rope", "steps": 4}
    pretrain(tiny_config(tmp_path / "whole", **config))
    with stopped_after(2, tmp_path / "parts", num_steps=4):
        pretrain(tiny_config(tmp_path / "parts", **config))
    pretrain(tiny_config(tmp_path / "parts", resume=True, **config))
    assert loss_trace(tmp_path / "whole") == loss_trace(tmp_path / "parts")
    values = [
        [line["paka_loss"] for line in read_lines(tmp_path / each / "metrics.jsonl")] for each in ("whole", "parts")
    ]
    assert values[0] == values[1]
    assert 0 < min(values[0]) <= max(values[0]) < 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crops__num_local": 0}, r"loss\.paka_weight=1: expected 0 without local crops"),
        ({"distill": "weights"}, r"loss\.paka_weight=1: expected 0 with distill="),
        ({"loss__paka_weight": -1.0}, r"loss\.paka_weight=-1"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_a_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**{"loss__paka_weight": 1.0, **values})
