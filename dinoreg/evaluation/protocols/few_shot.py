"""How far a few labels go: logistic regression on the class tokens of 1, 5, 10 images per class and of 1, 10, 100 %.

Each setting is drawn several times, every time as many images of each class (shots) or the same share of each class but
at least one (shares), and scored on the whole test split. Of the training labels only those that are drawn are used:

- up to 10 per class, C is fixed, as in published few-shot probes (Tian et al., ECCV 2020: C = 1 on features of unit
  norm): here C = 10 for features scaled to a mean squared distance of 1 from their mean, which needs no labels;
- beyond, C comes from the path of `logistic.*` by a class-balanced share of the drawn labels, and the fit is repeated
  on all of them (as in `logistic`). An official validation split is not used: its labels would not be few.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.options import LogisticOptions
from dinoreg.evaluation.protocols import classification
from dinoreg.evaluation.protocols.measurement import Fold, Measurement, resumable_map
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.feature_matrix import Rows
from dinoreg.evaluation.solvers.logistic_regression import LogisticModel, SoftmaxProblem

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


def spread(features: Tensor) -> float:
    """The mean squared distance of features (n, D) from their mean; 0 where they are equal but for rounding."""
    parts, zero = features.split(8192), torch.zeros((), dtype=torch.float64)
    mean = sum((rows.double().sum(dim=0) for rows in parts), zero) / len(features)
    power = sum(float((rows.double() - mean).square().sum()) for rows in parts) / len(features)
    return power if power > ROUNDING * float(mean.square().sum()) else 0.0


def evaluate(measured: Measurement) -> list[Row]:
    """A row for each setting: shots from most to least, then shares from most to least; accuracy in [0, 1].

    raises  UserError as `labelled_folds` and `extract_features`; RunError for a feature that is not finite
    """
    options, encoder, context = measured.options, measured.encoder, measured.context
    test, folds = classification.labelled_folds(measured)
    known = [classification.class_tokens(measured, each.train.source, "train") for each in folds]
    spreads = [spread(features) for features in known]
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
        train, features = folds[number].train, known[number]
        index = drawn(train, setting, seed)
        rows = features if len(index) == len(features) else features[torch.from_numpy(index)]
        given = {"seed": seed, "device": encoder.device, "metric": measured.task.metric}
        C, path, model = fitted(rows, train.chosen(index), spreads[number], options.logistic, **given)
        return {"said": model.predict(asked[number], train.answers), "C": C, "path": path}

    stamps = [each.train.source.stamp() for each in folds]
    key = (options.few_shot, options.logistic, context.seed, context.image_size, encoder.identity, stamps)
    results = resumable_map(context, "few_shot", key, len(draws), scored, f"draws ({encoder.name})", draws.__getitem__)
    by_setting = {of: [each for each, draw in zip(results, draws) if draw[0] == of] for of in settings}
    doubt = classification.equal_features(folds[0].train.source, known[0])
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


def fitted(
    features: Tensor, train: Labelled, spread: float, options: LogisticOptions, **given: Any
) -> tuple[float, list[list[float]], LogisticModel]:
    """C, the path that it was chosen on ([] where it is fixed), and the fit on the images whose labels are used.

    features  (n, D) of these images, `train`
    spread    of all training features
    given     all of seed, device and, by which C is chosen, metric, of `fit_classes`
    """
    labels = torch.from_numpy(train.labels)
    if len(labels) > FIXED_UP_TO * len(labels.unique()):
        found = classification.fit_classes(features, train, options, **given)
        return found.C.item(), found.scores, found.model
    C = FIXED_C / spread if spread else FIXED_C
    return C, [], SoftmaxProblem(Rows.of(features, labels), train.num_classes, device=given["device"]).solve(C)


def _row(
    measured: Measurement, setting: Setting, test: Labelled, folds: list[Fold[Labelled]], scored: list[dict[str, Any]]
) -> Row:
    """The row of a setting; `scored` has every draw in every fold, fold by fold within a draw."""
    metric, context = measured.task.metric, measured.context
    repeats = len(scored) // len(folds)
    predicted = np.empty((repeats, len(test)), dtype=np.int64)
    for place, each in enumerate(scored):
        predicted[place // len(folds), folds[place % len(folds)].rows] = each["said"].numpy()
    counts = [setting.counts(_available(each.train)) for each in folds]
    share = f"a class-balanced {measured.options.logistic.validation_share:.0%} of the drawn labels, seed of the draw"
    fixed = f"{FIXED_C:g} / mean squared distance of the training features from their mean"
    chosen = bool(scored[0]["path"])
    settled: dict[str, Any] = {"shots": setting.shots, "share": setting.share, "draws": repeats}
    settled["C"] = [each["C"] for each in scored]
    settled |= {"C from": share if chosen else fixed, "image_size": context.image_size}
    fields: dict[str, Any] = {"variant": setting.title, "chosen_on": share if chosen else "", "settings": settled}
    fields["details"] = {"each draw": [classification.METRICS[metric](draw, test.labels) for draw in predicted]}
    fields["seeds"] = tuple(context.seed + repeat for repeat in range(repeats))
    fields["n_train"] = round(np.mean([int(each.sum()) for each in counts]))
    fields["note"] = _note(setting, _available(folds[0].train), counts[0])
    return classification.accuracy_row(measured, test, predicted, metric, **fields)


def _note(setting: Setting, available: np.ndarray, counts: np.ndarray) -> str:
    """What became of classes that are too small for the setting."""
    present = available[available > 0]
    short = present < setting.shots if setting.share is None else setting.share * present < 0.5
    kept = "all of their images are used" if setting.share is None else "one image of each is used"
    note = f"{short.sum()} of {len(present)} classes are too small for {setting.title}: {kept}, {counts.sum():,} in all"
    return note if short.any() else ""
