"""How far a few labels go: logistic regression on the class tokens of 1, 5, 10 images per class and of 1, 10, 100 %.

Each setting is drawn several times, every time as many images of each class (shots) or the same share of each class but
at least one (shares), and scored on the whole test split. Of the training labels only those that are drawn are used:

- up to 10 per class, C is fixed, as in published few-shot probes (Tian et al., ECCV 2020: C = 1 on features of unit
  norm): here C = 10 for features scaled to a mean squared distance of 1 from their mean, which needs no labels;
- beyond, C comes from the path of `logistic.*` by a class-balanced share of the drawn labels, and the fit is repeated
  on all of them (as in `logistic`). An official validation split is not used: its labels would not be few.

Beside it stands the nearest class mean, on centred features of unit norm (Wang et al., arXiv 1911.04623, "CL2N").
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.metrics.bootstrap import draws_interval
from dinoreg.evaluation.options import LogisticOptions
from dinoreg.evaluation.protocols import classification
from dinoreg.evaluation.protocols.measurement import Fold, Measurement, resumable_map
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.feature_matrix import Rows
from dinoreg.evaluation.solvers.logistic_regression import SoftmaxProblem

FIXED_UP_TO = 10  # labels per class, on average; with more, C is chosen
ROUNDING = 1e-10  # squared, between features that are equal but for it
FIXED_C = 10.0  # for features of unit spread; on digits and on planted classes 1 loses points, 100 changes little


@dataclass(frozen=True)
class Setting:
    """A point of the curve: `shots` images of each class, or else a `share` in (0, 1] of each class."""

    shots: int | None = None
    share: float | None = None

    @property
    def title(self) -> str:
        """The setting in words: "5 per class", "10 % of labels"."""
        return f"{self.shots} per class" if self.share is None else f"{100 * self.share:g} % of labels"

    def counts(self, available: np.ndarray) -> np.ndarray:
        """Images drawn of each class (K,) int64, at least one and at most all.

        available  (K,) images of each class
        """
        wanted = np.full_like(available, self.shots) if self.share is None else np.rint(self.share * available)
        return np.minimum(np.maximum(wanted, 1), available).astype(np.int64)


class Spread:
    """Features (n, D) and where they lie: `mean` (D,) float64, and `power`, their mean squared distance from it.

    The power is 0 for features that are equal but for rounding.
    """

    def __init__(self, features: Tensor) -> None:
        """features (n, D), read a few thousand rows at a time."""
        self.features, parts = features, features.split(8192)
        zero = torch.zeros((), dtype=torch.float64)
        self.mean = sum((rows.double().sum(dim=0) for rows in parts), zero) / len(features)
        power = sum(float((rows.double() - self.mean).square().sum()) for rows in parts) / len(features)
        self.power = power if power > ROUNDING * float(self.mean.square().sum()) else 0.0

    def unit(self, features: Tensor) -> Tensor:
        """Features (n, D), centred and of norm 1, float32."""
        return F.normalize(features.double() - self.mean.to(features.device), dim=-1).float()


def evaluate(measured: Measurement) -> list[Row]:
    """A row for each setting: shots from most to least, then shares from most to least; accuracy in [0, 1].

    raises  UserError as `labelled_folds` and `extract_features`; RunError for a feature that is not finite
    """
    options, encoder, context = measured.options, measured.encoder, measured.context
    test, folds = classification.labelled_folds(measured)
    known = [Spread(classification.class_tokens(measured, each.train.source, "train")) for each in folds]
    asked = [classification.class_tokens(measured, each.test.source, "test") for each in folds]
    settings = [Setting(shots=shots) for shots in sorted(options.few_shot.shots, reverse=True)]
    settings += [Setting(share=share) for share in sorted(options.few_shot.shares, reverse=True)]
    draws = []
    for setting in settings:
        # Where all images are taken there is nothing to draw.
        whole = all(setting.counts(_available(each.train)).sum() == len(each.train) for each in folds)
        repeats = range(1 if whole else options.few_shot.repeats)
        draws += [(setting, context.seed + repeat, number) for repeat in repeats for number in range(len(folds))]

    def scored(_place: int, draw: tuple[Setting, int, int]) -> dict[str, Any]:
        setting, seed, number = draw
        started = time.monotonic()
        train = folds[number].train
        given = {"seed": seed, "device": encoder.device, "metric": measured.task.metric}
        found = score(known[number], train, drawn(train, setting, seed), asked[number], options.logistic, **given)
        return {**found, "hours": (time.monotonic() - started) / 3600}

    stamps = [each.train.source.stamp() for each in folds]
    key = (options.few_shot, options.logistic, context.seed, context.image_size, encoder.identity, stamps)
    results = resumable_map(context, "few_shot", key, len(draws), scored, f"draws ({encoder.name})", draws.__getitem__)
    by_setting = {of: [each for each, draw in zip(results, draws) if draw[0] == of] for of in settings}
    doubt = classification.equal_features(folds[0].train.source, known[0].features)
    rows = [_row(measured, setting, test, folds, scored) for setting, scored in by_setting.items()]
    return [replace(row, warnings=doubt) for row in rows]


def _available(train: Labelled) -> np.ndarray:
    """Images of each class (K,)."""
    return np.bincount(train.labels, minlength=train.num_classes)


def drawn(train: Labelled, setting: Setting, seed: int) -> np.ndarray:
    """Ascending indices (m,) of the training images whose labels are used.

    Draws of one seed are nested: the images of one shot are among those of five.
    """
    order = np.random.default_rng([seed, 2718]).permutation(len(train))
    order = order[np.argsort(train.labels[order], kind="stable")]  # by class, at random within a class
    available = _available(train)
    rank = np.arange(len(train)) - np.repeat(np.cumsum(available) - available, available)
    return np.sort(order[rank < np.repeat(setting.counts(available), available)])


def score(
    spread: Spread, train: Labelled, index: np.ndarray, asked: Tensor, options: LogisticOptions, **given: Any
) -> dict[str, Any]:
    """Learn from the images of `index` alone, and classify the test images.

    spread   of the features (N, D) of all training images
    index    (m,) of those whose labels are used
    asked    features (n, D) of the test images
    given    all of seed, device and, by which C is chosen, metric, of `fit_classes`
    returns  {"logistic", "nearest"}: (n,) int64 classes; "C": used, "path": visited, [] where C is fixed
    """
    features = spread.features
    rows = features if len(index) == len(features) else features[torch.from_numpy(index)]
    labels = torch.from_numpy(train.labels[index])
    if len(index) <= FIXED_UP_TO * len(labels.unique()):
        C, path = FIXED_C / spread.power if spread.power else FIXED_C, []
        model = SoftmaxProblem(Rows.of(rows, labels), train.num_classes, device=given["device"]).solve(C)
    else:
        found = classification.fit_classes(rows, train.chosen(index), options, **given)
        C, model, path = found.C.item(), found.model, found.scores
    means = class_means(rows, labels, train.num_classes, spread)
    means[np.setdiff1d(np.arange(train.num_classes), train.answers)] = torch.nan
    return {
        "logistic": model.predict(asked, train.answers),
        "nearest": torch.cat([nearest_mean(spread.unit(rows), means) for rows in asked.split(4096)]),
        "C": C,
        "path": path,
    }


def class_means(features: Tensor, labels: Tensor, num_classes: int, spread: Spread) -> Tensor:
    """The mean of each class's centred unit features, (K, D) float32; NaN for a class without any.

    features  (n, D), labels (n,) int64
    """
    total = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    for rows, classes in zip(features.split(4096), labels.split(4096)):
        total.index_add_(0, classes, spread.unit(rows).double())
    counts = torch.bincount(labels, minlength=num_classes)
    return (total / counts[:, None]).float()


def nearest_mean(x: Tensor, means: Tensor) -> Tensor:
    """The class (n,) int64 whose mean (K, D) is nearest to each row of x (n, D); never one with a mean of NaN."""
    # |x - m|² less |x|², which is the same for every class
    distance = means.square().sum(dim=-1) - 2 * x @ means.mT
    return distance.nan_to_num(nan=torch.inf).argmin(dim=-1)


def _row(
    measured: Measurement, setting: Setting, test: Labelled, folds: list[Fold[Labelled]], scored: list[dict[str, Any]]
) -> Row:
    """The row of a setting; `scored` has every draw in every fold, fold by fold within a draw."""
    metric, context = measured.task.metric, measured.context
    repeats = len(scored) // len(folds)
    logistic, nearest = (np.empty((repeats, len(test)), dtype=np.int64) for _ in range(2))
    for place, each in enumerate(scored):
        rows = folds[place % len(folds)].rows
        logistic[place // len(folds), rows] = each["logistic"].numpy()
        nearest[place // len(folds), rows] = each["nearest"].numpy()
    counts = [setting.counts(_available(each.train)) for each in folds]
    share = f"a class-balanced {measured.options.logistic.validation_share:.0%} of the drawn labels, seed of the draw"
    fixed = f"{FIXED_C:g} / mean squared distance of the training features from their mean"
    chosen = bool(scored[0]["path"])
    means = draws_interval(nearest, test.labels, metric, seed=context.seed, clusters=measured.clusters(test))
    share_right = classification.METRICS[metric]
    right, nearest_right = ([share_right(draw, test.labels) for draw in draws] for draws in (logistic, nearest))
    settled: dict[str, Any] = {"shots": setting.shots, "share": setting.share, "draws": repeats}
    settled["C"] = [each["C"] for each in scored]
    settled |= {"C from": share if chosen else fixed, "image_size": context.image_size}
    details: dict[str, Any] = {"each draw": right, "nearest class mean": float(np.mean(nearest_right))}
    details["nearest class mean, interval"] = [means.low, means.high]
    fields: dict[str, Any] = {"variant": setting.title, "chosen_on": share if chosen else "", "settings": settled}
    fields["seeds"] = tuple(context.seed + repeat for repeat in range(repeats))
    fields["n_train"] = round(np.mean([int(each.sum()) for each in counts]))
    fields["hours"] = sum(each["hours"] for each in scored)
    fields["note"] = _note(setting, _available(folds[0].train), counts[0])
    return classification.accuracy_row(measured, test, logistic, metric, details=details, **fields)


def _note(setting: Setting, available: np.ndarray, counts: np.ndarray) -> str:
    """What became of classes that are too small for the setting."""
    present = available[available > 0]
    if setting.share is None:
        short = present[present < setting.shots]
        what = f"have fewer than {setting.shots} training images (the fewest: {short.min(initial=setting.shots or 0)})"
        note = f"{len(short)} of {len(present)} classes {what}; all of theirs are used"
    else:
        short = present[setting.share * present < 0.5]
        share = f"{counts.sum() / available.sum():.1%} of the labels in all"
        what = f"are too small for {100 * setting.share:g} % and give one image each: {share}"
        note = f"{len(short)} of {len(present)} classes {what}"
    return note if len(short) else ""
