"""Scores of a classifier and how sure they are: top-1, mean per class, percentile bootstrap, paired differences.

Every interval is from the same resamples: those of `resample` for the test images, their clusters and the seed. So
resample b of one figure and resample b of another are of the same images, and their differences are the paired
bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13), which needs no further pass
over the images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

SAMPLES = 1000  # resamples of a figure
Statistic = Callable[[np.ndarray], float]  # of a set of images, given how often each is in it


@dataclass(frozen=True)
class Clusters:
    """Which test images belong together, and so are drawn together.

    pictures  (n,) the same number for copies of one picture; None: there are none
    folds     (n,) the fold that each image is tested in; None: all are tested after one training
    """

    pictures: np.ndarray | None = None
    folds: np.ndarray | None = None


ALONE = Clusters()


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a figure, and the figure of every resample of the images.

    low, high   the ends, in the figure's unit; NaN where no resample has a figure
    replicates  (samples,) float64; NaN where a resample has no figure
    """

    low: float
    high: float
    replicates: np.ndarray


def nanmean(values: ArrayLike) -> float:
    """The mean of the values that are finite; NaN where none is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")


def top1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share in [0, 1] of predictions (n,) that equal labels (n,), n >= 1."""
    return float((np.asarray(predictions) == np.asarray(labels)).mean())


def mean_per_class_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The accuracy of each class, averaged with equal weight, in [0, 1].

    As torchmetrics' macro average, which DINOv2's code reports: a class without a test image is left out, unless it is
    predicted, and then counts as 0. Where labels (n,) hold every class it is the balanced accuracy.
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    _, inverse = np.unique(true, return_inverse=True)
    recalls = np.bincount(inverse, weights=predicted == true) / np.bincount(inverse)
    return float(recalls.sum() / (len(recalls) + count_absent(predicted, true)))


def count_absent(predicted: np.ndarray, true: np.ndarray) -> int:
    """How many classes are predicted that no image has."""
    return len(np.setdiff1d(predicted, true))


def resample(count: int, samples: int = SAMPLES, seed: int = 0, clusters: Clusters = ALONE) -> Iterator[np.ndarray]:
    """How often each image is in each of `samples` resamples with replacement, (count,) int64 each.

    With copies, pictures are drawn. With K folds it is the two-stage bootstrap (Davison and Hinkley, Bootstrap Methods
    and their Application, 1997, section 3.8): K - 1 folds, and as many pictures from each as it has. Drawn folds stand
    for other training sets; K - 1, because K would let their mean vary by a factor (K - 1) / K too little. To draw
    pictures within drawn folds counts their variance nearly twice, which makes up for what folds cannot show: their
    training sets overlap, and no cross-validation tells by how much that lets its figure vary (Bengio and Grandvalet,
    JMLR 2004). `tests/test_folds.py` holds the interval against the accuracy of fresh training sets.

    Fewer samples are the first of more.
    """
    rng = np.random.default_rng(seed)
    pictures = np.arange(count) if clusters.pictures is None else clusters.pictures
    folds = np.zeros(count, dtype=np.int64) if clusters.folds is None else clusters.folds
    units, unit_of = np.unique(np.stack([folds, pictures]), axis=1, return_inverse=True)
    members = [np.flatnonzero(units[0] == fold) for fold in np.unique(folds)]
    for _ in range(samples):
        drawn = rng.integers(0, len(members), size=len(members) - 1) if len(members) > 1 else (0,)
        picked = [members[fold][rng.integers(0, len(members[fold]), size=len(members[fold]))] for fold in drawn]
        yield np.bincount(np.concatenate(picked), minlength=units.shape[1])[unit_of.ravel()]


def bootstrap_statistic(
    count: int, statistic: Statistic, samples: int = SAMPLES, seed: int = 0, clusters: Clusters = ALONE
) -> Interval:
    """95 % percentile bootstrap interval of any statistic of a set of images, such as mAP or mIoU.

    count      of images; ValueError below 1
    statistic  weights (count,) int64, how often each image was drawn -> the statistic; NaN draws do not count
    clusters   of the images; by default each stands for itself
    """
    return percentile_interval(np.array([statistic(weights) for weights in resample(count, samples, seed, clusters)]))


