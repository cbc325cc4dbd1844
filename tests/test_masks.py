"""Masks: how many crops and patches are hidden, and that any process can make its part of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dinoreg.config.view_settings import MaskSettings
from dinoreg.data import masks as module
from dinoreg.data.masks import mask_tensors
from dinoreg.runtime.errors import UserError

GRIDS = [(14, 14), (16, 16), (7, 10), (5, 4)]


def block_masks(
    seed: int, step: int, num_crops: int, grid: tuple[int, int], first: int = 0, count: int | None = None, **mask: Any
) -> np.ndarray:
    """`block_masks` with options of MaskSettings by name."""
    return module.block_masks(seed, step, num_crops, grid, MaskSettings(**mask), first, count)


@pytest.mark.parametrize(("num_crops", "probability"), [(32, 0.5), (7, 0.5), (20, 0.25), (6, 1.0), (6, 0.0), (1, 0.5)])
def test_exactly_the_given_share_of_crops_is_masked(num_crops: int, probability: float) -> None:
    for step in range(5):
        masks = block_masks(0, step, num_crops, (16, 16), probability=probability)
        assert masks.shape == (num_crops, 256)
        assert masks.dtype == bool
        assert masks.any(axis=1).sum() == int(num_crops * probability)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_masked_crops_fill_the_strata_of_the_hidden_share(grid: tuple[int, int], seed: int) -> None:
    num_patches = grid[0] * grid[1]
    edges = np.linspace(0.1, 0.5, 17)
    shortfall = []
    for step in range(10):
        counts = block_masks(seed, step, 32, grid).sum(axis=1)
        # Sorted, the i-th count belongs to the i-th part: at most its upper edge, seldom below its lower.
        counts = np.sort(counts)[16:]
        assert (counts <= (num_patches * edges[1:]).astype(int)).all()
        shortfall += list(np.maximum(0, (num_patches * edges[:-1]).astype(int) - counts))
    assert max(shortfall) <= 4
    assert np.mean(shortfall) < 0.15


def test_a_mask_never_exceeds_its_target_and_seldom_falls_short() -> None:
    # A range of no width fixes the target: int(0.3 * 196) = 58 patches in every mask.
    counts = np.concatenate(
        [block_masks(0, step, 32, (14, 14), probability=1.0, ratio=(0.3, 0.3)).sum(axis=1) for step in range(20)]
    )
    assert counts.max() == 58
    assert counts.min() >= 58 - 4
    assert (counts < 58).mean() < 0.15  # about 8 % in the reference
    assert (58 - counts).mean() < 0.2  # 0.08 patches in the reference


def test_the_mean_hidden_share_is_the_middle_of_the_range() -> None:
    masks = np.concatenate([block_masks(3, step, 64, (16, 16)) for step in range(10)])
    assert masks[masks.any(axis=1)].mean() == pytest.approx(0.30, abs=0.01)
    assert masks.mean() == pytest.approx(0.15, abs=0.005)


def test_masks_are_unions_of_blocks_and_no_position_is_favoured_by_more_than_the_border_effect() -> None:
    masks = np.concatenate([block_masks(0, step, 64, (12, 12)) for step in range(30)]).reshape(-1, 12, 12)
    masks = masks[masks.any(axis=(1, 2))]
    neighbours = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks.sum()
    assert neighbours > 0.6  # independent patches at a share of 0.3 would give about 0.3
    frequency = masks.mean(axis=0)
    np.testing.assert_allclose(frequency, frequency[::-1, ::-1], atol=0.08)
    np.testing.assert_allclose(frequency, frequency.T, atol=0.08)


def test_one_block_has_an_aspect_and_a_size_within_bounds() -> None:
    for step in range(40):
        (mask,) = block_masks(0, step, 1, (20, 20), probability=1.0, ratio=(0.1, 0.1), min_patches=40)
        rows, columns = np.nonzero(mask.reshape(20, 20))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        if h * w == mask.sum():  # a single rectangle of about 40 patches
            assert 0.3 * 0.8 < h / w < 1 / 0.3 * 1.25
            assert 30 <= h * w <= 40


@pytest.mark.parametrize(("first", "count"), [(0, 5), (5, 7), (11, 13), (24, 0), (23, None)])
def test_a_part_of_the_rows_equals_these_rows_of_the_whole(first: int, count: int | None) -> None:
    whole = block_masks(5, 9, 24, (8, 6))
    part = block_masks(5, 9, 24, (8, 6), first=first, count=count)
    assert np.array_equal(part, whole[first : None if count is None else first + count])


def test_masks_depend_on_seed_step_and_crop_alone() -> None:
    masks = block_masks(5, 9, 24, (8, 6))
    assert np.array_equal(masks, block_masks(5, 9, 24, (8, 6)))
    assert not np.array_equal(masks, block_masks(6, 9, 24, (8, 6)))
    assert not np.array_equal(masks, block_masks(5, 10, 24, (8, 6)))
    masked = masks[masks.any(axis=1)]
    assert len(np.unique(masked, axis=0)) == len(masked)


def test_the_masks_of_a_seed_stay_what_they_are() -> None:
    masks = block_masks(seed=0, step=0, num_crops=4, grid=(6, 6))
    # A change of these numbers changes every run: two versions would not resume one another's data order.
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [
        [],
        [19, 20, 21, 22, 26, 27, 28, 32, 33, 34],
        [7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 28, 29],
        [],
    ]


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (2, 2), (3, 3), (4, 6), (2, 30)])
@pytest.mark.parametrize("ratio", [(0.1, 0.5), (1.0, 1.0)])
def test_small_grids_end_and_stay_within_the_target(grid: tuple[int, int], ratio: tuple[float, float]) -> None:
    num_patches = grid[0] * grid[1]
    masks = block_masks(0, 0, 16, grid, ratio=ratio)
    assert masks.shape == (16, num_patches)
    assert masks.sum(axis=1).max() <= int(num_patches * ratio[1])


@pytest.mark.parametrize("grid", GRIDS)
def test_no_more_is_hidden_than_each_masked_crops_share_of_the_ratio(grid: tuple[int, int]) -> None:
    num_patches = grid[0] * grid[1]
    largest = [int(num_patches * edge) for edge in np.linspace(0.1, 0.5, 11)[1:]]
    for step in range(20):
        counts = np.sort(block_masks(0, step, 20, grid).sum(axis=1))
        assert (counts[:10] == 0).all()
        for count in (1, 3, 10):
            assert counts[20 - count :].sum() <= sum(largest[10 - count :])


def test_mask_tensors_list_the_hidden_patches_with_weights_that_sum_to_one_in_each_masked_crop() -> None:
    mask = block_masks(0, 0, 8, (6, 5))
    indices, weights = mask_tensors(mask)
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert indices.tolist() == [i for i in range(8 * 30) if mask.reshape(-1)[i]]
    for crop in range(8):
        inside = (indices >= crop * 30) & (indices < (crop + 1) * 30)
        assert weights[inside].sum().item() == pytest.approx(float(mask[crop].any()))
        assert len(weights[inside].unique()) <= 1
    from_tensor = mask_tensors(torch.from_numpy(mask))
    assert torch.equal(from_tensor[0], indices)
    assert torch.equal(from_tensor[1], weights)


def test_mask_tensors_of_nothing_hidden_are_empty() -> None:
    indices, weights = mask_tensors(np.zeros((4, 9), dtype=bool))
    assert indices.shape == weights.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.5}, "probability"),
        ({"ratio": (0.5, 0.1)}, "ratio"),
        ({"ratio": (0.1, 1.5)}, "ratio"),
        ({"aspect": 0.0}, "aspect"),
        ({"grid": (0, 4)}, "grid"),
        ({"first": 3, "count": 6}, "rows 3 to 9"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"seed": 0, "step": 0, "num_crops": 8, "grid": (4, 4)} | change
    with pytest.raises(UserError, match=message):
        block_masks(**options)  # type: ignore[arg-type]
