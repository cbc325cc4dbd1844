"""A model's rows against those of its baselines, by the paired difference on the same test images.

Two intervals that overlap say little about the difference of two figures of the *same* images: what is hard for one is
mostly hard for the other. The difference of each resample has a much shorter interval (`bootstrap.paired_difference`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dinoreg.evaluation.metrics.bootstrap import Interval, exact_bound, paired_difference
from dinoreg.evaluation.result import Result, Row, headlines

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
