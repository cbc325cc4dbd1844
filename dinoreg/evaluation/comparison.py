"""A model's rows against those of its baselines, by the paired difference on the same test images.

Two intervals that overlap say little about the difference of two figures of the *same* images: what is hard for one is
mostly hard for the other. The difference of each resample has a much shorter interval (`bootstrap.paired_difference`).

A curve of label efficiency is rows of one encoder by ascending `n_train`: those of the few-shot protocol for shares of
the labels, and that of logistic regression for all of them. How many labels one encoder needs to be as good as another
is read off the curves of every resample, and so has an interval without a further bootstrap.

Doubts are what makes a result say less than its numbers seem to. Each is a line that begins with its name.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dinoreg.evaluation.benchmark import PROTOCOLS
from dinoreg.evaluation.data import Data, MultiLabelled
from dinoreg.evaluation.metrics.bootstrap import Interval, exact_bound, paired_difference
from dinoreg.evaluation.result import Result, Row, headlines
from dinoreg.runtime.templates import score

COUNTED = ("top-1", "mean per class", "CorLoc")  # metrics that count images as right or wrong

MAJORITY = "majority class"  # what else a row is compared with: always naming the class that is most frequent in train
BETTER, WORSE, NOT_SHOWN, SAME, UNKNOWN = "better", "worse", "not shown", "no difference", "not compared"


def compared(rows: Sequence[Row], baselines: Mapping[str, Sequence[Row]]) -> tuple[Row, ...]:
    """The rows with what they are against each baseline that has a row of the same key, added to `Row.against`."""
    found = []
    for row in rows:
        same = {name: next((each for each in those if each.key == row.key), None) for name, those in baselines.items()}
        against = {name: compare(row, other) for name, other in same.items() if other is not None}
        found.append(replace(row, against=row.against | against))
    return tuple(found)


def between(results: Sequence[tuple[str, Result]]) -> list[dict[str, Any]]:
    """Later results against the first on the same images, by the first row of each protocol.

    results  with what each is called
    returns  `compare` with "dataset", "protocol", "metric", "unit", "n_test", and "values" of the two that "model" and
             "other" name
    """
    found, first = [], dict[tuple[str, ...], tuple[str, str, Row]]()
    for name, result in results:
        for row in headlines(result.rows):
            dataset, other, before = first.setdefault((row.tested, *row.key), (result.dataset, name, row))
            if row.tested and name != other:
                about = {key: getattr(row, key) for key in ("protocol", "metric", "unit", "n_test")}
                about |= {"dataset": dataset, "model": name, "other": other, "values": (row.value, before.value)}
                found.append(about | compare(row, before))
    return found


def with_majority(row: Row, majority: Row) -> Row:
    """A row beside the figure of always naming the largest class, `majority`, of the same images and seed."""
    return replace(row, majority=majority.value, against=row.against | {MAJORITY: compare(row, majority)})


def compare(row: Row, baseline: Row) -> dict[str, Any]:
    """The difference of two rows of the same test images, which have their replicates from the same seed: `judged`."""
    replicates = paired_difference(row.replicates, baseline.replicates)
    count, counted = row.n_test, row.metric in COUNTED
    return judged(row.value - baseline.value, replicates, count, counted, row.higher_is_better)


def judged(
    difference: float, interval: Interval, count: int, counted: bool = True, higher_is_better: bool = True
) -> dict[str, Any]:
    """What the difference of two figures of the same test images says.

    interval  of the difference, with its replicates
    count     of test images, 0 where it is not known
    counted   whether the figures count images as right or wrong
    returns   "difference"  as given
              "low", "high" its 95 % interval; None where there are no replicates or a value is not finite
              "verdict"     "better" or "worse" where the interval leaves out 0, with regard to the metric's direction;
                            "not shown"; "no difference" where every resample is the same for both; "not compared"
                            where there is no interval

    Two corrections for few images. Where all resamples have one difference other than 0, one end is the exact bound of
    the sign test. Where images are counted as right or wrong, 0 has to be left out by more than one image, which is
    the continuity correction of McNemar's test: 5 images that only one of the two gets right are too few, 6 are not.
    """
    if not math.isfinite(difference) or math.isnan(interval.low):
        return {"difference": difference, "low": None, "high": None, "verdict": UNKNOWN}
    low, high = interval.low, interval.high
    margin = 1 / count + 1e-9 if counted and count else 0.0
    if low == high != 0.0 and count:  # the images agree; whether others would is the question of the sign test
        ends, margin = (low, low * (2 * exact_bound(count) - 1)), 0.0
        low, high = min(ends), max(ends)
    sign = 1.0 if higher_is_better else -1.0
    worst, best = sorted((sign * low, sign * high))
    if difference == low == high == 0.0 and not np.nan_to_num(interval.replicates).any():
        said = SAME
    else:
        said = BETTER if worst > margin else WORSE if best < -margin else NOT_SHOWN
    return {"difference": difference, "low": low, "high": high, "verdict": said}


FEW = 30  # test images below which a verdict is hardly possible
HALF = 0.5  # of the ground truth


def doubts(rows: Sequence[Row], baselines: Mapping[str, Sequence[Row]], data: Iterable[Data]) -> list[str]:
    """The doubts about a measurement, for the `warnings` of its result.

    rows       of the model, already compared with the baselines and with the largest class
    baselines  {name: rows}
    data       of every task
    """
    found = [line for row in rows for line in row.warnings]
    of_kind = defaultdict[tuple[str, str], list[str]](list)
    for row in headlines(rows):
        for kind in _kinds(row, tuple(name for name in baselines if name in row.against)):
            of_kind[kind].append(f"{row.protocol} {score(row.value, row.unit)}")
    found += [f"{name}: {', '.join(figures)}: {doubt}" for (name, doubt), figures in of_kind.items()]
    fewest = min((row.n_test for row in rows if row.n_test), default=FEW)
    if fewest < FEW:
        found.append(f"few test images: {fewest}, of which one is {100 / fewest:.1f} points")
    for each in data:
        test = each.splits.get("test")
        used = float((test.labels >= 0).mean()) if isinstance(test, MultiLabelled) else 1.0
        if used < HALF:
            found.append(f"unused truth: only {used:.0%} of the labels of test say yes or no")
    return list(dict.fromkeys(found))


def _kinds(row: Row, baselines: Sequence[str]) -> list[tuple[str, str]]:
    """The names of the doubts about a figure that was compared with some baselines, and what they are in words."""
    found = []
    guess = max(each for each in (row.chance, row.majority, -1.0) if each is not None)
    against = row.against.get(MAJORITY, {})
    if row.unit == "share" and guess > 1 - 1e-9:
        found.append(("one answer", "guessing reaches 100 %"))
    elif against.get("verdict", UNKNOWN) not in (BETTER, UNKNOWN):
        shown = "not shown to be" if against["difference"] > 0 else "not"
        found.append(("largest class", f"{shown} better than always naming it, {score(row.majority or 0.0, row.unit)}"))
    same = [name for name in baselines if row.against[name]["verdict"] == SAME]
    if len(same) > 1 and len(same) == len(baselines):
        found.append(("all the same", f"no other figure than {' and '.join(same)}, on every resample"))
    else:
        found += [(f"as {name}", f"no other figure than {name}, on every resample") for name in same]
    return found


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
