"""Scores and losses of depth maps against literal loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinoreg.evaluation.metrics.depth import SCORES, depth_scores, mean_scores, scaled_crop, valid_pixels
from dinoreg.evaluation.protocols.depth import gradient_loss, scale_invariant_loss

EIGEN = ((45, 471, 41, 601), (480, 640))


def _maps(seed: int, height: int = 13, width: int = 17) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.5, 9.5, size=(height, width)).astype(np.float32)
    predicted = (true * rng.uniform(0.5, 1.7, size=true.shape)).astype(np.float32)
    true[rng.random(true.shape) < 0.2] = 0
    return predicted, true


def test_scores_equal_loops_over_the_valid_pixels() -> None:
    predicted, true = _maps(1)
    valid = valid_pixels(true, 1e-3, 9.0)
    pairs = []
    for row in range(true.shape[0]):
        for column in range(true.shape[1]):
            if 1e-3 < true[row, column] < 9.0:
                pairs.append((float(predicted[row, column]), float(true[row, column])))
    n = len(pairs)
    assert 0 < n < true.size
    expected = {
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse_log": math.sqrt(sum((math.log(p) - math.log(t)) ** 2 for p, t in pairs) / n),
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "delta1": sum(max(p / t, t / p) < 1.25 for p, t in pairs) / n,
        "delta2": sum(max(p / t, t / p) < 1.25**2 for p, t in pairs) / n,
        "delta3": sum(max(p / t, t / p) < 1.25**3 for p, t in pairs) / n,
    }
    found = depth_scores(predicted, true, valid)
    assert found.keys() == expected.keys() == set(SCORES)
    for key in SCORES:
        assert found[key] == pytest.approx(expected[key], rel=1e-9), key
    assert 0 < found["delta1"] < found["delta2"] < found["delta3"] <= 1


def test_eigen_crop_of_a_full_frame_is_rows_45_to_471_and_columns_41_to_601() -> None:
    depth = np.full((480, 640), 2.0, dtype=np.float32)
    valid = valid_pixels(depth, 1e-3, 10.0, EIGEN)
    for row in range(480):
        inside = np.array([45 <= row < 471 and 41 <= column < 601 for column in range(640)])
        np.testing.assert_array_equal(valid[row], inside)


def test_a_crop_shrinks_with_the_image() -> None:
    rows, columns = scaled_crop(EIGEN, 48, 64)
    assert (rows, columns) == (slice(4, 47), slice(4, 60))
    rows, columns = scaled_crop(EIGEN, 240, 320)
    assert (rows, columns) == (slice(22, 236), slice(20, 300))


def test_both_ends_of_the_range_are_outside_it() -> None:
    depth = np.array([[0.0, 0.001, 0.0011], [9.999, 10.0, 10.001]])
    np.testing.assert_array_equal(valid_pixels(depth, 0.001, 10.0), [[False, False, True], [True, False, False]])


def test_an_image_without_a_valid_pixel_has_no_score_and_is_left_out_of_the_mean() -> None:
    nothing = depth_scores(np.ones((2, 3)), np.zeros((2, 3)), np.zeros((2, 3), dtype=bool))
    assert set(nothing) == set(SCORES)
    assert all(math.isnan(value) for value in nothing.values())
    assert mean_scores({"rmse": np.array([1.0, math.nan, 4.0])}) == {"rmse": 2.5}


def _tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = [_maps(seed + each, 14, 15) for each in range(3)]
    predicted = torch.from_numpy(np.stack([pair[0] for pair in pairs])).double()
    true = torch.from_numpy(np.stack([pair[1] for pair in pairs])).double()
    return predicted, true, true > 0


@pytest.mark.parametrize("warming_up", [False, True])
def test_scale_invariant_loss_equals_its_formula(warming_up: bool) -> None:
    predicted, true, valid = _tensors(3)
    g = [
        math.log(float(p) + 1e-3) - math.log(float(t) + 1e-3)
        for p, t, v in zip(predicted.flatten(), true.flatten(), valid.flatten())
        if v
    ]
    mean = sum(g) / len(g)
    variance = 0.0 if warming_up else sum((each - mean) ** 2 for each in g) / (len(g) - 1)
    expected = math.sqrt(variance + 0.15 * mean**2)
    assert float(scale_invariant_loss(predicted, true, valid, warming_up)) == pytest.approx(expected, rel=1e-9)


def test_scale_invariant_loss_forgives_a_common_factor_more_than_noise() -> None:
    _, true, valid = _tensors(4)
    scaled = scale_invariant_loss(true * 1.3, true, valid)
    noise = torch.where(torch.rand_like(true) < 0.5, 1.3, 1 / 1.3)
    assert float(scaled) < 0.5 * float(scale_invariant_loss(true * noise, true, valid))


def test_gradient_loss_equals_loops() -> None:
    predicted, true, valid = _tensors(5)
    total = 0.0
    for stride in (1, 2, 4, 6):
        rows, columns = range(0, predicted.shape[1], stride), range(0, predicted.shape[2], stride)
        count = sum(bool(valid[b, y, x]) for b in range(3) for y in rows for x in columns)

        def difference(b: int, y: int, x: int) -> float:
            return math.log(float(predicted[b, y, x]) + 1e-3) - math.log(float(true[b, y, x]) + 1e-3)

        found = 0.0
        for b in range(3):
            for y in rows:
                for x in columns:
                    for y2, x2 in ((y + 2 * stride, x), (y, x + 2 * stride)):
                        if y2 in rows and x2 in columns and valid[b, y, x] and valid[b, y2, x2]:
                            found += abs(difference(b, y, x) - difference(b, y2, x2))
        total += found / count
    assert float(gradient_loss(predicted, true, valid)) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("known", [True, False])
def test_losses_have_finite_slopes_for_a_perfect_batch_and_for_one_without_truth(known: bool) -> None:
    true = torch.full((2, 9, 9), 3.0)
    predicted = true.clone().requires_grad_()
    valid = torch.full(true.shape, known)
    loss = scale_invariant_loss(predicted, true, valid) + gradient_loss(predicted, true, valid)
    loss.backward()
    assert float(loss.detach()) < 1e-5
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
