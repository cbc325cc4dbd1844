"""Multinomial logistic regression on frozen features, its L2 strength chosen on held-out rows.

Reference §7.3. The objective is scikit-learn's: C * sum of losses + ||W||² / 2 with a free intercept, which
takes up any shift of the features. The solver is L-BFGS in coordinates where the Hessian is nearly the
identity (principal axes of the features, each divided by its curvature): tens of steps reach the minimum
where plain coordinates take hundreds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from dinoreg.evaluation.solvers.feature_matrix import CentredRows, Parts, Rows
from dinoreg.evaluation.solvers.lbfgs import flat, minimize

REFERENCE_CS: tuple[float, ...] = tuple(10.0 ** np.linspace(-6, 5, 45))  # DINOv2's grid
LOGITS = 1 << 21  # logits in flight: 8 MB
UNSEEN = -50.0  # added to the lowest intercept for a class that training rows never show


@dataclass(frozen=True)
class LogisticModel:
    """A fitted classifier: weight (K, D) and bias (K,) float32 on the CPU, and how the fit ended."""

    weight: Tensor
    bias: Tensor
    C: float
    objective: float  # C * sum of losses + ||W||² / 2 at the end
    steps: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """features (n, D) -> logits (n, K) on the features' device."""
        return F.linear(features.float(), self.weight.to(features.device), self.bias.to(features.device))

    def predict(self, features: Tensor) -> Tensor:
        """features (n, D) -> class (n,) int64."""
        return torch.cat([self.logits(rows).argmax(-1) for rows in features.split(4096)])


@dataclass(frozen=True)
class Candidate:
    """One C of the path: its accuracy and mean loss on the validation rows, and the solver's steps."""

    C: float
    accuracy: float
    loss: float
    steps: int


@dataclass(frozen=True)
class Selection:
    """The model refitted on all training rows, the C it uses, and what each C scored on validation."""

    model: LogisticModel
    C: float
    path: tuple[Candidate, ...]
    seconds: float


