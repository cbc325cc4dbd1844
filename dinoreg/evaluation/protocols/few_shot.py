"""How far a few labels go: logistic regression on the class tokens of 1, 5, 10 images per class and of 1, 10, 100 %.

Each setting is drawn several times, every time as many images of each class (shots) or the same share of each class but
at least one (shares), and scored on the whole test split. Of the training labels only those that are drawn are used:

- up to 10 per class, C is fixed, as in published few-shot probes (Tian et al., ECCV 2020: C = 1 on features of unit
  norm): here C = 10 for features scaled to a mean squared distance of 1 from their mean, which needs no labels;
- beyond, C comes from the path of `logistic.*` by a class-balanced share of the drawn labels, and the fit is repeated
  on all of them (P3). An official validation split is left alone: its labels would not be few.

Beside it stands the nearest class mean, on centred features of unit norm (Wang et al., arXiv 1911.04623, "CL2N").
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import PROTOCOLS, Task
from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, bootstrap_statistic, mean_per_class_accuracy, top1
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.logistic import class_tokens, labelled
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.softmax_regression import fit_logistic, select_and_fit
from dinoreg.runtime.errors import UserError

FIXED_UP_TO = 10  # labels per class, on average; with more, C is chosen
FIXED_C = 10.0  # for features of unit spread; on digits and on planted classes 1 loses points, 100 changes little
METRICS = {"top-1": top1, "mean per class": mean_per_class_accuracy}


@dataclass(frozen=True)
class Setting:
    """A point of the curve: `shots` images of each class, or else a `share` of each class."""

    shots: int | None = None
    share: float | None = None

    @property
    def title(self) -> str:
        return f"{self.shots} per class" if self.share is None else f"{100 * self.share:g} % of labels"

    def counts(self, available: np.ndarray) -> np.ndarray:
        """Images drawn of each class (K,), of those there are (K,): at least one, at most all."""
        wanted = np.full_like(available, self.shots) if self.share is None else np.rint(self.share * available)
        return np.minimum(np.maximum(wanted, 1), available).astype(np.int64)


@dataclass(frozen=True)
class Spread:
    """Where features lie: their mean (D,) float64 and their mean squared distance from it."""

    mean: Tensor
    power: float

    @classmethod
    def of(cls, features: Tensor) -> Spread:
        """features (n, D), read a few thousand rows at a time."""
        mean = sum((rows.double().sum(dim=0) for rows in features.split(8192)), torch.zeros(())) / len(features)
        assert isinstance(mean, Tensor)
        total = sum(float((rows.double() - mean).square().sum()) for rows in features.split(8192))
        return cls(mean, total / len(features))

    def unit(self, features: Tensor) -> Tensor:
        """(n, D) -> centred, of norm 1, float32."""
        return F.normalize(features.double() - self.mean.to(features.device), dim=-1).float()


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """A row for each setting: shots from most to least, then shares from most to least."""
    if task.metric not in METRICS:
        raise UserError(f"metric {task.metric!r}: few-shot has {' and '.join(METRICS)}")
    train, test = labelled(data, "train"), labelled(data, "test")
    train_features, test_features = (
        class_tokens(encoder, split, context, name) for name, split in (("train", train), ("test", test))
    )
    spread = Spread.of(train_features)
    chosen = options.few_shot
    settings = [Setting(shots=shots) for shots in sorted(chosen.shots, reverse=True)]
    settings += [Setting(share=share) for share in sorted(chosen.shares, reverse=True)]
    tag = repr((chosen, options.logistic, context.seed, context.image_size, encoder.identity, train.source.stamp()))
    saved = context.load_state("few_shot")
    done: dict[str, dict[str, Any]] = saved["done"] if saved is not None and saved["tag"] == tag else {}
    last_saved = time.monotonic()
    rows = []
    for setting in settings:
        started = time.monotonic()
        # Where all images are taken there is nothing to draw.
        repeats = 1 if drawn(train, setting, 0).size == len(train) else chosen.repeats
        scored = []
        for repeat in context.progress(range(repeats), repeats, f"{setting.title} ({encoder.name})"):
            name = f"{setting.title}, draw {repeat}"
            if name not in done:
                index = drawn(train, setting, context.seed + repeat)
                done[name] = score(
                    train_features, train, index, test_features, spread, options, context.seed + repeat, encoder.device
                )
            scored.append(done[name])
            if time.monotonic() - last_saved > SAVE_SECONDS:
                context.save_state("few_shot", {"tag": tag, "done": done})
                last_saved = time.monotonic()
        row = _row(setting, scored, train, test, task.metric, options, context)
        variant = ", ".join(filter(None, (setting.title, data.variant)))
        rows.append(Row(**row, variant=variant, hours=(time.monotonic() - started) / 3600))
    return rows


def drawn(train: Labelled, setting: Setting, seed: int) -> np.ndarray:
    """Ascending indices of the images whose labels are used.

    Draws of one seed are nested: the images of one shot are among those of five.
    """
    order = np.random.default_rng([seed, 2718]).permutation(len(train))
    order = order[np.argsort(train.labels[order], kind="stable")]  # by class, at random within a class
    available = np.bincount(train.labels, minlength=train.num_classes)
    rank = np.arange(len(train)) - np.repeat(np.cumsum(available) - available, available)
    return np.sort(order[rank < np.repeat(setting.counts(available), available)])


def score(
    features: Tensor,
    train: Labelled,
    index: np.ndarray,
    test_features: Tensor,
    spread: Spread,
    options: EvalOptions,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Learn from the images of `index` alone: {"logistic", "nearest"}: classes (n,) of the test images; "C", "path"."""
    rows = features if len(index) == len(features) else features[torch.from_numpy(index)]
    labels = torch.from_numpy(train.labels[index])
    if spread.power == 0:
        raise UserError("every training image has the same feature: there is nothing to learn from")
    path: list[list[float]] = []
    if len(index) <= FIXED_UP_TO * len(labels.unique()):
        model = fit_logistic(rows, labels, train.num_classes, FIXED_C / spread.power, device=device)
    else:
        given = options.logistic
        cs = tuple(np.geomspace(given.min_c, given.max_c, given.num_c))
        found = select_and_fit(
            rows,
            labels,
            train.num_classes,
            cs,
            validation_share=given.validation_share,
            seed=seed,
            patience=given.patience,
            device=device,
        )
        model, path = found.model, [[each.C, each.accuracy] for each in found.path]
    means = class_means(rows, labels, train.num_classes, spread)
    return {
        "logistic": model.predict(test_features),
        "nearest": torch.cat([nearest_mean(spread.unit(rows), means) for rows in test_features.split(4096)]),
        "C": float(model.C),
        "path": path,
    }


