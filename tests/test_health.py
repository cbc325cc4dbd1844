from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photograph
from PIL import Image
from training import TINY, read_lines, tiny_config

from dinoreg.data import sampler
from dinoreg.data.loader import Batch
from dinoreg.models.layers import PatchEmbed
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
        ("apart-crops", {"paka_loss": 0.0}),
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


def test_a_plain_run_is_healthy_by_every_rule_at_its_first_lines(tmp_path: Path) -> None:
    assert run(tmp_path / "run", batch_size=16, steps=4) - {"data-bound"} == set()


def black(*_: object, size: int = 64, **__: object) -> np.ndarray:
    return np.zeros((size, size, 3), np.uint8)


class Faults:
    """What is planted, by the name that it has to be given: a change of the code, and options of the run."""

    @staticmethod
    def frozen(patch: pytest.MonkeyPatch, out: Path) -> None:
        patch.setattr(GroupsAdamW, "step", lambda self, closure=None: None)

    @staticmethod
    def part_frozen(patch: pytest.MonkeyPatch, out: Path) -> None:
        train = loop.train

        def frozen(setup: object, state: TrainState, *more: object) -> None:
            state.student.backbone.blocks[1].requires_grad_(False)
            train(setup, state, *more)

        patch.setattr(loop, "train", frozen)

    @staticmethod
    def teacher_left(patch: pytest.MonkeyPatch, out: Path) -> None:
        patch.setitem(loop.train_step.__globals__, "update_teacher", lambda *_: None)

    @staticmethod
    def collapsed(patch: pytest.MonkeyPatch, out: Path) -> None:
        embed = PatchEmbed.forward
        patch.setattr(PatchEmbed, "forward", lambda self, images: 0 * embed(self, images))

    @staticmethod
    def dead(patch: pytest.MonkeyPatch, out: Path) -> None:
        train, calls = loop.train, itertools.count(1)

        def few_alive(module: object, args: object, logits: torch.Tensor) -> torch.Tensor:
            return logits - 1e4 * next(calls) * (torch.arange(logits.shape[-1]) >= 3)  # quicker than the centre follows

        def few(setup: object, state: TrainState, *more: object) -> None:
            state.teacher["dino_head"].register_forward_hook(few_alive)
            train(setup, state, *more)

        patch.setattr(loop, "train", few)

    @staticmethod
    def copied(patch: pytest.MonkeyPatch, out: Path) -> None:
        (out.parent / "photos").mkdir()
        for number in range(60):
            photograph(number // 4, 40, 40).save(out.parent / "photos" / f"{number}.png")

    @staticmethod
    def of_twelve_bits(patch: pytest.MonkeyPatch, out: Path) -> None:
        (out.parent / "photos").mkdir()
        for number in range(60):
            levels = np.asarray(photograph(number, 40, 40))[..., 0].astype(np.uint16) * 16  # in files of sixteen
            Image.fromarray(levels).save(out.parent / "photos" / f"{number}.png")

    @staticmethod
    def in_order(patch: pytest.MonkeyPatch, out: Path) -> None:
        patch.setattr(sampler, "_epoch_order", lambda seed, groups, number, epoch: np.arange(groups[number].length))

    @staticmethod
    def stale(patch: pytest.MonkeyPatch, out: Path) -> None:
        fresh = loop.next_batch
        first: list[Batch] = []

        def again(*arguments: object) -> Batch:
            batch = fresh(*arguments)
            first.append(batch)
            return replace(batch, global_crops=first[0].global_crops)

        patch.setattr(loop, "next_batch", again)

    @staticmethod
    def none(patch: pytest.MonkeyPatch, out: Path) -> None:
        pass


FAULTS: list[tuple[str, Callable[[pytest.MonkeyPatch, Path], None], dict[str, object]]] = [
    ("learning-rate-too-high", Faults.none, {"optim__lr": 100 * TINY["optim.lr"]}),
    ("teacher-follows-student", Faults.none, {"schedule__momentum": (0.0, 0.0)}),
    ("teacher-stands-still", Faults.none, {"schedule__momentum": (1.0, 1.0)}),
    ("teacher-stands-still", Faults.teacher_left, {}),
    ("one-hot-targets", Faults.none, {"schedule__teacher_temp": (1e-4, 1e-4)}),
    ("uniform-targets", Faults.none, {"schedule__teacher_temp": (50.0, 50.0), "steps": 103}),
    ("feature-collapse", Faults.collapsed, {"steps": 103}),
    ("few-prototypes-used", Faults.dead, {"steps": 103, "head__prototypes": 256, "loss__centering": "softmax"}),
    ("duplicated-images", Faults.copied, {"data__source": "photos"}),
    ("normalisation", Faults.none, {"augment__mean": (115.0,), "augment__std": (57.0,)}),
    ("value-range", Faults.of_twelve_bits, {"data__source": "photos"}),
    ("frozen-student", Faults.frozen, {}),
    ("frozen-part", Faults.part_frozen, {}),
    ("mask-ratio", Faults.none, {"mask__ratio": (0.9, 0.95)}),
    ("data-in-order", Faults.in_order, {}),
    ("stale-data", Faults.stale, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plant", "options"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_named_within_five_lines_or_three_after_its_grace(
    name: str,
    plant: Callable[[pytest.MonkeyPatch, Path], None],
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", **{"steps": 12, "batch_size": 16, **options})
    steps = {line["name"]: line["step"] for line in read_lines(tmp_path / "run" / "health" / "events.jsonl")}
    assert steps[name] <= (5 if int(options.get("steps", 0)) < 100 else 103)


@pytest.mark.slow
def test_all_black_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "render_image", lambda index, size=64, seed=0: black(size=size))
    assert "constant-images" in run(tmp_path / "run")


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


@pytest.mark.slow
def test_crops_of_which_none_lies_in_another_are_named_where_a_loss_needs_such(tmp_path: Path) -> None:
    apart = {"crops__local_scale": (0.8, 1.0), "crops__global_scale": (0.1, 0.2)}
    assert "apart-crops" in run(tmp_path / "run", steps=6, loss__paka_weight=1.0, **apart)
