"""Multi-label classification: one binary logistic regression per class on the frozen class token.

SimCLR B.8.1 on VOC07: features of centre crops, C from a path of 45 values chosen on the validation split, refitted on
train and validation, scored on test by 11-point mAP; VISSL's all-points mAP is the second row. As the regressions are
independent, so is the choice: each class takes the C of its own best validation average precision (ties: the lower
loss). Images that show only difficult instances of a class count neither way for it, in fitting and in scoring.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dinoreg.evaluation.data import MultiLabelled
from dinoreg.evaluation.metrics.average_precision import Curve, Ranking
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic, nanmean
from dinoreg.evaluation.protocols.classification import class_tokens, draw_predictions, equal_features
from dinoreg.evaluation.protocols.measurement import OFFICIAL, Fold, Measurement, per_fold
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.feature_matrix import Rows
from dinoreg.evaluation.solvers.logistic_regression import LogisticModel, SigmoidProblem
from dinoreg.evaluation.solvers.regularisation_path import Path, walk_path
from dinoreg.runtime.errors import UserError

MISSING = "the {name} split is missing, or its images do not have a set of classes each"
METRICS = {"11-point mAP": "11", "all-points mAP": "all"}
PATH_TOLERANCE, FINAL_TOLERANCE = 1e-5, 1e-7  # of the loss summed over classes
BOOTSTRAP_WORK = 400_000_000  # image-class pairs ranked again at most, between 100 and 1,000 draws


def evaluate(measured: Measurement) -> list[Row]:
    """The task's metric, then the other of 11-point and all-points mAP, in [0, 1].

    raises  UserError for another metric, missing splits, a test split without any class, and where no class can be
            fitted; otherwise as `extract_features`
    """
    measured.check_metric("multi-label classification", METRICS)
    chosen, context = measured.options.multilabel, measured.context
    test, folds = measured.folds(MultiLabelled, MISSING)
    names = measured.data.names(test.num_classes)
    scores, fits = np.empty(test.labels.shape, dtype=np.float32), []
    for fold in folds:
        fits.append(_fitted(measured, fold))
        scores[fold.rows] = _scores(fits[-1][0].model, _rows(measured, fold.test, "test"), measured.encoder.device)
    paths, counts, fitted, doubts = zip(*fits)
    _draw(measured, test, scores, names)
    settings = {
        "C": dict(zip(names, (per_fold(each) for each in zip(*(path.C.tolist() for path in paths))))),
        "path": per_fold([path.scores for path in paths]),
        "image_size": context.image_size,
        "choice": "each class by its own validation average precision",
        "converged": all(path.model.converged for path in paths),
    }
    chosen_on = OFFICIAL if folds[0].val is not None else f"{chosen.validation_share:.0%} of train, seed {context.seed}"
    fields: dict[str, Any] = {"chosen_on": chosen_on, "n_test": len(test), "settings": settings, "warnings": doubts[0]}
    fields["n_train"] = round(np.mean(counts))
    note = _note(np.all(fitted, axis=0), test.labels, names)
    return mean_ap_rows(measured, scores, test, names, note=note, **fields)


def _fitted(measured: Measurement, fold: Fold[MultiLabelled]) -> tuple[Path, int, np.ndarray, tuple[str, ...]]:
    """C chosen for each class on the validation split or on a share of train, with the fit on both; the number of
    images fitted, the classes (K,) bool that could be, and doubts of train."""
    chosen, device, context = measured.options.multilabel, measured.encoder.device, measured.context
    everything = fit = _rows(measured, fold.train, "train")
    doubts = equal_features(fold.train.source, fit.parts[0][0])
    if fold.val is None:
        fit, held = _held_out(fit, chosen.validation_share, context.seed, fold.train.pictures)
    else:
        held = _rows(measured, fold.val, "val")
        everything = fit + held
    Cs = np.geomspace(chosen.min_c, chosen.max_c, chosen.num_c)
    path = choose(fit, held, context.progress(Cs, len(Cs), "values of C"), METRICS[measured.task.metric], device)
    problem = SigmoidProblem(everything, device=device)
    model = problem.solve(torch.from_numpy(path.C), path.model, tolerance=FINAL_TOLERANCE)
    return replace(path, model=model), problem.data.n, problem.fitted.numpy(), doubts


def choose(fit: Rows, held: Rows, Cs: Iterable[float], points: str, device: torch.device | str) -> Path:
    """The path with the C of each class (K,), best by its average precision on `held`.

    fit, held  features and their labels (n, K): 1, 0 or -1 (not counted)
    Cs         ascending, above 0
    points     of the average precision: a value of METRICS

    A class that cannot be fitted or scored takes the median C of the others. UserError where that is every class.
    """
    problem, truth = SigmoidProblem(fit, device=device), held.labels.numpy()
    counted = truth >= 0
    decided = problem.fitted.numpy() & counted.any(axis=0)
    if not decided.any():
        raise UserError("no class has both images with and images without it in train, and any in validation")

    def judge(model: LogisticModel) -> tuple[np.ndarray, np.ndarray]:
        logits = _scores(model, held, device)
        scores, losses = np.full(truth.shape[1], np.nan), np.full(truth.shape[1], np.nan)
        for k in np.flatnonzero(decided):
            y = truth[counted[:, k], k]
            scores[k] = Ranking(logits[:, k], truth[:, k] == 1, ~counted[:, k]).curve().average(points)
            losses[k] = np.logaddexp(0, np.where(y == 1, -1.0, 1.0) * logits[counted[:, k], k]).mean()
        return scores, losses

    path = walk_path(problem, Cs, judge, decided, PATH_TOLERANCE)
    middle = np.exp(np.median(np.log(path.C[decided])))
    return replace(path, C=np.where(decided, path.C, middle))


def mean_ap_rows(
    measured: Measurement, scores: np.ndarray, test: MultiLabelled, names: list[str], **fields: Any
) -> list[Row]:
    """11-point and all-points mAP in [0, 1], with intervals over images, the task's metric first.

    Classes that no image has are left out. Of several folds, all images are ranked together, by their log odds: folds
    have too few images of a class for an average precision each, which depends on their number.

    scores  (n, K), higher where a class is more likely
    test    labels (n, K); UserError where no image has any class
    fields  of Row
    """
    (n, K), labels = test.labels.shape, test.labels
    present = [k for k in range(K) if (labels[:, k] == 1).any()]
    if not present:
        raise UserError("no test image has any of the classes")
    rankings = [Ranking(scores[:, k], labels[:, k] == 1, labels[:, k] < 0) for k in present]
    draws = int(np.clip(BOOTSTRAP_WORK / (n * len(present)), 100, 1000))
    rng = np.random.default_rng(measured.context.seed)
    rows = []
    for metric, points in METRICS.items():

        def mean_ap(weights: np.ndarray, points: str = points) -> float:
            return nanmean([ranking.curve(weights).average(points) for ranking in rankings])

        values = [ranking.curve().average(points) for ranking in rankings]
        interval = bootstrap_statistic(n, mean_ap, draws, measured.context.seed, measured.clusters(test))
        chance = float(np.mean([_random_order(ranking, points, rng) for ranking in rankings]))
        details = {"AP": {names[k]: value for k, value in zip(present, values)}, "bootstrap draws": draws}
        row = measured.row(float(np.mean(values)), interval, metric=metric, chance=chance, details=details, **fields)
        rows.append(row)
    return sorted(rows, key=lambda row: row.metric != measured.task.metric)


def _random_order(ranking: Ranking, points: str, rng: np.random.Generator, draws: int = 10) -> float:
    """The average precision of an order by chance, which 11 points flatter on small sets."""
    found = []
    for _ in range(draws):
        true = np.cumsum(rng.permutation(ranking.present), dtype=np.float64)
        found.append(Curve(true, np.arange(1, len(true) + 1) - true, float(true[-1])).average(points))
    return float(np.mean(found))


def _rows(measured: Measurement, split: MultiLabelled, name: str) -> Rows:
    return Rows.of(class_tokens(measured, split.source, name), torch.from_numpy(split.labels))


def _held_out(train: Rows, share: float, seed: int, pictures: np.ndarray | None = None) -> tuple[Rows, Rows]:
    """The training images without a random share of them, and these; copies of one of the pictures (n,) together."""
    ((features, _),), labels = train.parts, train.labels
    _, picture_of = np.unique(np.arange(len(train)) if pictures is None else pictures, return_inverse=True)
    count = int(picture_of.max()) + 1
    if count < 2:
        raise UserError(f"{count} labelled image is too few to hold out some of them")
    held = np.random.default_rng(seed).permutation(count)[: min(max(round(share * count), 1), count - 1)]
    mask = torch.from_numpy(np.isin(picture_of, held))
    return Rows.of(features, labels, ~mask), Rows.of(features, labels, mask)


def _scores(model: LogisticModel, rows: Rows, device: torch.device | str) -> np.ndarray:
    """Logits (n, K) float32 of features that may be memory-mapped."""
    return torch.cat([logits.cpu() for _, logits in model.chunks(rows, device)]).numpy()


def _note(fitted: np.ndarray, test: np.ndarray, names: list[str]) -> str:
    present = (test == 1).any(axis=0)
    absent = ", ".join(names[k] for k in np.flatnonzero(~present))
    unseen = ", ".join(names[k] for k in np.flatnonzero(~fitted & present))
    notes = (
        absent and f"no test image has {absent}: left out of the mean",
        unseen and f"not learnt for want of examples: {unseen}",
    )
    return "; ".join(filter(None, notes))


def _draw(measured: Measurement, test: MultiLabelled, scores: np.ndarray, names: list[str]) -> None:
    """A few test images, with the classes that are predicted and those that are there; mistakes first."""
    predicted, true = scores > 0, test.labels == 1

    def text(row: np.ndarray) -> str:
        return ", ".join(names[k] for k in np.flatnonzero(row)) or "nothing"

    wrong = ((predicted != true) & (test.labels >= 0)).any(axis=1)

    def lines(index: int) -> list[str]:
        return [f"said {text(predicted[index])}", f"has {text(true[index])}"]

    draw_predictions(test.source, wrong, lines, measured.context, "multilabel")
