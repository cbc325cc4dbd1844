"""Counts of agreement between label maps."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.metrics.miou import Confusion, count_pixels

K = 6


def interval(counts: Confusion, **options: int) -> tuple[float, float]:
    found = bootstrap_statistic(counts.num_images, counts.miou, **options)
    return found.low, found.high


def maps(count: int = 5, classes: tuple[int, ...] = (0, 1, 2, 4), seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(truth, prediction) of several sizes, right for about half of the pixels; class 3 and 5 never occur."""
    rng = np.random.default_rng(seed)
    found = []
    for image in range(count):
        shape = (7 + image, 11 - image)
        truth = rng.choice([*classes, 255], size=shape).astype(np.uint8)
        guess = rng.choice(classes, size=shape).astype(np.uint8)
        found.append((truth, np.where((rng.random(shape) < 0.5) & (truth != 255), truth, guess)))
    return found


def counted(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int = K) -> Confusion:
    return Confusion(num_classes, [count_pixels(truth, prediction, num_classes) for truth, prediction in pairs])


def test_figures_equal_a_loop_over_pixels() -> None:
    pairs = maps()
    right, true, predicted = np.zeros(K), np.zeros(K), np.zeros(K)
    for truth, prediction in pairs:
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                t, p = int(truth[y, x]), int(prediction[y, x])
                if t == 255:
                    continue
                right[t] += t == p
                true[t] += 1
                predicted[p] += 1
    found = counted(pairs)
    iou = [right[k] / (true[k] + predicted[k] - right[k]) for k in (0, 1, 2, 4)]
    np.testing.assert_allclose(found.iou()[[0, 1, 2, 4]], iou, rtol=1e-14)
    assert found.miou() == pytest.approx(sum(iou) / 4, rel=1e-14)
    assert found.pixel_accuracy() == pytest.approx(right.sum() / true.sum(), rel=1e-14)
    assert found.mean_accuracy() == pytest.approx(np.mean([right[k] / true[k] for k in (0, 1, 2, 4)]), rel=1e-14)


def test_figures_equal_torchmetrics() -> None:
    pairs = maps(seed=3)
    truth = torch.cat([torch.from_numpy(t).flatten() for t, _ in pairs]).long()
    prediction = torch.cat([torch.from_numpy(p).flatten() for _, p in pairs]).long()
    found = counted(pairs)
    jaccard = MulticlassJaccardIndex(K, average="macro", ignore_index=255)(prediction, truth)
    accuracy = MulticlassAccuracy(K, average="micro", ignore_index=255)(prediction, truth)
    per_class = MulticlassAccuracy(K, average="macro", ignore_index=255)(prediction, truth)
    assert found.miou() == pytest.approx(float(jaccard), abs=1e-6)
    assert found.pixel_accuracy() == pytest.approx(float(accuracy), abs=1e-6)
    assert found.mean_accuracy() == pytest.approx(float(per_class), abs=1e-6)


def test_counts_are_added_before_they_are_divided() -> None:
    first = (np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 1]]))  # IoU 3/4 and 0
    second = (np.array([[1, 0]]), np.array([[1, 0]]))  # IoU 1 and 1
    found = counted([first, second], 2)
    assert found.iou().tolist() == [4 / 5, 1 / 2]


def test_a_class_that_never_occurs_is_left_out_and_one_that_is_only_predicted_counts_as_zero() -> None:
    found = counted([(np.array([[0, 0, 255]]), np.array([[0, 2, 3]]))], 4)
    iou = found.iou()
    assert iou[0] == 0.5
    assert iou[2] == 0
    assert math.isnan(iou[1])
    assert math.isnan(iou[3])
    assert found.miou() == 0.25
    assert found.mean_accuracy() == 0.5


def test_nothing_but_ignored_pixels_gives_no_figure() -> None:
    found = counted([(np.full((2, 2), 255, dtype=np.uint8), np.zeros((2, 2), dtype=np.uint8))], 3)
    assert math.isnan(found.miou())
    assert math.isnan(found.pixel_accuracy())
    assert math.isnan(found.constant()[1])
    assert math.isnan(interval(found, samples=5)[0])


def test_weights_count_an_image_as_often_as_it_was_drawn() -> None:
    pairs = maps()
    drawn = counted([pairs[0], pairs[0], pairs[3], pairs[3], pairs[3]])
    assert counted(pairs).miou(np.array([2, 0, 0, 3, 0])) == drawn.miou()


def test_the_interval_is_the_spread_over_resampled_images() -> None:
    pairs = maps(count=8)
    found = counted(pairs)
    rng = np.random.default_rng(7)
    literal = [counted([pairs[i] for i in rng.integers(0, 8, size=8)]).miou() for _ in range(200)]
    low, high = interval(found, samples=200, seed=7)
    assert low == pytest.approx(np.quantile(literal, 0.025), abs=1e-12)
    assert high == pytest.approx(np.quantile(literal, 0.975), abs=1e-12)
    assert low < found.miou() < high


def test_the_constant_prediction_is_the_most_frequent_class_everywhere() -> None:
    pairs = maps(seed=5)
    found = counted(pairs)
    best, score = found.constant()
    literal = counted([(truth, np.full_like(truth, best)) for truth, _ in pairs])
    assert score == pytest.approx(literal.miou(), rel=1e-14)
    others = (counted([(t, np.full_like(t, k)) for t, _ in pairs]).miou() for k in range(K))
    assert score == pytest.approx(max(others), rel=1e-14)


def test_two_thousand_images_of_150_classes_take_a_few_megabytes() -> None:
    rng = np.random.default_rng(0)
    tracemalloc.start()
    images = [count_pixels(rng.integers(0, 150, (8, 8)), rng.integers(0, 150, (8, 8)), 150) for _ in range(2000)]
    interval(Confusion(150, images), samples=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # a confusion matrix for each would take 360 MB
