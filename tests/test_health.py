from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training import TINY, read_lines, tiny_config

from dinoreg.scenes import render as scenes
from dinoreg.train import loop
from dinoreg.train.health import REMEDIES, Health, _spread
from dinoreg.train.optimizer import GroupsAdamW
from dinoreg.train.state import TrainState
from dinoreg.train.step import StepResult, Targets


def result(targets: torch.Tensor, features: torch.Tensor) -> StepResult:
    return StepResult({}, {}, torch.ones(()), Targets(targets, targets[:0], features, {}))


def healthy_line(step: int = 1000) -> dict[str, float]:
    return {
        "step": step,
        "lr": 1e-3,
        "update_ratio": 1e-3,
        "teacher_distance": 0.05,
        "teacher_entropy": 2.0,
        "target_marginal_entropy": 4.0,
        "prototype_usage": 0.9,
        "feature_std": 0.8,
        "feature_rank": 40.0,
        "pixel_std": 1.0,
        "global_batch_size": 64,
        "nonfinite_steps": 0,
        "data_time": 0.01,
        "step_time": 1.0,
    }


def test_entropies_and_usage_equal_their_sums_written_out() -> None:
    torch.manual_seed(0)
    health = Health(num_prototypes=7, grace=0)
    steps = [torch.softmax(3 * torch.randn(6, 7), dim=-1) for _ in range(3)]
    for targets in steps:
        health.observe(result(targets, torch.randn(6, 5)))
    metrics = health.summarise()
    rows = torch.cat(steps)
    entropy = -sum(float(p) * math.log(p) for row in rows for p in row.tolist()) / len(rows)
    mean = [sum(column) / len(rows) for column in rows.T.tolist()]
    assert metrics["teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["teacher_entropy_max"] == pytest.approx(math.log(7))
    assert metrics["target_marginal_entropy"] == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-5)
    assert metrics["prototype_usage"] == pytest.approx(sum(p > 0.1 / 7 for p in mean) / 7)
    assert health.summarise() == {}


def test_spread_is_one_for_isotropic_features_and_zero_for_equal_ones() -> None:
    torch.manual_seed(0)
    assert float(_spread(torch.randn(4000, 32))) == pytest.approx(1.0, rel=0.03)
    assert float(_spread(torch.ones(10, 32))) == 0.0


def test_rank_is_that_of_the_last_class_tokens() -> None:
    health = Health(num_prototypes=4, grace=0)
    targets = torch.full((8, 4), 0.25)
    torch.manual_seed(0)
    for _ in range(80):
        health.observe(result(targets, torch.randn(8, 16)))
    assert sum(len(kept) for kept in health.features) <= 512 + 8
    assert health.summarise()["feature_rank"] == pytest.approx(16, rel=0.05)
    for _ in range(80):
        health.observe(result(targets, torch.outer(torch.randn(8), torch.ones(16))))
    assert health.summarise()["feature_rank"] == pytest.approx(1.0, abs=1e-3)


def test_a_healthy_run_gets_no_diagnosis() -> None:
    health = Health(num_prototypes=256, grace=100)
    assert [health.diagnose(healthy_line(step)) for step in range(10, 2000, 10)] == [[]] * 199


@pytest.mark.parametrize(
    ("name", "signals"),
    [
        ("learning-rate-too-high", {"update_ratio": 0.5}),
        ("constant-images", {"pixel_std": 0.0, "feature_std": 0.0, "feature_rank": 1.0}),
        ("frozen-student", {"update_ratio": 0.0, "teacher_distance": 0.0}),
        ("teacher-follows-student", {"teacher_distance": 0.0}),
        ("uniform-targets", {"teacher_entropy": math.log(256)}),
        ("single-prototype", {"target_marginal_entropy": 0.01, "prototype_usage": 1 / 256}),
        ("few-prototypes-used", {"target_marginal_entropy": 1.0, "prototype_usage": 0.01}),
        ("feature-collapse", {"feature_rank": 1.01, "feature_std": 1e-5}),
        ("data-bound", {"data_time": 0.6}),
    ],
)
def test_each_fault_is_named_after_three_lines_and_only_once(name: str, signals: dict[str, float]) -> None:
    health = Health(num_prototypes=256, grace=100)
    lines = [health.diagnose(healthy_line(step) | signals) for step in (1000, 1010, 1020, 1030)]
    assert [[found.name for found in line] for line in lines] == [[], [], [name], []]
    assert lines[2][0].remedy == REMEDIES[name]


