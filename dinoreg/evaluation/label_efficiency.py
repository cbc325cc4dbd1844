"""Accuracy over the number of labels, and how many labels one encoder needs to be as good as another.

A curve is rows of one encoder by ascending `n_train`: those of the few-shot protocol for shares of the labels, and that
of logistic regression for all of them. Rows of other encoders on the same images have the same resamples, so that a
number of labels has an interval without a further bootstrap: it is read off the curves of every resample.
"""

from collections.abc import Sequence

import numpy as np

from dinoreg.evaluation.benchmark import PROTOCOLS
from dinoreg.evaluation.result import Row

HALVINGS = 6  # at most, of the number of labels
FEWEST = 2  # labels a class on average, about, at the lower end of a curve


def shares(labels: int, num_classes: int) -> tuple[float, ...]:
    """The shares of the labels at which a curve is measured besides 1: a half, a quarter, …; always one at least."""
    halves = (0.5**halving for halving in range(1, HALVINGS + 1))
    return tuple(share for share in halves if share == 0.5 or share * labels >= FEWEST * num_classes)


def curve(rows: Sequence[Row], judge: Row) -> list[Row]:
    """The rows for shares of the labels and that of all, by ascending number of labels.

    judge  the row of logistic regression, whose metric counts
    """
    few = [row for row in rows if row.protocol == PROTOCOLS["few_shot"][1] and row.metric == judge.metric]
    return [*sorted(few, key=lambda row: row.n_train), judge]


def labels_needed(points: Sequence[Row], goal: Row) -> dict[str, float]:
    """How many labels bring an encoder to the figure of another: {"labels", "low", "high"}, a 95 % interval.

    points   its `curve`; between two points accuracy goes by the logarithm of the number of labels, and it does not
             fall with more of them: what is below the accuracy of fewer labels counts as that
    goal     the other's row; both have replicates of the same images and seed
    returns  infinity where the figure is not reached, and the least number of the curve where that is enough
    """
    goals = np.array([goal.value, *goal.replicates])
    values = np.array([[row.value, *row.replicates] for row in points])[:, : len(goals)]
    reached = np.maximum.accumulate(values, axis=0)  # (points, 1 + samples)
    logs, samples = np.log([row.n_train for row in points]), np.arange(reached.shape[1])
    found = np.full(len(samples), np.inf)
    after = (reached < goals).sum(axis=0)  # the first point that is as good as the goal
    found[after == 0] = points[0].n_train
    between = samples[(after > 0) & (after < len(points))]
    last, first = reached[after[between], between], reached[after[between] - 1, between]
    part = (goals[between] - first) / (last - first)
    found[between] = np.exp(logs[after[between] - 1] + part * (logs[after[between]] - logs[after[between] - 1]))
    low, high = np.quantile(found[1:], [0.025, 0.975], method="inverted_cdf") if len(found) > 1 else (np.nan, np.nan)
    return {"labels": float(found[0]), "low": float(low), "high": float(high)}
