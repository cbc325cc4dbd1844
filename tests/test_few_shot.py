"""Few-shot: draws that are balanced and nested, fits as scikit-learn has them, intervals that hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoreg.data.source import ScenesSource
from dinoreg.evaluation.backbones.encoder import PixelEncoder
from dinoreg.evaluation.benchmark import PROTOCOLS, Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, draws_interval, mean_per_class_accuracy
from dinoreg.evaluation.options import EvalOptions, FewShotOptions, LogisticOptions
from dinoreg.evaluation.protocols import classification, few_shot
from dinoreg.evaluation.protocols.classification import equal_features
from dinoreg.evaluation.protocols.few_shot import FIXED_C, Setting, drawn, fitted, spread
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.readers.cifar import ArraySource
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import UserError
from tests.miniatures import own

TASK = Task(protocol="few_shot", read=lambda folder, options: Data({}), metric="top-1")
PIXELS = PixelEncoder(14, (28, 28))
FAST = EvalOptions(logistic=LogisticOptions(min_c=1e-4, max_c=1e4, num_c=5))
CHOSEN = {"seed": 0, "device": torch.device("cpu"), "metric": "top-1"}
QUICK = dataclasses.replace(FAST, few_shot=FewShotOptions(shots=(1, 5), shares=(1.0,), repeats=3))


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.evaluation.backbones.encoder.PIXEL_SIDE", 6)


def labels_only(labels: list[int], num_classes: int) -> Labelled:
    return Labelled(ScenesSource(count=len(labels), size=16), np.array(labels), num_classes)


def planted(count: int, seed: int, classes: int = 4, dim: int = 12) -> tuple[Tensor, np.ndarray]:
    """Features around the mean of their class, far from zero."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(classes, dim))
    labels = rng.integers(0, classes, size=count)
    return torch.from_numpy((means[labels] + rng.normal(size=(count, dim)) + 5).astype(np.float32)), labels


def context(folder: Path, **changes: Any) -> Context:
    values = {"examples": None, "seed": 0, "image_size": 28, "batch_size": 16, "workers": 0, **changes}
    return Context(folder / "features", folder / "state", **values)


def own_data(folder: Path, write: Callable[..., Path] = own.write_splits, **options: Any) -> Data:
    path = write(folder, **options)
    benchmark = own_benchmark(path, {})
    return benchmark.tasks[0].read(path, benchmark.option_values({}))


def run(data: Data, folder: Path, options: EvalOptions = FAST, **changes: Any) -> list[Row]:
    return few_shot.evaluate(Measurement(PIXELS, data, TASK, options, context(folder, **changes)))


def test_a_draw_takes_as_many_of_each_class_and_all_where_there_are_fewer() -> None:
    train = labels_only([0] * 3 + [2] * 20 + [1] * 8, 3)
    index = drawn(train, Setting(shots=5), seed=1)
    assert np.bincount(train.labels[index]).tolist() == [3, 5, 5]
    assert len(set(index.tolist())) == 13
    assert (np.diff(index) > 0).all()


def test_a_share_is_of_each_class_and_never_none_of_it() -> None:
    train = labels_only([0] * 3 + [2] * 200 + [1] * 40, 3)
    assert np.bincount(train.labels[drawn(train, Setting(share=0.1), 0)]).tolist() == [1, 4, 20]
    assert np.bincount(train.labels[drawn(train, Setting(share=0.01), 0)]).tolist() == [1, 1, 2]
    assert drawn(train, Setting(share=1.0), 0).tolist() == list(range(243))


def test_draws_of_one_seed_are_nested_and_of_two_seeds_different() -> None:
    train = labels_only([index % 5 for index in range(200)], 5)
    one, five, ten = (set(drawn(train, Setting(shots=shots), 7).tolist()) for shots in (1, 5, 10))
    assert one < five < ten
    assert set(drawn(train, Setting(shots=5), 8).tolist()) != five
    assert set(drawn(train, Setting(shots=5), 7).tolist()) == five


