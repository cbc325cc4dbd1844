"""The schedules of small heads, against the formulas of mmcv, which the published dense heads were trained with."""

from __future__ import annotations

import math

import pytest

from dinoreg.evaluation.solvers.train_heads import cosine, linear


def mmcv(policy: str, step: int, steps: int, warmup: int, warmup_ratio: float) -> float:
    """mmcv 1.x: the regular rate of an iteration, and what a linear warm-up makes of it (base rate 1)."""
    if policy == "poly":
        regular = (1 - step / steps) ** 1.0
    else:
        target = 1e-8  # min_lr_ratio
        regular = target + 0.5 * (1 - target) * (math.cos(math.pi * step / steps) + 1)
    if step >= warmup:
        return regular
    k = (1 - step / warmup) * (1 - warmup_ratio)
    return regular * (1 - k)


@pytest.mark.parametrize(("steps", "warmup"), [(38_400, 12_800), (40_000, 1500), (100, 0), (7, 3), (1, 0)])
def test_rates_are_those_of_mmcv(steps: int, warmup: int) -> None:
    for step in range(0, steps, max(steps // 500, 1)):
        assert cosine(step, steps, warmup) == pytest.approx(mmcv("cosine", step, steps, warmup, 1e-3), abs=2e-8)
        assert linear(step, steps, warmup) == pytest.approx(mmcv("poly", step, steps, warmup, 1e-6), abs=1e-12)


def test_depth_is_at_three_quarters_of_its_rate_when_the_warm_up_of_a_third_ends() -> None:
    assert cosine(12_800, 38_400, 12_800) == pytest.approx(0.75)
    assert max(cosine(step, 38_400, 12_800) for step in range(0, 38_400, 16)) < 0.76