def class_means(features: Tensor, labels: Tensor, num_classes: int, spread: Spread) -> Tensor:
    """The mean of each class's centred unit features (K, D); NaN for a class without any."""
    total = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    for start in range(0, len(features), 4096):
        part = slice(start, start + 4096)
        total.index_add_(0, labels[part], spread.unit(features[part]).double())
    counts = torch.bincount(labels, minlength=num_classes)
    return (total / counts[:, None]).float()


def nearest_mean(x: Tensor, means: Tensor) -> Tensor:
    """The class (n,) whose mean (K, D) is nearest to each row (n, D)."""
    # |x - m|² less |x|², which is the same for every class
    distance = means.square().sum(dim=-1) - 2 * x @ means.mT
    return distance.nan_to_num(nan=torch.inf).argmin(dim=-1)


def interval(predicted: np.ndarray, labels: np.ndarray, metric: str, samples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over draws, for both sources of chance: which labels, which test images.

    predicted  (R, n) classes of n test images after each of R draws

    Each resample takes n images, and R - 1 draws: with R, their mean would vary by a factor (R - 1) / R too little.
    """
    correct = (predicted == labels).astype(np.float64)  # (R, n)
    if correct.min() == correct.max():  # nothing to resample: the exact bound for the images
        return bootstrap_interval(correct[0])
    repeats, count = correct.shape
    rng = np.random.default_rng(repeats)
    _, classes = np.unique(labels, return_inverse=True)

    def resampled(weights: np.ndarray) -> float:
        picked = np.bincount(rng.integers(0, repeats, size=max(repeats - 1, 1)), minlength=repeats)
        right = weights * (picked @ correct / picked.sum())
        if metric == "top-1":
            return float(right.sum() / count)
        per_class = np.bincount(classes, weights=weights)
        return float((np.bincount(classes, weights=right)[per_class > 0] / per_class[per_class > 0]).mean())

    return bootstrap_statistic(count, resampled, samples=samples)


def _row(
    setting: Setting,
    scored: list[dict[str, Any]],
    train: Labelled,
    test: Labelled,
    metric: str,
    options: EvalOptions,
    context: Context,
) -> dict[str, Any]:
    """The fields of a row, but for its variant and hours."""
    found = {key: np.stack([each[key].numpy() for each in scored]) for key in ("logistic", "nearest")}
    values = {
        key: {name: [function(each, test.labels) for each in predicted] for name, function in METRICS.items()}
        for key, predicted in found.items()
    }
    bounds = {key: interval(predicted, test.labels, metric) for key, predicted in found.items()}
    available = np.bincount(train.labels, minlength=train.num_classes)
    counts = setting.counts(available)
    chose = bool(scored[0]["path"])
    share = f"a class-balanced {options.logistic.validation_share:.0%} of the drawn labels, seed of the draw"
    return {
        "protocol": PROTOCOLS["few_shot"][1],
        "metric": metric,
        "value": float(np.mean(values["logistic"][metric])),
        "low": bounds["logistic"][0],
        "high": bounds["logistic"][1],
        "chosen_on": share if chose else "",
        "seeds": tuple(context.seed + repeat for repeat in range(len(scored))),
        "n_train": int(counts.sum()),
        "n_test": len(test),
        "chance": 1.0 / train.num_classes,
        "settings": {
            "shots": setting.shots,
            "share": setting.share,
            "draws": len(scored),
            "C": [each["C"] for each in scored],
            "C from": share
            if chose
            else f"{FIXED_C:g} / mean squared distance of the training features from their mean",
            "image_size": context.image_size,
        },
        "details": {
            "micro and macro": {name: float(np.mean(each)) for name, each in values["logistic"].items()},
            "each draw": values["logistic"][metric],
            "nearest class mean": float(np.mean(values["nearest"][metric])),
            "nearest class mean, interval": list(bounds["nearest"]),
        },
        "note": _note(setting, available, counts),
    }


def _note(setting: Setting, available: np.ndarray, counts: np.ndarray) -> str:
    present = available > 0
    notes = []
    if setting.shots is not None:
        short = present & (available < setting.shots)
        if short.any():
            notes.append(
                f"{short.sum()} of {present.sum()} classes have fewer than {setting.shots} training images "
                f"(the fewest: {available[short].min()}); all of theirs are used"
            )
    elif setting.share is not None:
        lifted = present & (setting.share * available < 0.5)
        if lifted.any():
            notes.append(
                f"{lifted.sum()} of {present.sum()} classes are too small for {100 * setting.share:g} % and give one "
                f"image each: {counts.sum() / available.sum():.1%} of the labels in all"
            )
    return "; ".join(notes)
