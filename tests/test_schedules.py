from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dinoreg.config.schema import ScheduleConfig
from dinoreg.train.schedules import Schedules, linear

# DINOv2's short recipe: 125,000 steps, 12,500 of warm-up, 37,500 of teacher-temperature warm-up.
SHORT = Schedules(
    num_steps=125_000,
    peak_lr=4e-3 * math.sqrt(2),
    options=ScheduleConfig(
        final_lr=1e-6,
        warmup=0.1,
        weight_decay=(0.04, 0.4),
        momentum=(0.992, 1.0),
        teacher_temp=(0.04, 0.07),
        teacher_temp_warmup=0.3,
        freeze_last_layer=0.01,
    ),
)


def test_learning_rate_starts_at_zero_peaks_at_the_end_of_the_warmup_and_ends_at_its_final_value() -> None:
    assert SHORT.at(0).lr == 0.0
    assert SHORT.at(12_499).lr == pytest.approx(5.657e-3, rel=1e-4)
    assert SHORT.at(12_500).lr == SHORT.peak_lr
    assert SHORT.at(125_000).lr == 1e-6
    assert SHORT.at(200_000).lr == 1e-6


def test_learning_rate_equals_the_formula_of_the_reference_at_every_thousandth_step() -> None:
    peak, final, warmup, total = SHORT.peak_lr, 1e-6, 12_500, 125_000
    for step in range(0, total, 997):
        if step < warmup:
            expected = peak * step / (warmup - 1)
        else:
            where = (step - warmup) / (total - warmup)
            expected = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * where))
        assert SHORT.at(step).lr == pytest.approx(expected, rel=1e-12)


def test_weight_decay_momentum_and_temperature_run_between_their_ends() -> None:
    assert SHORT.at(0).weight_decay == pytest.approx(0.04)
    assert SHORT.at(62_500).weight_decay == pytest.approx(0.22)
    assert SHORT.at(125_000).weight_decay == 0.4
    assert SHORT.at(0).momentum == pytest.approx(0.992)
    assert SHORT.at(125_000).momentum == 1.0
    assert SHORT.at(0).teacher_temp == 0.04
    assert SHORT.at(18_750).teacher_temp == pytest.approx(0.055, abs=1e-6)
    assert SHORT.at(37_500).teacher_temp == 0.07
    assert SHORT.at(100_000).teacher_temp == 0.07


def test_last_layer_does_not_move_in_the_first_hundredth_of_the_run() -> None:
    assert SHORT.at(1249).last_layer_lr == 0.0
    assert SHORT.at(1250).last_layer_lr == SHORT.at(1250).lr > 0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_runs_of_a_few_steps_have_finite_schedules(num_steps: int) -> None:
    tiny = Schedules(num_steps, 1e-3, ScheduleConfig(0.1, 1e-6, (0.04, 0.4), (0.99, 1.0), (0.04, 0.07), 0.3, 0.01))
    for step in range(num_steps + 1):
        now = tiny.at(step)
        assert 0 <= now.lr <= 1e-3
        assert 0.04 <= now.teacher_temp <= 0.07


@pytest.mark.parametrize(("peak", "final", "last"), [(1e-8, None, 1e-8), (1e-8, 1e-6, 1e-6), (1e-3, None, 1e-6)])
def test_the_final_rate_is_the_one_given_or_one_that_is_not_above_the_peak(
    peak: float, final: float | None, last: float
) -> None:
    low = Schedules(100, peak, ScheduleConfig(0.1, final, (0.0, 0.0), (1.0, 1.0), (0.04, 0.04), 0.0, 0.0))
    assert low.at(100).lr == last
    assert max(low.at(step).lr for step in range(101)) == max(peak, last)


def test_a_line_of_any_length_is_that_of_linspace() -> None:
    for steps in range(1, 9):
        for step, expected in enumerate(np.linspace(0.04, 0.07, steps)):
            assert linear(0.04, 0.07, step, steps) == pytest.approx(expected, rel=1e-15)
        assert linear(0.04, 0.07, steps, steps) == 0.07
    assert linear(0.04, 0.07, 0, 0) == 0.07


def test_a_constant_schedule_keeps_its_values_and_its_cooldown_is_half_a_cosine_to_those_of_a_cosine_one() -> None:
    options = replace(SHORT.options, shape="constant", cooldown=1000, horizon=10_000)
    long = Schedules(30_000, 1e-3, options)
    assert [long.at(step).lr for step in (0, 999, 1000, 29_000)] == [0.0, 1e-3, 1e-3, 1e-3]
    held = (long.at(20_000).weight_decay, long.at(20_000).momentum, long.at(20_000).teacher_temp)
    assert held == (0.04, 0.992, 0.07)
    for since in range(0, 1001, 100):
        now, share = long.at(29_000 + since), (1 + math.cos(math.pi * since / 1000)) / 2
        assert now.lr == pytest.approx(1e-6 + share * (1e-3 - 1e-6))
        assert now.weight_decay == pytest.approx(0.4 + share * (0.04 - 0.4))
        assert now.momentum == pytest.approx(1.0 + share * (0.992 - 1.0))
    for steps in (10_000, 12_345):  # where it ends changes nothing before the cool-down
        other = Schedules(steps, 1e-3, replace(options, cooldown=0))
        assert all(other.at(step) == long.at(step) for step in range(0, steps, 97))
