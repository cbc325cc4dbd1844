"""A model's row against a baseline's: the paired bootstrap against its literal form, and what is said of few images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from dinoreg.evaluation.comparison import compare, compared
from dinoreg.evaluation.metrics.bootstrap import Interval, bootstrap_interval, bootstrap_statistic, draws_interval
from dinoreg.evaluation.result import Row


def row(value: float, interval: Interval, count: int, metric: str = "top-1", **fields: Any) -> Row:
    replicates = tuple(interval.replicates.tolist())
    return Row("any", metric, value, interval.low, interval.high, n_test=count, replicates=replicates, **fields)


def accuracy(right: np.ndarray) -> Row:
    return row(float(right.mean()), bootstrap_interval(right), len(right))


def outcomes(only_ours: int, only_theirs: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong answers of two models to the same images."""
    ours = np.repeat([1, 0, 1, 0], [only_ours, only_theirs, both, neither])
    return ours, np.repeat([0, 1, 1, 0], [only_ours, only_theirs, both, neither])


def literal(count: int, difference: Any, samples: int = 1000, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [difference(rng.integers(0, count, size=count)) for _ in range(samples)]


def test_the_difference_is_that_of_a_loop_over_resamples_of_pairs() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(60) < 0.7, rng.random(60) < 0.5
    expected = literal(60, lambda drawn: ours[drawn].mean() - theirs[drawn].mean())
    found = compare(accuracy(ours), accuracy(theirs))
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-12)


def test_the_difference_of_means_per_class_resamples_the_same_images() -> None:
    rng = np.random.default_rng(2)
    labels = rng.choice(4, size=80, p=[0.55, 0.3, 0.1, 0.05])
    ours, theirs = (np.where(rng.random(80) < share, labels, rng.integers(0, 4, 80)) for share in (0.8, 0.4))

    def mean_per_class(predicted: np.ndarray, drawn: np.ndarray) -> float:
        present = [k for k in range(4) if (labels[drawn] == k).any()]
        return float(np.mean([(predicted[drawn] == k)[labels[drawn] == k].mean() for k in present]))

    # What draws_interval takes from its own generator (draws of labels) does not touch that of the images.
    expected = literal(80, lambda drawn: mean_per_class(ours, drawn) - mean_per_class(theirs, drawn), samples=300)
    rows = []
    for predicted in (ours, theirs):
        interval = draws_interval(predicted[None], labels, "mean per class", samples=300)
        rows.append(row(mean_per_class(predicted, np.arange(80)), interval, 80, "mean per class"))
    found = compare(*rows)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-12)


def test_any_statistic_is_paired_and_lower_may_be_better() -> None:
    rng = np.random.default_rng(3)
    hard = rng.gamma(2.0, 1.0, size=50)  # the error of an image is mostly the image's
    errors = hard + rng.normal(0.3, 0.1, 50), hard + rng.normal(0.5, 0.1, 50)

    def root(values: np.ndarray) -> Row:
        interval = bootstrap_statistic(50, lambda weights: float(np.sqrt(weights @ values**2 / 50)))
        return row(float(np.sqrt((values**2).mean())), interval, 50, "RMSE", unit="m", higher_is_better=False)

    expected = literal(50, lambda drawn: float(np.subtract(*(np.sqrt((e[drawn] ** 2).mean()) for e in errors))))
    model, baseline = map(root, errors)
    found = compare(model, baseline)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-12)
    assert found["high"] < 0
    assert (found["verdict"], compare(baseline, model)["verdict"]) == ("better", "worse")
    assert model.high > baseline.low  # side by side, the intervals overlap


def test_a_gain_that_overlapping_intervals_hide_is_shown_by_the_pairs() -> None:
    # As measured on 103 photographs of foods: 75.7 % against 62.1 %, 14 more right, most answers the same for both.
    ours, theirs = outcomes(18, 4, 60, 21)
    model, baseline = accuracy(ours), accuracy(theirs)
    assert model.low < baseline.high
    (judged,) = compared([model], {"random init": [baseline]})
    found = judged.against["random init"]
    assert found["verdict"] == "better"
    assert found["difference"] == pytest.approx(14 / 103)
    assert 0.04 < found["low"] < 0.07
    assert 0.20 < found["high"] < 0.24


@pytest.mark.parametrize("only_ours", range(1, 15))
@pytest.mark.parametrize("only_theirs", [0, 1, 3])
def test_a_verdict_is_no_bolder_than_the_exact_test_of_mcnemar(only_ours: int, only_theirs: int) -> None:
    found = compare(*map(accuracy, outcomes(only_ours, only_theirs, 60, 26)))
    p = binomtest(only_ours, only_ours + only_theirs).pvalue
    if p > 0.08:
        assert found["verdict"] == "not shown"
    if p < 0.02:
        assert found["verdict"] == "better"


@pytest.mark.parametrize(("count", "said"), [(1, "not shown"), (5, "not shown"), (6, "better"), (40, "better")])
def test_all_right_against_all_wrong_is_as_sure_as_the_number_of_images(count: int, said: str) -> None:
    found = compare(accuracy(np.ones(count)), accuracy(np.zeros(count)))
    assert found["verdict"] == said
    assert found["high"] == 1.0
    # the bound of the sign test: a share p of images would come out this way, the others the other way
    p = binomtest(count, count).proportion_ci(0.95, method="exact").low
    assert found["low"] == pytest.approx(p - (1 - p))


def test_equal_answers_are_no_difference_and_equal_shares_are_none_shown() -> None:
    ours, theirs = outcomes(5, 5, 40, 10)
    same = compare(accuracy(ours), accuracy(ours))
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "verdict": "no difference"}
    assert compare(accuracy(ours), accuracy(theirs))["verdict"] == "not shown"
    assert compare(accuracy(np.ones(9)), accuracy(np.ones(9)))["verdict"] == "no difference"


def test_rows_without_replicates_are_not_compared() -> None:
    bare = Row("any", "top-1", 0.7, 0.69, 0.71, n_test=900)
    assert compare(bare, Row("any", "top-1", 0.1, 0.09, 0.11, n_test=900)) == {
        "difference": pytest.approx(0.6),
        "low": None,
        "high": None,
        "verdict": "not compared",
    }
    other = Row("any", "top-1", 0.1, 0.09, 0.11, n_test=900, variant="k = 5")
    assert compared([bare], {"raw pixels": [other]})[0].against == {}
