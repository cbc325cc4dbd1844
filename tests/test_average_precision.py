"""Average precision against literal loops in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import ArrayLike

from dinoreg.evaluation.metrics.average_precision import Curve, Ranking


def average_precision(
    scores: ArrayLike,
    labels: ArrayLike,
    ignored: ArrayLike | None = None,
    points: str = "11",
    weights: ArrayLike | None = None,
) -> float:
    return Ranking(scores, labels, ignored).curve(weights).average(points)


def literal(scores: np.ndarray, labels: np.ndarray, points: str, weights: np.ndarray | None = None) -> float:
    """The devkit's definition, every threshold tried, in fractions."""
    counts = np.ones(len(scores), dtype=int) if weights is None else weights
    repeated = [(s, y) for s, y, w in zip(scores, labels, counts) for _ in range(w)]
    positives = sum(bool(y) for _, y in repeated)
    curve = []
    for threshold in sorted({s for s, _ in repeated}, reverse=True):
        kept = [bool(y) for s, y in repeated if s >= threshold]
        curve.append((Fraction(sum(kept), positives), Fraction(sum(kept), len(kept))))
    total = Fraction(0)
    if points == "11":
        for level in range(11):
            total += max((p for r, p in curve if r >= Fraction(level, 10)), default=Fraction(0)) / 11
    else:
        before = Fraction(0)
        for recall, _ in curve:
            total += (recall - before) * max(p for r, p in curve if r >= recall)
            before = recall
    return float(total)


def ranked(seed: int, count: int = 60, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.3
    scores = rng.normal(size=count) + labels
    return (np.round(scores, 0) if ties else scores), labels


@pytest.mark.parametrize("points", ["11", "all"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_the_literal_loop(points: str, ties: bool, seed: int) -> None:
    scores, labels = ranked(seed, ties=ties)
    assert average_precision(scores, labels, points=points) == pytest.approx(literal(scores, labels, points), abs=1e-12)


@pytest.mark.parametrize("points", ["11", "all"])
def test_a_weight_counts_an_image_that_many_times(points: str) -> None:
    scores, labels = ranked(7, count=40, ties=True)
    weights = np.random.default_rng(2).integers(0, 3, size=40)
    expected = literal(scores, labels, points, weights)
    assert Ranking(scores, labels).curve(weights).average(points) == pytest.approx(expected, abs=1e-12)


def test_ignored_images_count_neither_way() -> None:
    scores, labels = ranked(5)
    ignored = np.random.default_rng(3).random(60) < 0.4
    without = average_precision(scores[~ignored], labels[~ignored])
    assert average_precision(scores, labels, ignored) == without
    assert average_precision(scores, labels) != without


def test_equal_scores_do_not_depend_on_the_order_of_the_images() -> None:
    scores, labels = ranked(9, ties=True)
    turned = np.random.default_rng(4).permutation(60)
    for points in ("11", "all"):
        assert average_precision(scores, labels, points=points) == average_precision(
            scores[turned], labels[turned], points=points
        )


def test_a_constant_score_is_worth_the_share_of_positives() -> None:
    labels = np.arange(50) % 5 == 0
    for points in ("11", "all"):
        assert average_precision(np.zeros(50), labels, points=points) == pytest.approx(0.2)


def test_a_recall_of_three_tenths_reaches_the_level_of_three_tenths() -> None:
    # Three right, then many wrong, then the other seven: levels 0 to 0.3 have precision 1.
    labels = np.array([1] * 3 + [0] * 90 + [1] * 7)
    expected = (4 * 1.0 + 7 * 10 / 100) / 11
    assert average_precision(-np.arange(100.0), labels) == pytest.approx(expected)


def test_a_perfect_ranking_scores_one_and_missing_detections_cost_recall() -> None:
    labels = np.array([1, 1, 0, 0, 0])
    assert average_precision([5, 4, 3, 2, 1], labels) == 1.0
    half = Curve(np.array([1.0, 2.0]), np.array([0.0, 0.0]), positives=4)
    assert half.average("all") == 0.5
    assert half.average("11") == pytest.approx(6 / 11)


def test_nothing_to_find_has_no_average_precision() -> None:
    assert np.isnan(average_precision([0.1, 0.2], [0, 0]))
    assert np.isnan(average_precision([0.1, 0.2], [1, 0], ignored=[1, 1]))
