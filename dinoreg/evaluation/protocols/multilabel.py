"""P4, multi-label classification: one binary logistic regression per class on the frozen class token.

SimCLR B.8.1 on VOC07: features of centre crops, C from a path of 45 values chosen on the validation split, refitted on
train and validation, scored on test by 11-point mAP; VISSL's all-points mAP is the second row. As the regressions are
independent, so is the choice: each class takes the C of its own best validation average precision (ties: the lower
loss). Images that show only difficult instances of a class count neither way for it, in fitting and in scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
from dinoreg.evaluation.solvers.feature_matrix import Parts
from dinoreg.evaluation.solvers.sigmoid_regression import BinaryModels, BinaryProblem
from dinoreg.runtime.errors import UserError

MISSING = "the {name} split is missing, or its images do not have a set of classes each"
METRICS = {"11-point mAP": "11", "all-points mAP": "all"}
SCORES_AT_ONCE = 4096  # rows
PATH_TOLERANCE, FINAL_TOLERANCE = 1e-5, 1e-7  # of the loss summed over classes
BOOTSTRAP_WORK = 400_000_000  # image-class pairs ranked again at most, between 100 and 1,000 draws


@dataclass(frozen=True)
class Choice:
    """What the validation images chose: C (K,), the models there, and (C, mean validation AP) along the path.

    decided  (K,) bool: the class could be fitted and judged; the others take the middle C of these
    """

    C: np.ndarray
    models: BinaryModels
    path: list[tuple[float, float]]
    decided: np.ndarray


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """The task's metric, then the other of 11-point and all-points mAP."""
    measured = Measurement(data, task, context, MultiLabelled, MISSING, "multi-label classification", list(METRICS))
    chosen, train, test, val = options.multilabel, *measured.splits()
    splits = {"train": train, "test": test} | ({} if val is None else {"val": val})
    features = {name: class_tokens(encoder, split.source, context, name) for name, split in splits.items()}
    labels = {name: torch.from_numpy(np.ascontiguousarray(split.labels)) for name, split in splits.items()}
    fit, held, everything = _parts(features, labels, chosen.validation_share, context.seed)
    choice = choose(
        fit,
        held,
        np.geomspace(chosen.min_c, chosen.max_c, chosen.num_c),
        patience=chosen.patience,
        points=METRICS[task.metric],
        device=encoder.device,
        context=context,
    )
    problem = BinaryProblem(*everything, device=encoder.device)
    model = problem.solve(torch.from_numpy(choice.C), init=choice.models, tolerance=FINAL_TOLERANCE)
    scores = _scores(model, [(features["test"], None)], encoder.device)
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
            "C": dict(zip(names, choice.C.tolist())),
            "path": choice.path,
            "image_size": context.image_size,
            "choice": "each class by its own validation average precision",
            "converged": model.converged,
        },
        note=_note(problem.fitted.cpu().numpy(), test.labels, names),
    )


def choose(
    fit: tuple[Parts, Tensor],
    held: tuple[Parts, Tensor],
    Cs: np.ndarray,
    *,
    patience: int | None,
    points: str,
    device: torch.device | str,
    context: Context | None = None,
) -> Choice:
    """Walk the path of C upwards, each fit starting at the one before, and keep every class's best on `held`.

    fit, held  features and their labels (n, K)
    patience   a class leaves the path after this many values that better neither its average precision nor its loss

    Raises UserError where no class has both positive and negative images to fit and a held-out image to judge.
    """
    problem = BinaryProblem(*fit, device=device)
    truth = held[1].numpy()
    K = truth.shape[1]
    decided = problem.fitted.cpu().numpy() & (truth >= 0).any(axis=0)
    if not decided.any():
        raise UserError("no class has both images with and images without it in train, and any in validation")
    best_ap, best_loss, lowest = np.full(K, -1.0), np.full(K, np.inf), np.full(K, np.inf)
    best_c, idle = np.full(K, float(Cs[0])), np.zeros(K, dtype=int)
    now, models = np.full(K, np.nan), None
    best: BinaryModels | None = None
    active, path = decided.copy(), []
    values = sorted(float(C) for C in Cs)
    for C in values if context is None else context.progress(values, len(values), "values of C"):
        if not active.any():
            break
        which = torch.from_numpy(np.flatnonzero(active))
        models = problem.solve(torch.full((K,), C), which, models, PATH_TOLERANCE)
        best = models if best is None else best
        scores = _scores(models, held[0], device)
        for k in np.flatnonzero(active):
            counted = truth[:, k] >= 0
            now[k] = average_precision(scores[:, k], truth[:, k] == 1, ~counted, points)
            z, y = torch.from_numpy(scores[counted, k]).double(), torch.from_numpy(truth[counted, k]).double()
            loss = float(F.binary_cross_entropy_with_logits(z, y))
            ap = -1.0 if np.isnan(now[k]) else now[k]  # without positives the loss decides
            better = (ap, -loss) > (best_ap[k], -best_loss[k])
            idle[k] = 0 if better or loss < lowest[k] else idle[k] + 1
            lowest[k] = min(lowest[k], loss)
            if better:
                best_ap[k], best_loss[k], best_c[k] = ap, loss, C
                best.weight[k], best.bias[k] = models.weight[k], models.bias[k]
        path.append((C, float(np.nanmean(now)) if not np.isnan(now).all() else float("nan")))
        if patience is not None:
            active &= idle < patience
    assert best is not None
    best_c[~decided] = np.exp(np.median(np.log(best_c[decided])))
    return Choice(best_c, best, path, decided)


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
            values = [value for value in values if not np.isnan(value)]
            return float(np.mean(values)) if values else float("nan")

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


Side = tuple[Parts, Tensor]


def _parts(features: dict[str, Tensor], labels: dict[str, Tensor], share: float, seed: int) -> tuple[Side, Side, Side]:
    """What C is fitted on, what it is judged on, and what the last fit sees: features and labels."""
    if "val" in features:
        official: list[Side] = [([(features[name], None)], labels[name]) for name in ("train", "val")]
        (x, y), (held_x, held_y) = official
        return official[0], official[1], ([*x, *held_x], torch.cat([y, held_y]))
    count = len(labels["train"])
    if count < 2:
        raise UserError(f"{count} labelled image is too few to hold out some of them")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    cut = min(max(round(share * count), 1), count - 1)
    kept, out = order[cut:].sort().values, order[:cut].sort().values
    sides: list[Side] = [([(features["train"], index)], labels["train"][index]) for index in (kept, out)]
    return sides[0], sides[1], ([(features["train"], None)], labels["train"])


def _scores(models: BinaryModels, parts: Parts, device: torch.device | str) -> np.ndarray:
    """Logits (n, K) float32 of features that may be memory-mapped."""
    found = []
    for features, index in parts:
        count = len(features if index is None else index)
        for start in range(0, count, SCORES_AT_ONCE):
            stop = min(start + SCORES_AT_ONCE, count)
            rows = features[start:stop] if index is None else features[index[start:stop]]
            found.append(models.logits(rows.to(device).float()).cpu().numpy())
    return np.concatenate(found)


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