def test_a_signal_that_goes_away_is_not_reported() -> None:
    health = Health(num_prototypes=256, grace=100)
    for step in range(1000, 1100, 10):
        high = healthy_line(step) | ({"update_ratio": 0.5} if step % 30 else {})
        assert health.diagnose(high) == []


@pytest.mark.parametrize(
    ("name", "signals"),
    [("batch-too-small", {"global_batch_size": 1}), ("non-finite-steps", {"nonfinite_steps": 2})],
)
def test_what_cannot_be_chance_is_named_at_once(name: str, signals: dict[str, float]) -> None:
    health = Health(num_prototypes=256, grace=100)
    assert [found.name for found in health.diagnose(healthy_line(10) | signals)] == [name]


# Whole runs with a fault planted in them.


def named_in(out: Path) -> set[str]:
    path = out / "health" / "events.jsonl"
    return {line["name"] for line in read_lines(path)} if path.is_file() else set()


def run(out: Path, **overrides: object) -> set[str]:
    loop.pretrain(tiny_config(out, **{"steps": 30, "loss__centering": "sinkhorn", **overrides}))
    return named_in(out)


@pytest.mark.slow
def test_a_plain_run_is_healthy(tmp_path: Path) -> None:
    assert run(tmp_path / "run", batch_size=16) - {"data-bound"} == set()


@pytest.mark.slow
def test_a_learning_rate_a_hundred_times_too_high_is_named(tmp_path: Path) -> None:
    assert "learning-rate-too-high" in run(tmp_path / "run", optim__lr=100 * TINY["optim.lr"])


@pytest.mark.slow
def test_all_black_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(scenes, "render_image", lambda index, size=64, seed=0: np.zeros((size, size, 3), np.uint8))
    assert "constant-images" in run(tmp_path / "run")


@pytest.mark.slow
def test_a_frozen_student_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupsAdamW, "step", lambda self, closure=None: None)
    assert "frozen-student" in run(tmp_path / "run")


@pytest.mark.slow
def test_a_teacher_without_momentum_is_named(tmp_path: Path) -> None:
    assert "teacher-follows-student" in run(tmp_path / "run", schedule__momentum=(0.0, 0.0))


@pytest.mark.slow
def test_a_batch_of_one_is_named(tmp_path: Path) -> None:
    assert "batch-too-small" in run(tmp_path / "run", batch_size=1)


def poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the gradients of some steps not finite, by count of steps taken in this process."""
    taken = iter(range(10**6))
    backward = loop.train_step.__globals__["backward"]

    def poisoned(state: TrainState, *args: object, **kwargs: object) -> object:
        losses = backward(state, *args, **kwargs)
        if next(taken) in steps:
            next(state.student.parameters()).grad.fill_(math.inf)
        return losses

    monkeypatch.setitem(loop.train_step.__globals__, "backward", poisoned)


def test_steps_that_are_not_finite_are_left_out_and_recorded_with_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(4, 6))
    assert "non-finite-steps" in run(tmp_path / "run", steps=10)
    lines = read_lines(tmp_path / "run" / "health" / "nonfinite.jsonl")
    assert [line["step"] for line in lines] == [5, 6]
    assert all(len(line["sample_ids"]) == TINY["batch_size"] for line in lines)
    assert all(name.startswith("scenes:") for line in lines for name in line["names"])


def test_many_in_a_row_roll_the_run_back_past_the_samples_and_it_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(6, 9))
    out = tmp_path / "run"
    names = run(out, steps=10, checkpoint__every=4, health__max_nonfinite=3)
    assert {"non-finite-steps", "rolled-back"} <= names
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 10]


def test_a_run_that_stays_non_finite_stops_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoreg.runtime.errors import RunError

    poison(monkeypatch, range(2, 10**6))
    with pytest.raises(RunError, match="not finite, after 1 roll-back"):
        run(tmp_path / "run", steps=20, health__max_nonfinite=3)