def fit_logistic(
    features: Tensor,
    labels: ArrayLike | Tensor,
    num_classes: int,
    C: float = 1.0,
    *,
    standardize: bool = False,
    init: LogisticModel | None = None,
    tolerance: float = 1e-8,
    max_steps: int = 1000,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> LogisticModel:
    """Minimise C * sum of cross-entropies + ||W||² / 2, the objective of scikit-learn's LogisticRegression.

    features     (n, D)   finite; labels (n,) integers in [0, num_classes)
    standardize  divide each feature by its standard deviation first, which changes what the penalty means
    init         start from this model (a neighbour on the regularisation path)
    tolerance    distance to the minimum at which to stop, as a mean loss per row
    dtype        of the large products; sums and parameters are float64 either way
    """
    problem = _Problem([(features, None)], labels, num_classes, standardize=standardize, dtype=dtype, device=device)
    return problem.solve(C, init, tolerance, max_steps)


def select_and_fit(
    features: Tensor,
    labels: ArrayLike | Tensor,
    num_classes: int,
    Cs: Sequence[float] = REFERENCE_CS,
    *,
    validation: tuple[Tensor, ArrayLike | Tensor] | None = None,
    join_validation: bool = False,
    validation_share: float = 0.1,
    seed: int = 0,
    patience: int | None = 6,
    standardize: bool = False,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Selection:
    """Choose C by validation accuracy (ties: the lower loss) and refit on every training row.

    Without `validation` a seeded, class-balanced share of the training rows is held out for the choice; with
    `join_validation` the given validation rows take part in the last fit. The Cs are visited from small to large,
    each starting at the one before; with `patience` the path ends once that many Cs in a row improved neither
    validation accuracy nor validation loss (None: visit all). Features may be memory-mapped and of any size: beyond
    a gigabyte they are read in chunks, never copied whole.
    """
    started = time.perf_counter()
    labels = _labels(labels, len(features), num_classes)
    if not Cs or min(Cs) <= 0:
        raise ValueError(f"every C must be above 0, got {tuple(Cs)}")
    if validation is None:
        held_out = balanced_split(labels, validation_share, seed)
        if held_out.all() or not held_out.any():
            raise ValueError(f"{len(labels)} labelled rows are too few to hold out {validation_share:.0%} of them")
        parts: Parts = [(features, (~held_out).nonzero()[:, 0])]
        fit_labels = labels[~held_out]
        held_rows, held_labels = Rows([(features, held_out.nonzero()[:, 0])]), labels[held_out]
    else:
        parts, fit_labels = [(features, None)], labels
        held_rows = Rows([(validation[0], None)])
        held_labels = _labels(validation[1], len(validation[0]), num_classes)

    options: dict[str, Any] = {"standardize": standardize, "dtype": dtype, "device": device}
    problem = _Problem(parts, fit_labels, num_classes, **options)
    path: list[Candidate] = []
    best: tuple[Candidate, LogisticModel] | None = None
    lowest_loss, idle = math.inf, 0
    model: LogisticModel | None = None
    for C in sorted(Cs):
        model = problem.solve(C, model, tolerance, max_steps)
        accuracy, loss = _validate(model, held_rows, held_labels, problem.data.device)
        candidate = Candidate(C=float(C), accuracy=accuracy, loss=loss, steps=model.steps)
        path.append(candidate)
        better = best is None or (candidate.accuracy, -candidate.loss) > (best[0].accuracy, -best[0].loss)
        idle = 0 if better or candidate.loss < lowest_loss else idle + 1
        lowest_loss = min(lowest_loss, candidate.loss)
        if better:
            best = (candidate, model)
        if patience is not None and idle >= patience:
            break
    assert best is not None
    chosen, start = best
    if validation is None:
        problem = _Problem([(features, None)], labels, num_classes, **options)
    elif join_validation:
        joined = torch.cat([labels, held_labels])
        problem = _Problem([(features, None), (validation[0], None)], joined, num_classes, **options)
    final = problem.solve(chosen.C, start, min(tolerance, 1e-7), max_steps)
    return Selection(final, chosen.C, tuple(path), time.perf_counter() - started)


def _validate(model: LogisticModel, rows: Rows, labels: Tensor, device: torch.device) -> tuple[float, float]:
    """(accuracy, mean loss) on held-out rows."""
    correct, total = 0, 0.0
    for start, x in rows.chunks(4096):
        logits = model.logits(x.to(device))
        truth = labels[start : start + len(x)].to(device)
        correct += int((logits.argmax(-1) == truth).sum())
        total += float(F.cross_entropy(logits.double(), truth, reduction="sum"))
    return correct / len(rows), total / len(rows)


def balanced_split(labels: Tensor, share: float = 0.1, seed: int = 0) -> Tensor:
    """Hold out a share of the rows with every class in proportion: labels (n,) -> held out (n,) bool.

    Rows are ordered by class, at random within a class, and taken at equal distances.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"the held-out share must lie between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    order = np.lexsort((rng.random(len(values)), values))
    count = max(1, round(share * len(values)))
    picked = order[((np.arange(count) + rng.random()) * (len(values) / count)).astype(np.int64)]
    held_out = torch.zeros(len(values), dtype=torch.bool)
    held_out[torch.from_numpy(picked)] = True
    return held_out


def _labels(labels: ArrayLike | Tensor, rows: int, num_classes: int) -> Tensor:
    values = torch.as_tensor(labels).detach().cpu()
    if values.shape != (rows,) or rows == 0:
        raise ValueError(f"expected one label for each of {rows} rows, got shape {tuple(values.shape)}")
    if values.is_floating_point() or int(values.min()) < 0 or int(values.max()) >= num_classes:
        raise ValueError(f"labels must be integers in 0..{num_classes - 1}")
    return values.long()


class _Problem:
    """Centred features on the device with their principal directions, shared by every C of a path.

    With x = (feature - mean) / scale the model is logits = x A + b, A (D, K): the scaled W, transposed.
    """

    def __init__(
        self,
        parts: Parts,
        labels: ArrayLike | Tensor,
        num_classes: int,
        *,
        standardize: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.data = CentredRows(parts, dtype, device, standardize)
        all_labels = _labels(labels, self.data.n, num_classes)
        # A class without rows would send its free intercept to minus infinity; it is put back in `_model`.
        self.classes, compact = all_labels.unique(return_inverse=True)
        self.num_classes = num_classes
        self.penalty = 2.0 if num_classes == 2 else 1.0  # scikit-learn penalises one vector for two classes
        self.labels = compact.to(self.data.device)
        self.rows = max(256, LOGITS // max(len(self.classes), 1))  # rows in flight

    def solve(self, C: float, init: LogisticModel | None, tolerance: float, max_steps: int) -> LogisticModel:
        if C <= 0:
            raise ValueError(f"C must be above 0, got {C}")
        n, dim = self.data.n, self.data.dim
        width = len(self.classes)
        weight, bias = self._start(init)
        ridge = self.penalty / (C * n)  # the objective over C n: mean loss + ||A||² ridge / 2
        spread = self._spread(weight, bias)  # (K,) mean p(1-p)
        along, across = self.data.curvature(spread, ridge)
        level = spread.clamp(min=1e-12).sqrt()  # (K,) for the intercept

        apply = self.data.stretch

        def unpack(v: Tensor) -> tuple[Tensor, Tensor]:
            return apply(v[: dim * width].view(dim, width), 1 / along, 1 / across), v[dim * width :] / level

        def objective(v: Tensor) -> tuple[float, Tensor]:
            a, b = unpack(v)
            value, grad_a, grad_b = self._mean_loss(a, b)
            value += 0.5 * ridge * float(a.square().sum())
            return value, flat(apply(grad_a + ridge * a, 1 / along, 1 / across), grad_b / level)

        end = minimize(objective, flat(apply(weight, along, across), bias * level), tolerance, max_steps)
        a, b = unpack(end.x)
        return self._model(a, b, C, end.value * C * n, end.steps, end.converged)

    def _mean_loss(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """The mean cross-entropy and its gradients (D, K) and (K,)."""
        total = weight.new_zeros(())
        grad_w, grad_b = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, labels, logits in self._logits(weight, bias):
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, labels)).sum(dtype=torch.float64)
            error = logits.sub_(log_sum).exp_()
            error.scatter_add_(1, labels, error.new_full((1, 1), -1.0).expand_as(labels))
            grad_w += (x.mT @ error).double()
            grad_b += error.sum(dim=0, dtype=torch.float64)
        n = self.data.n
        return float(total) / n, grad_w / n, grad_b / n

    def _spread(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The mean of p (1 - p) for each class (K,)."""
        total = torch.zeros_like(bias)
        for _, _, logits in self._logits(weight, bias):
            p = logits.softmax(dim=1)
            total += (p * (1 - p)).sum(dim=0, dtype=torch.float64)
        return total / self.data.n

    def _logits(self, weight: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of rows (m, D), their labels (m, 1) and logits (m, K)."""
        w, b = weight.to(self.data.dtype), bias.to(self.data.dtype)
        for start, x in self.data.chunks(self.rows):
            yield x, self.labels[start : start + len(x), None], torch.addmm(b, x, w)

    def _start(self, init: LogisticModel | None) -> tuple[Tensor, Tensor]:
        """A (D, K) and b (K,) float64 of a given model here, or zeros and the class frequencies."""
        if init is None:
            counts = torch.bincount(self.labels, minlength=len(self.classes)).double()
            return self.data.mean.new_zeros(len(self.data.mean), len(self.classes)), (counts / counts.sum()).log()
        weight = init.weight[self.classes].to(self.data.mean)  # (K, D) over raw features
        bias = init.bias[self.classes].to(self.data.mean) + weight @ self.data.mean
        return (weight * self.data.scale).mT.contiguous(), bias - bias.mean()

    def _model(self, a: Tensor, b: Tensor, C: float, objective: float, steps: int, converged: bool) -> LogisticModel:
        rows = a.mT / self.data.scale  # (K seen, D)
        bias = b - rows @ self.data.mean
        weight = torch.zeros(self.num_classes, len(self.data.mean), dtype=torch.float64)
        intercept = torch.full((self.num_classes,), float(bias.min()) + UNSEEN, dtype=torch.float64)
        weight[self.classes], intercept[self.classes] = rows.cpu(), bias.cpu()
        return LogisticModel(weight.float(), intercept.float(), float(C), objective, steps, converged)