def test_every_image_is_drawn_as_often_as_any_other() -> None:
    train = labels_only([0] * 10 + [1] * 30, 2)
    times = sum(np.bincount(drawn(train, Setting(shots=3), seed), minlength=40) for seed in range(2000))
    # binomial, 2000 draws: 3/10 with a deviation of 20 and 3/30 of 13; five deviations
    assert np.abs(times[:10] - 600).max() < 5 * 21
    assert np.abs(times[10:] - 200).max() < 5 * 14


def test_spread_is_the_mean_squared_distance_from_the_mean() -> None:
    x = torch.randn(300, 5) * 3 + 100
    assert spread(x) == pytest.approx(float(x.double().var(dim=0, correction=0).sum()), rel=1e-9)


def test_a_fit_on_few_labels_equals_scikit_learn_on_features_of_unit_spread() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = planted(400, 2)
    test, _ = planted(500, 3)
    train = labels_only(labels.tolist(), 4)
    index = drawn(train, Setting(shots=5), 0)
    C, path, model = fitted(x[index], train.chosen(index), spread(x), FAST.logistic, **CHOSEN)
    scaled = [(rows.double() - x.double().mean(dim=0)).numpy() / spread(x) ** 0.5 for rows in (x[index], test)]
    theirs = linear_model.LogisticRegression(C=FIXED_C, tol=1e-10, max_iter=10_000).fit(scaled[0], labels[index])
    assert pytest.approx(FIXED_C / spread(x)) == C
    assert path == []
    assert (model.predict(test).numpy() == theirs.predict(scaled[1])).mean() >= 0.998


def test_scores_do_not_change_when_features_are_scaled_and_shifted() -> None:
    x, labels = planted(400, 2)
    test, _ = planted(500, 3)
    train = labels_only(labels.tolist(), 4)
    index = drawn(train, Setting(shots=5), 0)
    first, second = (
        fitted(a[index], train.chosen(index), spread(a), FAST.logistic, **CHOSEN)[2].predict(b)
        for a, b in ((x, test), (x * 64 + 7, test * 64 + 7))
    )
    assert (first == second).float().mean() >= 0.998


def test_more_labels_than_ten_a_class_choose_c_among_themselves_alone() -> None:
    x, labels = planted(400, 4)
    train = labels_only(labels.tolist(), 4)
    index = drawn(train, Setting(share=0.2), 0)
    C, path, model = fitted(x[index], train.chosen(index), spread(x), FAST.logistic, **CHOSEN)
    assert len(path) >= 2
    assert C in [tried for tried, _ in path]
    direct = classification.fit_classes(x[index], train.chosen(index), FAST.logistic, **CHOSEN)
    assert torch.equal(model.weight, direct.model.weight)


def test_the_interval_of_equal_draws_is_that_of_the_images_alone() -> None:
    labels = np.zeros(400, dtype=np.int64)
    predicted = np.tile((np.arange(400) % 4 == 0).astype(np.int64), (5, 1))  # 75 % right
    expected = bootstrap_interval(predicted[0] == labels)
    found = draws_interval(predicted, labels, "top-1")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_the_interval_of_one_draw_is_that_of_the_images() -> None:
    labels = np.arange(300) % 3
    predicted = np.where(np.arange(300) % 7 == 0, (labels + 1) % 3, labels)[None]
    expected = bootstrap_interval(predicted[0] == labels)
    found = draws_interval(predicted, labels, "top-1")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    found = draws_interval(predicted, labels, "mean per class")
    assert found.low < mean_per_class_accuracy(predicted[0], labels) < found.high


