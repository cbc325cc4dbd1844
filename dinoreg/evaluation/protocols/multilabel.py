"""P4, multi-label classification: one binary logistic regression per class on the frozen class token.

SimCLR B.8.1 on VOC07: features of centre crops, C from a path of 45 values chosen on the validation split, refitted on
train and validation, scored on test by 11-point mAP; VISSL's all-points mAP is the second row. As the regressions are
independent, so is the choice: each class takes the C of its own best validation average precision (ties: the lower
loss). Images that show only difficult instances of a class count neither way for it, in fitting and in scoring.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, MultiLabelled
from dinoreg.evaluation.metrics.average_precision import Curve, Ranking, average_precision
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.classification import class_tokens, draw_predictions
from dinoreg.evaluation.protocols.measurement import OFFICIAL, Measurement
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.feature_matrix import Parts, Rows
from dinoreg.evaluation.solvers.logistic_regression import LogisticModel, SigmoidProblem
from dinoreg.evaluation.solvers.regularisation_path import Examples, Path, walk_path
from dinoreg.runtime.errors import UserError

MISSING = "the {name} split is missing, or its images do not have a set of classes each"
METRICS = {"11-point mAP": "11", "all-points mAP": "all"}
PATH_TOLERANCE, FINAL_TOLERANCE = 1e-5, 1e-7  # of the loss summed over classes
BOOTSTRAP_WORK = 400_000_000  # image-class pairs ranked again at most, between 100 and 1,000 draws


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """The task's metric, then the other of 11-point and all-points mAP."""
    measured = Measurement(data, task, context, MultiLabelled, MISSING, "multi-label classification", list(METRICS))
    chosen, train, test, val = options.multilabel, *measured.splits()
    splits = {"train": train, "test": test} | ({} if val is None else {"val": val})
    examples = {
        name: Examples.of(class_tokens(encoder, split.source, context, name), torch.from_numpy(split.labels))
        for name, split in splits.items()
    }
    fit, held = examples["train"], examples.get("val")
    everything = fit if held is None else fit.joined(held)
    if held is None:
        fit, held = _held_out(fit, chosen.validation_share, context.seed)
    values = np.geomspace(chosen.min_c, chosen.max_c, chosen.num_c)
    Cs, path = choose(
        fit,
        held,
        context.progress(values, len(values), "values of C"),
        patience=chosen.patience,
        points=METRICS[task.metric],
        device=encoder.device,
    )
    problem = SigmoidProblem(*everything, device=encoder.device)
    model = problem.solve(torch.from_numpy(Cs), path.model, tolerance=FINAL_TOLERANCE)
    scores = _scores(model, examples["test"].parts, encoder.device)
    _draw(test, scores, data.class_names, context)
    names = [str(name) for name in data.class_names] or [str(number) for number in range(test.num_classes)]
    return mean_ap_rows(
        measured,
        scores,
        test.labels,
        names,
        chosen_on=f"{chosen.validation_share:.0%} of train, seed {context.seed}" if val is None else OFFICIAL,
        n_train=problem.data.n,
        n_test=len(test),
        settings={
            "C": dict(zip(names, Cs.tolist())),
            "path": [[each.C, _mean(each.scores)] for each in path.visited],
            "image_size": context.image_size,
            "choice": "each class by its own validation average precision",
            "converged": model.converged,
        },
        note=_note(problem.fitted.numpy(), test.labels, names),
    )


