"""Effective rank, accuracies and bootstrap intervals against literal forms and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy

from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, bootstrap_statistic, mean_per_class_accuracy, top1
from dinoreg.evaluation.metrics.knn_rankme import rankme


def test_rankme_equals_a_literal_sum_over_singular_values() -> None:
    torch.manual_seed(0)
    features = torch.randn(40, 9) @ torch.diag(torch.logspace(0, -3, 9))
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = [s / sum(singular) + 1e-7 for s in singular]
    expected = math.exp(-sum(each * math.log(each) for each in p))
    assert rankme(features) == pytest.approx(expected, rel=1e-9)


def test_rankme_of_orthogonal_features_is_their_number() -> None:
    assert rankme(3.0 * torch.eye(12)) == pytest.approx(12, rel=1e-4)
    assert rankme(torch.eye(12).repeat(5, 1)) == pytest.approx(12, rel=1e-4)


def test_rankme_of_features_on_one_line_is_one() -> None:
    line = torch.linspace(-2, 5, 31)[:, None] * torch.arange(1.0, 8.0)
    assert rankme(line) == pytest.approx(1, abs=1e-4)


def test_rankme_of_zero_features_is_zero_and_of_broken_ones_nan() -> None:
    assert rankme(torch.zeros(5, 3)) == 0.0
    assert math.isnan(rankme(torch.tensor([[1.0, float("nan")]])))


def test_bootstrap_of_outcomes_has_the_width_of_the_normal_interval() -> None:
    n, p = 20_000, 0.8
    found = bootstrap_interval(np.arange(n) < p * n)
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    assert found.low == pytest.approx(p - half, abs=0.15 * half)
    assert found.high == pytest.approx(p + half, abs=0.15 * half)
    assert found.replicates.std() == pytest.approx(half / 1.959964, rel=0.08)


def test_bootstrap_of_few_outcomes_has_the_quantiles_of_the_binomial() -> None:
    from scipy.stats import binom

    found = bootstrap_interval(np.array([1] * 13 + [0] * 7), samples=20_000)
    assert found.low == binom.ppf(0.025, 20, 13 / 20) / 20
    assert found.high == binom.ppf(0.975, 20, 13 / 20) / 20


def test_bootstrap_of_real_scores_resamples_them() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(2.0, 0.5, size=4000)
    found = bootstrap_interval(scores, samples=4000)
    half = 1.959964 * scores.std() / math.sqrt(4000)
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_replicates_are_the_figures_of_resamples_drawn_one_by_one() -> None:
    scores, rng = np.random.default_rng(3).random(17), np.random.default_rng(4)
    literal = []
    for _ in range(30):
        drawn = [int(each) for each in rng.integers(0, 17, size=17)]
        literal.append(sum(scores[each] for each in drawn) / 17)
    found = bootstrap_interval(scores, samples=30, seed=4)
    np.testing.assert_allclose(found.replicates, literal, rtol=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(literal, [0.025, 0.975])), rel=1e-12)
    fewer = bootstrap_statistic(17, lambda weights: float(weights @ scores / 17), samples=10, seed=4)
    np.testing.assert_allclose(fewer.replicates, literal[:10], rtol=1e-12)


def test_bootstrap_shrinks_to_a_point_when_all_scores_agree() -> None:
    found = bootstrap_interval(np.full(9, 0.7))
    assert (found.low, found.high) == (0.7, 0.7)


@pytest.mark.parametrize("known", [7, 6, 3])  # classes that labels have, of 7 that are predicted, and of 9 in all
def test_accuracies_equal_torchmetrics_and_scikit_learn(known: int) -> None:
    rng = np.random.default_rng(1)
    labels, predictions = np.append(rng.integers(0, known - 1, 200), known - 1), rng.integers(0, 7, 201)
    assert top1(predictions, labels) == np.mean([p == y for p, y in zip(predictions, labels)])
    macro = MulticlassAccuracy(num_classes=9, average="macro")(torch.tensor(predictions), torch.tensor(labels))
    found = mean_per_class_accuracy(predictions, labels)
    assert found == pytest.approx(macro.item(), abs=1e-6)
    if known == 7:
        assert found == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)


def test_bootstrap_of_only_right_or_only_wrong_answers_leaves_the_exact_doubt() -> None:
    from scipy.stats import binomtest

    for correct in (np.ones(18), np.zeros(30)):
        exact = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="exact")
        found = bootstrap_interval(correct)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