def bootstrap_interval(scores: ArrayLike, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """95 % percentile bootstrap interval of the mean of per-image scores.

    scores   (n,) 0/1 (or bool) for right and wrong, or any real score per image; n >= 1
    returns  the 2.5 % and 97.5 % quantiles of the mean over resamples; where all are right or all wrong, the exact
             (Clopper-Pearson) bound, since all resamples are equal but a new image could differ
    """
    x = np.asarray(scores, dtype=np.float64)
    n = x.size
    if x.min() == x.max():
        slack = 1.0 - exact_bound(n)
        low, high = {1.0: (1.0 - slack, 1.0), 0.0: (0.0, slack)}.get(x[0], (x[0], x[0]))
        return Interval(float(low), float(high), np.full(samples, x[0]))
    return bootstrap_statistic(n, lambda weights: float(weights @ x / n), samples, seed)


def draws_interval(
    predicted: np.ndarray,
    labels: np.ndarray,
    metric: str,
    samples: int = SAMPLES,
    seed: int = 0,
    clusters: Clusters = ALONE,
) -> Interval:
    """95 % bootstrap interval of the mean accuracy over draws of labels; both labels and test images are resampled.

    predicted  (R, n) classes of n test images after learning from each of R draws of labels
    labels     (n,) true classes
    metric     "top-1", else mean per class
    samples    number of resamples
    seed       of the resamples; draws are resampled by their number, so that encoders with the same ones compare
    clusters   of the test images, which have draws of their own in each fold

    Each resample takes n images, and R - 1 draws: with R, their mean would vary by a factor (R - 1) / R too little.
    """
    correct = (predicted == labels).astype(np.float64)  # (R, n)
    if correct.min() == correct.max():  # nothing to resample: the exact bound for the images
        return bootstrap_interval(correct[0], samples, seed)
    repeats, count = correct.shape
    rng = np.random.default_rng(repeats)
    names, classes = np.unique(labels, return_inverse=True)
    folds = (
        np.zeros(count, dtype=np.int64) if clusters.folds is None else np.unique(clusters.folds, return_inverse=True)[1]
    )
    shape = folds.max() + 1, max(repeats - 1, 1)
    if metric != "top-1":  # as in `mean_per_class_accuracy`
        correct *= np.array([[len(names) / (len(names) + count_absent(draw, labels))] for draw in predicted])

    def resampled(weights: np.ndarray) -> float:
        picked = np.stack([np.bincount(draws, minlength=repeats) for draws in rng.integers(0, repeats, size=shape)])
        right = weights * (picked[folds].T * correct).sum(axis=0) / shape[1]
        if metric == "top-1":
            return float(right.sum() / weights.sum())
        per_class = np.bincount(classes, weights=weights)
        return float((np.bincount(classes, weights=right)[per_class > 0] / per_class[per_class > 0]).mean())

    return bootstrap_statistic(count, resampled, samples, seed, clusters)


def exact_bound(count: int) -> float:
    """The exact lower 97.5 % bound (Clopper and Pearson, 1934) of a share of which all `count` cases are."""
    return float(0.025 ** (1 / count))


def percentile_interval(replicates: ArrayLike) -> Interval:
    """The 2.5 % and 97.5 % quantiles of the finite ones among replicates (samples,); NaN where none is."""
    every = np.asarray(replicates, dtype=np.float64)
    known = every[np.isfinite(every)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Interval(float(low), float(high), every)


def paired_difference(ours: ArrayLike, theirs: ArrayLike) -> Interval:
    """95 % interval of the difference of two figures of the same images, by their replicates.

    ours, theirs  (samples,) replicates from the same images and seed; of unequal numbers, the first ones of both count
    """
    shared = min(np.size(ours), np.size(theirs))
    with np.errstate(invalid="ignore"):
        return percentile_interval(np.asarray(ours, float)[:shared] - np.asarray(theirs, float)[:shared])
