"""Scores of a classifier and how sure they are: top-1, mean per class, percentile bootstrap."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def nanmean(values: ArrayLike) -> float:
    """The mean of the values that are finite; NaN where none is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")


def top1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share in [0, 1] of predictions (n,) that equal labels (n,); ValueError where shapes differ or n is 0."""
    predicted, true = _paired(predictions, labels)
    return float((predicted == true).mean())


def mean_per_class_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The accuracy of each class in labels (n,), averaged with equal weight, in [0, 1]; ValueError as for `top1`."""
    predicted, true = _paired(predictions, labels)
    _, inverse = np.unique(true, return_inverse=True)
    return float((np.bincount(inverse, weights=predicted == true) / np.bincount(inverse)).mean())


def bootstrap_interval(
    scores: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-image scores.

    scores      (n,) 0/1 (or bool) for right and wrong, or any real score per image; ValueError for any other shape
    confidence  share in (0, 1); ValueError outside
    samples     number of resamples
    returns     (low, high): the (1 ± confidence) / 2 quantiles of the mean over resamples with replacement; where all
                are right or all wrong, the exact (Clopper-Pearson) bound, since all resamples would be equal
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"the bootstrap needs scores of shape (n,) with n >= 1, got {x.shape}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is a share between 0 and 1, got {confidence}")
    rng = np.random.default_rng(seed)
    n = x.size
    if x.min() == x.max() and x[0] in (0.0, 1.0):
        # All right or all wrong: resamples cannot differ, but a new image could. The exact binomial bound.
        slack = float(((1 - confidence) / 2) ** (1 / n))
        return (slack, 1.0) if x[0] == 1.0 else (0.0, 1.0 - slack)
    if np.isin(x, (0.0, 1.0)).all():  # the number of ones in a resample is one binomial draw
        means = rng.binomial(n, x.mean(), size=samples) / n
    else:
        rows = max(1, 4_000_000 // n)  # resamples held at a time
        counts = [min(rows, samples - start) for start in range(0, samples, rows)]
        means = np.concatenate([x[rng.integers(0, n, size=(count, n))].mean(axis=1) for count in counts])
    return _percentiles(means, confidence)


def _percentiles(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _paired(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != true.shape or true.ndim != 1 or true.size == 0:
        raise ValueError(f"predictions {predicted.shape} and labels {true.shape} must both be (n,) with n >= 1")
    return predicted, true


def bootstrap_statistic(
    count: int, statistic: Callable[[np.ndarray], float], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of any statistic of a set of images, such as mAP or mIoU.

    count      of images; ValueError below 1
    statistic  weights (count,) int64, how often each image was drawn -> the statistic; NaN draws are left out
    samples    number of draws
    returns    (low, high); NaN where every draw is
    """
    if count < 1:
        raise ValueError("the bootstrap needs at least one image")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, count, size=count) for _ in range(samples))
    values = np.array([statistic(np.bincount(drawn, minlength=count)) for drawn in draws])
    values = values[np.isfinite(values)]
    return _percentiles(values) if len(values) else (float("nan"), float("nan"))
