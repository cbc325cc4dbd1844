"""The strength of a logistic regression's penalty, chosen on held-out rows: the path from small C to large.

Each fit starts at the one before. With one class out of several, one C is chosen by accuracy, of images or the mean per
class; with sets of classes each class takes its own, by its average precision (see `protocols/multilabel`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from dinoreg.evaluation.metrics.bootstrap import nanmean, top1
from dinoreg.evaluation.solvers.feature_matrix import Rows
from dinoreg.evaluation.solvers.logistic_regression import LogisticModel, LogisticProblem, SoftmaxProblem

PATH_TOLERANCE, FINAL_TOLERANCE = 1e-6, 1e-7  # of the mean loss, while C is chosen by accuracy and afterwards


@dataclass(frozen=True)
class Visited:
    """One C of a path: scores in [0, 1] and mean losses on the held-out rows, (G,) each, one per group of classes."""

    C: float
    scores: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Path:
    """The best C (G,) of each group of classes, a model, and all visits.

    model  from `walk_path`, each class as it was at its best; from `select_and_fit`, refitted on all rows
    """

    C: np.ndarray
    model: LogisticModel
    visited: tuple[Visited, ...]

    @property
    def scores(self) -> list[list[float]]:
        """[C, mean score of the groups that have one, NaN without any] of every visit."""
        return [[each.C, nanmean(each.scores)] for each in self.visited]


def walk_path(
    problem: LogisticProblem,
    Cs: Iterable[float],
    judge: Callable[[LogisticModel], tuple[np.ndarray, np.ndarray]],
    active: np.ndarray,
    tolerance: float,
) -> Path:
    """Visit the Cs, which ascend, and keep the best for each group: by the score, the lower loss among equals.

    judge      model -> scores (G,) in [0, 1] or NaN, and mean losses (G,), on held-out rows; G is 1, or that of classes
    active     (G,) bool: the groups to choose for
    tolerance  of `LogisticProblem.solve`
    """
    shape, classes = active.shape, torch.from_numpy(active).expand(len(problem.fitted))
    best_score, best_loss, best_c = np.full(shape, -np.inf), np.full(shape, np.inf), np.ones(shape)
    model: LogisticModel | None = None
    best: LogisticModel | None = None
    visited: list[Visited] = []
    for C in Cs:
        model = problem.solve(float(C), model, classes, tolerance)
        scores, losses = judge(model)
        visited.append(Visited(float(C), scores, losses))
        scores = np.nan_to_num(scores, nan=-1.0)  # where there is no score the loss decides
        better = active & ((scores > best_score) | ((scores == best_score) & (losses < best_loss)))
        best_score, best_loss = np.where(better, scores, best_score), np.where(better, losses, best_loss)
        best_c = np.where(better, C, best_c)
        best = model if best is None else best.with_classes_of(model, torch.from_numpy(better).expand(len(classes)))
    assert best is not None
    return Path(best_c, best, tuple(visited))


def select_and_fit(
    features: Tensor,
    labels: ArrayLike | Tensor,
    num_classes: int,
    Cs: Sequence[float],
    *,
    validation: tuple[Tensor, ArrayLike | Tensor] | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
    score: Callable[[ArrayLike, ArrayLike], float] = top1,
    pictures: np.ndarray | None = None,
    **options: Any,
) -> Path:
    """Choose C by its validation score (ties: the lower loss) and refit on every row, those of `validation` included.

    features          (n, D), memory-mapped or not; beyond a gigabyte they are read in chunks, never copied entirely
    labels            (n,) integers in [0, num_classes)
    Cs                inverse regularisations to try, above 0
    validation        features (m, D) and labels (m,); without it a seeded, class-balanced share of the rows is held out
    validation_share  that share, in (0, 1)
    score             (predicted classes, true ones) -> in [0, 1], higher is better
    pictures          (n,) as for `balanced_split`
    options           of LogisticProblem
    raises            ValueError for features that are not finite, and too few rows
    """
    rows = Rows.of(features, torch.as_tensor(labels).long())
    if validation is not None:
        fit, held = rows, Rows.of(validation[0], torch.as_tensor(validation[1]).long())
        rows = fit + held
    else:
        mask = balanced_split(rows.labels, validation_share, seed, pictures)
        if mask.all() or not mask.any():
            raise ValueError(f"{len(rows)} labelled rows are too few to hold out {validation_share:.0%} of them")
        fit, held = (Rows.of(features, rows.labels, each) for each in (~mask, mask))
    problem = SoftmaxProblem(fit, num_classes, **options)

    def judge(model: LogisticModel) -> tuple[np.ndarray, np.ndarray]:
        predicted, total = [], 0.0
        for part, logits in model.chunks(held, problem.data.device):
            truth = held.labels[part].to(logits.device)
            predicted.append(logits.argmax(-1).cpu())
            total += float(F.cross_entropy(logits.double(), truth, reduction="sum"))
        return np.array([score(torch.cat(predicted), held.labels)]), np.array([total / len(held)])

    path = walk_path(problem, sorted(Cs), judge, np.ones(1, dtype=bool), PATH_TOLERANCE)
    final = SoftmaxProblem(rows, num_classes, **options)
    return replace(path, model=final.solve(float(path.C[0]), path.model, tolerance=FINAL_TOLERANCE))


def balanced_split(labels: Tensor, share: float = 0.1, seed: int = 0, pictures: np.ndarray | None = None) -> Tensor:
    """Hold out a share of the rows with every class in proportion: labels (n,) -> held out (n,) bool on the CPU.

    Rows are ordered by class, at random within a class, and taken at equal distances.

    share     in (0, 1)
    pictures  (n,) the same number for rows that stay together, copies of one picture: the share is one of pictures
    """
    if pictures is not None:
        _, first, picture_of = np.unique(pictures, return_index=True, return_inverse=True)
        if 1 < len(first) < len(pictures):
            return balanced_split(labels[torch.from_numpy(first)], share, seed)[torch.from_numpy(picture_of)]
    rng = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    order = np.lexsort((rng.random(len(values)), values))
    count = max(1, round(share * len(values)))
    picked = order[((np.arange(count) + rng.random()) * (len(values) / count)).astype(np.int64)]
    held_out = torch.zeros(len(values), dtype=torch.bool)
    held_out[torch.from_numpy(picked)] = True
    return held_out