def choose(
    fit: Examples, held: Examples, Cs: Iterable[float], *, patience: int | None, points: str, device: torch.device | str
) -> tuple[np.ndarray, Path]:
    """The C of each class (K,), best by its average precision on `held`, and the path on which they were found.

    fit, held  features and their labels (n, K)
    points     of the average precision: a value of METRICS
    patience   a class leaves the path after this many values that better neither its average precision nor its loss

    A class that cannot be fitted or judged takes the middle C of the others. UserError where that is every class.
    """
    problem, truth = SigmoidProblem(*fit, device=device), held.labels.numpy()
    counted = truth >= 0
    decided = problem.fitted.numpy() & counted.any(axis=0)
    if not decided.any():
        raise UserError("no class has both images with and images without it in train, and any in validation")

    def judge(model: LogisticModel) -> tuple[np.ndarray, np.ndarray]:
        logits = _scores(model, held.parts, device)
        scores, losses = np.full(truth.shape[1], np.nan), np.full(truth.shape[1], np.nan)
        for k in np.flatnonzero(decided):
            y = truth[counted[:, k], k]
            scores[k] = average_precision(logits[:, k], truth[:, k] == 1, ~counted[:, k], points)
            losses[k] = np.logaddexp(0, np.where(y == 1, -1.0, 1.0) * logits[counted[:, k], k]).mean()
        return scores, losses

    path = walk_path(problem, Cs, judge, decided, patience, PATH_TOLERANCE)
    middle = np.exp(np.median(np.log(path.C[decided])))
    return np.where(decided, path.C, middle), path


def mean_ap_rows(
    measured: Measurement[MultiLabelled], scores: np.ndarray, labels: np.ndarray, names: Sequence[str], **fields: Any
) -> list[Row]:
    """11-point and all-points mAP of scores (n, K), with intervals over images; classes that no image has are left out.

    labels  (n, K) 1, 0 or -1 (not counted)
    fields  of Row

    The task's metric comes first.
    """
    n, K = labels.shape
    present = [k for k in range(K) if (labels[:, k] == 1).any()]
    if not present:
        raise UserError("no test image has any of the classes")
    rankings = [Ranking(scores[:, k], labels[:, k] == 1, labels[:, k] < 0) for k in present]
    draws = int(np.clip(BOOTSTRAP_WORK / (n * len(present)), 100, 1000))
    rng = np.random.default_rng(measured.context.seed)
    rows = []
    for metric, points in METRICS.items():

        def mean_ap(weights: np.ndarray, points: str = points) -> float:
            counts = weights.astype(np.float64)
            values = [ranking.curve(counts).average(points) for ranking in rankings]
            return _mean(np.array(values))

        values = [ranking.curve().average(points) for ranking in rankings]
        interval = bootstrap_statistic(n, mean_ap, samples=draws)
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


def _held_out(train: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """The training images without a random share of them, and these."""
    ((features, _),), labels = train
    count = len(labels)
    if count < 2:
        raise UserError(f"{count} labelled image is too few to hold out some of them")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[np.random.default_rng(seed).permutation(count)[: min(max(round(share * count), 1), count - 1)]] = True
    return Examples.of(features, labels, ~mask), Examples.of(features, labels, mask)


def _scores(model: LogisticModel, parts: Parts, device: torch.device | str) -> np.ndarray:
    """Logits (n, K) float32 of features that may be memory-mapped."""
    return torch.cat([logits.cpu() for _, logits in model.chunks(Rows(parts), device)]).numpy()


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _note(fitted: np.ndarray, test: np.ndarray, names: Sequence[str]) -> str:
    unseen = [names[k] for k in np.flatnonzero(~fitted).tolist()]
    absent = [names[k] for k in np.flatnonzero(~(test == 1).any(axis=0)).tolist()]
    told = []
    if absent:
        told.append(f"no test image has {', '.join(absent)}: left out of the mean")
    if set(unseen) - set(absent):
        told.append(f"not learnt for want of examples: {', '.join(each for each in unseen if each not in absent)}")
    return "; ".join(told)


def _draw(test: MultiLabelled, scores: np.ndarray, names: Sequence[str], context: Context) -> None:
    """A few test images, with the classes that are predicted and those that are there; mistakes first."""
    predicted, true = scores > 0, test.labels == 1

    def text(row: np.ndarray) -> str:
        return ", ".join(str(names[k]) if len(names) else str(k) for k in np.flatnonzero(row).tolist()) or "nothing"

    wrong = ((predicted != true) & (test.labels >= 0)).any(axis=1)

    def lines(index: int) -> list[str]:
        return [f"said {text(predicted[index])}", f"has {text(true[index])}"]

    draw_predictions(test.source, wrong, lines, context, "multilabel")
