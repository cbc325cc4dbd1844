"""What every protocol does around its own arithmetic: take splits, choose a candidate, resume a pass, give rows.

A protocol reads from top to bottom in its `evaluate`:

    measured.check_metric("segmentation", ("mIoU",))
    train, test, val = measured.splits(Segmented, MISSING)                              # val: None where not official
    …                                                                                   # learn something from train
    tried = scores of every candidate on val, or None                                   # {candidate: score}
    reported = scores of every candidate on test
    best, chosen_on = choose_best(reported, tried)
    return [measured.row(reported[best], interval, n_train=len(train), n_test=len(test), chosen_on=chosen_on)]

A long pass over images (or draws, or pairs) is `resumable_map(context, "name", key, count, compute, "what", load)`: a
list of what `compute` gave for each, saved now and then.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import PROTOCOLS, Task
from dinoreg.evaluation.context import Context, SavedState
from dinoreg.evaluation.data import Data, Labelled, MultiLabelled
from dinoreg.evaluation.metrics.bootstrap import Clusters, Interval
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel

S = TypeVar("S")  # kind of a split
L = TypeVar("L", Labelled, MultiLabelled)
K = TypeVar("K")  # name of a candidate
T = TypeVar("T")

Loader = Callable[[int], Any]
OFFICIAL, REPORTED = "the official validation split", "the reported split itself"


@dataclass(frozen=True)
class Fold(Generic[S]):
    """One training, and what is tested after it.

    val   the official validation split, or None
    rows  (m,) places of its test images among all that are tested
    """

    train: S
    test: S
    val: S | None
    rows: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """One protocol on one dataset with one encoder: its splits, and rows that share what is true of all of them.

    options  with what the dataset sets for its protocol
    started  by time.monotonic(), in seconds
    """

    encoder: Encoder
    data: Data
    task: Task
    options: EvalOptions
    context: Context
    started: float = field(default_factory=time.monotonic)

    def check_metric(self, subject: str, metrics: Iterable[str]) -> None:
        """UserError where the task's metric is none of those of the protocol.

        subject  the protocol's name in the message
        """
        if self.task.metric not in metrics:
            raise UserError(f"metric {self.task.metric!r}: {subject} has {' and '.join(metrics)}")

    def split(self, name: str, kind: type[S], missing: str) -> S:
        """A split by name; UserError where it is missing, empty or of another kind.

        kind     class of the split, such as Labelled
        missing  the message; {name} and {splits} are filled in
        """
        split = self.data.splits.get(name)
        if not isinstance(split, kind) or not len(split):  # type: ignore[arg-type]
            raise UserError(missing.format(name=name, splits=", ".join(self.data.splits)))
        return split

    def splits(self, kind: type[S], missing: str) -> tuple[S, S, S | None]:
        """The splits "train" and "test", and "val" where there is an official one; UserError as `split` raises it."""
        train, test = (self.split(name, kind, missing) for name in ("train", "test"))
        return train, test, self.split("val", kind, missing) if "val" in self.data.splits else None

    def folds(self, kind: type[L], missing: str) -> tuple[L, list[Fold[L]]]:
        """All images that are tested, and each training with its own of them: one, unless the data come in folds.

        raises  as `split`
        """
        folds = self.data.folds
        if folds is None:
            train, test, val = self.splits(kind, missing)
            return test, [Fold(train, test, val, np.arange(len(test)))]
        test = self.split("test", kind, missing)
        parts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
        return test, [Fold(test.chosen(learnt), test.chosen(rows), None, rows) for learnt, rows in parts]

    def clusters(self, test: Labelled | MultiLabelled) -> Clusters:
        """What belongs together among all images that are tested, for the bootstrap."""
        return Clusters(test.pictures, self.data.folds)

    def row(self, value: float, interval: Interval, *, variant: str = "", **fields: Any) -> Row:
        """One figure with its 95 % interval, by default of the task's metric; shares in [0, 1].

        interval  from the resamples of `context.seed`, so that figures of the same images are compared in pairs
        variant  what distinguishes it from the other rows; the dataset's own variant is put behind
        fields   of Row: n_train, n_test, chosen_on, settings, details, …; `hours` are those since the start
        """
        shared: dict[str, Any] = {
            "protocol": PROTOCOLS[self.task.protocol][1],
            "metric": self.task.metric,
            "variant": ", ".join(filter(None, (variant, self.data.variant))),
            "seeds": (self.context.seed,),
            "hours": (time.monotonic() - self.started) / 3600,
        }
        replicates = tuple(interval.replicates.tolist())
        return Row(value=value, low=interval.low, high=interval.high, replicates=replicates, **(shared | fields))


def per_fold(values: Sequence[T]) -> T | list[T]:
    """What was chosen, as settings hold it: of a single training by itself, of several folds in a list."""
    return values[0] if len(values) == 1 else list(values)


def choose_best(
    reported: Mapping[K, float], validation: Mapping[K, float] | None = None, chosen_on: str = OFFICIAL
) -> tuple[K, str]:
    """The candidate of the highest score (the first of equals), and in words what it was chosen on.

    reported    {candidate: score on the reported split}
    validation  the same on images that are not reported; None: the reported scores decide, and the words say so
    chosen_on   the words for `validation`

    A single candidate is chosen on nothing: "". A score that is not finite is worse than every other.
    """
    if len(reported) == 1:
        return next(iter(reported)), ""
    scores, words = (reported, REPORTED) if validation is None else (validation, chosen_on)
    return max(scores, key=lambda key: scores[key] if math.isfinite(scores[key]) else -math.inf), words


def resumable_map(
    context: Context, name: str, key: object, count: int, compute: Callable[[int, Any], T], what: str, load: Loader
) -> list[T]:
    """[compute(index, load(index)) for index in range(count)], saved every SAVE_SECONDS and at the end.

    name     of the saved state, distinct within the evaluation
    key      what the results depend on; a state that was saved under another (by its repr) is not used
    compute  returns tensors, plain values, or lists and dicts of them, which `SavedState` can save
    what     is shown beside the progress
    load     runs ahead in `context.workers` threads
    """
    saved = SavedState(context, name, key)
    results: list[T] = saved.state["results"] if saved.state is not None else []
    first = len(results)
    loaded = parallel(load, range(first, count), context.workers)
    for index, each in enumerate(context.progress(loaded, count - first, what), first):
        results.append(compute(index, each))
        saved.save_when_due(lambda: {"results": results}, now=index + 1 == count)
    return results