def test_the_interval_of_a_score_without_a_mistake_still_leaves_room_for_one() -> None:
    labels = np.arange(30) % 3
    found = draws_interval(np.tile(labels, (5, 1)), labels, "top-1")
    assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / 30)), 1.0)  # Clopper and Pearson's


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    # Images and draws both matter: image i is right after draw r with probability 0.7 + a_i + b_r.
    held, trials = 0, 200
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        chance = 0.7 + rng.choice([-0.2, 0.2], size=200) + rng.normal(scale=0.04, size=8)[:, None]
        predicted = (rng.random((8, 200)) >= np.clip(chance, 0, 1)).astype(np.int64)
        found = draws_interval(predicted, np.zeros(200, dtype=np.int64), "top-1", samples=200)
        held += found.low <= 0.7 <= found.high
    assert 0.88 <= held / trials <= 0.99


def test_disagreeing_draws_widen_the_interval() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    rng = np.random.default_rng(0)
    rates = np.array([0.5, 0.6, 0.7, 0.8, 0.9])[:, None]
    predicted = (rng.random((5, 1000)) >= rates).astype(np.int64)
    found = draws_interval(predicted, labels, "top-1")
    deviation = float(np.std(rates, ddof=1)) / 5**0.5  # of a mean of five draws
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_planted_classes_are_found_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    planted_rows = run(own_data(tmp_path / "a", per_class=12), tmp_path / "a")
    shuffled_rows = run(own_data(tmp_path / "b", per_class=12, shuffled=True), tmp_path / "b")
    assert [row.variant for row in planted_rows] == [
        "10 per class",
        "5 per class",
        "1 per class",
        "100 % of labels",
        "10 % of labels",
        "1 % of labels",
    ]
    assert [row.n_train for row in planted_rows] == [30, 15, 3, 36, 3, 3]
    assert [len(row.seeds) for row in planted_rows] == [5, 5, 5, 1, 5, 5]
    for row in planted_rows:
        assert row.low <= row.value <= row.high
        assert row.value > 0.9
        assert np.mean(row.details["each draw"]) == pytest.approx(row.value)
        assert (row.metric, row.n_test, row.chance) == ("top-1", 36, 1 / 3)
    for row in shuffled_rows:
        assert 0.05 < row.value < 0.62
    assert {row.protocol for row in planted_rows} == {PROTOCOLS["few_shot"][1]}
    assert "of the drawn labels" in planted_rows[3].chosen_on
    assert planted_rows[0].chosen_on == ""
    assert "10 of" not in planted_rows[0].note
    assert "3 of 3 classes are too small for 1 % of labels: one image of each is used, 3 in all" in planted_rows[5].note


def test_all_the_labels_give_what_the_logistic_protocol_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", 120), ("test", 90)):
        labels = rng.integers(0, 3, size=count)
        pixels = np.clip(rng.normal(100 + 3 * labels[:, None, None, None], 70, size=(count, 28, 28, 3)), 0, 255)
        splits[name] = Labelled(ArraySource(pixels.astype(np.uint8), name), labels, 3)
    data, where = Data(splits), context(tmp_path)
    few = few_shot.evaluate(
        Measurement(
            PIXELS,
            data,
            TASK,
            dataclasses.replace(FAST, few_shot=FewShotOptions(shots=(), shares=(1.0,))),
            where,
        )
    )
    full = classification.logistic(Measurement(PIXELS, data, TASK, FAST, where))
    assert few[0].value == full[0].value
    assert few[0].settings["C"] == [full[0].settings["C"]]
    assert 0.4 < few[0].value < 1


def test_small_classes_are_taken_whole_and_the_row_says_so(tmp_path: Path) -> None:
    row = run(own_data(tmp_path, per_class=4), tmp_path)[0]
    assert row.n_train == 12
    assert "3 of 3 classes are too small for 10 per class: all of their images are used, 12 in all" in row.note
    assert len(row.seeds) == 1


def test_an_official_validation_split_is_left_alone(tmp_path: Path) -> None:
    data = own_data(tmp_path, per_class=6)
    first = run(data, tmp_path / "a", QUICK)
    test = data.splits["test"]
    val = Labelled(test.source, (test.labels + 1) % 3, 3)
    second = run(Data({**data.splits, "val": val}), tmp_path / "b", QUICK)
    assert [row.value for row in first] == [row.value for row in second]


def test_a_seed_gives_the_same_rows_again_and_another_seed_other_draws(tmp_path: Path) -> None:
    data = own_data(tmp_path, per_class=6, shuffled=True)
    first, again, other = (run(data, tmp_path / str(number), QUICK, seed=seed) for number, seed in enumerate((0, 0, 5)))
    assert [(row.value, row.low, row.high, row.details) for row in first] == [
        (row.value, row.low, row.high, row.details) for row in again
    ]
    assert first[1].details["each draw"] != other[1].details["each draw"]
    assert other[1].seeds == (5, 6, 7)


def test_an_interrupted_evaluation_keeps_the_draws_that_were_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = own_data(tmp_path, per_class=6)
    whole = run(data, tmp_path / "whole", QUICK)
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    calls = []

    def until_stopped(*arguments: Any, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fitted(*arguments, **given)

    monkeypatch.setattr(few_shot, "fitted", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", QUICK)
    resumed = run(data, tmp_path / "parts", QUICK)
    assert len(calls) == 1 + sum(len(row.seeds) for row in whole)  # the stopped one was done again
    assert [(row.value, row.low, row.high) for row in resumed] == [(row.value, row.low, row.high) for row in whole]
    calls[:] = [1] * 5
    run(data, tmp_path / "parts", QUICK, seed=1)  # what was kept is of another seed
    assert len(calls) == 5 + sum(len(row.seeds) for row in whole)


def test_mean_per_class_is_scored_where_the_task_says_so(tmp_path: Path) -> None:
    data = own_data(tmp_path, per_class=6)
    task = dataclasses.replace(TASK, metric="mean per class")
    row = few_shot.evaluate(Measurement(PIXELS, data, task, QUICK, context(tmp_path)))[0]
    assert row.metric == "mean per class"
    assert row.value == row.details["micro and macro"]["mean per class"]


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    data = own_data(tmp_path, per_class=3)
    with pytest.raises(UserError, match="metric 'mIoU': classification has top-1 and mean per class"):
        few_shot.evaluate(Measurement(PIXELS, data, dataclasses.replace(TASK, metric="mIoU"), FAST, context(tmp_path)))
    with pytest.raises(UserError, match="the train split is missing"):
        run(Data({"test": data.splits["test"]}), tmp_path)


def test_features_that_are_all_equal_are_measured_and_doubted_with_their_cause(tmp_path: Path) -> None:
    grey = Labelled(ArraySource(np.full((6, 28, 28, 3), 90, dtype=np.uint8), "grey"), np.arange(6) % 2, 2)
    for row in run(Data({"train": grey, "test": grey}), tmp_path / "grey"):
        assert row.value == 0.5
        (doubt,) = row.warnings
        assert "the pictures are equal, too, as grey:0 and grey:5, every value 90" in doubt
    rng = np.random.default_rng(0)
    rich = Labelled(ArraySource(rng.integers(0, 256, (6, 28, 28, 3), dtype=np.uint8), "rich"), np.arange(6) % 2, 2)
    assert run(Data({"train": rich, "test": rich}), tmp_path / "rich")[0].warnings == ()
    features = torch.ones(6, 5) + 1e-8 * torch.randn(6, 5)
    assert "rich:0 and rich:5 differ" in equal_features(rich.source, features)[0]


@pytest.mark.parametrize(("key", "value"), [("shots", (0,)), ("shares", (0.0,)), ("shares", (1.5,)), ("repeats", 0)])
def test_options_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"few_shot\.{key}="):
        FewShotOptions(**{key: value})
    with pytest.raises(UserError, match="at least one shot or share"):
        FewShotOptions(shots=(), shares=())
