"""Logistic regression on frozen features: of one class out of several (softmax), or of any set of classes (sigmoid).

The objective is scikit-learn's: C * sum of losses + ||W||² / 2 with free intercepts, which take up any shift of the
features. The solver is L-BFGS in coordinates where the Hessian is nearly the identity (principal axes of the features,
each divided by its curvature): tens of steps reach the minimum where plain coordinates take hundreds.

L-BFGS is Nocedal and Wright's, Numerical Optimization, algorithm 7.4 (two-loop recursion), with the line search of
Lewis and Overton, Nonsmooth optimization via quasi-Newton methods, algorithm 2.6. `torch.optim.LBFGS` and SciPy's
L-BFGS-B need as many evaluations to the same value, but their stopping rules, on the gradient and on the last decrease,
do not say how far the minimum still is. The rule here is the predicted decrease of the next step, in units of the
objective.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.evaluation.solvers.feature_matrix import CentredRows, Rows

DECREASE, CURVATURE = 1e-4, 0.9  # of the weak Wolfe conditions
MAX_STEPS, HISTORY = 1000, 10  # pairs of step and change of gradient that are remembered
MAX_TRIALS = 25  # step lengths of one line search
Objective = Callable[[Tensor], tuple[float, Tensor]]


class Minimum(NamedTuple):
    """The end of a search: x (p,), its value, the steps taken, and whether the tolerance was met."""

    x: Tensor
    value: float
    steps: int
    converged: bool


def minimize(objective: Objective, x: Tensor, tolerance: float = 1e-8) -> Minimum:
    """Minimise a smooth convex function by L-BFGS, in at most MAX_STEPS steps.

    objective  x (p,) float64 -> (value, gradient (p,)); scale x so that the Hessian is near the identity
    x          (p,) float64 to start from
    tolerance  stop when half the directional slope, the decrease a quadratic model promises, is below this
    """
    value, gradient = objective(x)
    pairs: list[tuple[Tensor, Tensor, float]] = []  # (step, change of gradient, 1 / their product)
    for step in range(MAX_STEPS):
        direction = _two_loop(gradient, pairs)
        slope = float(gradient @ direction)
        if -0.5 * slope <= tolerance:
            return Minimum(x, value, step, True)
        found = _line_search(objective, x, direction, value, slope)
        if found is None:
            if not pairs:
                return Minimum(x, value, step, False)
            pairs.clear()  # stale curvature: try once more along the gradient
            continue
        length, value, after = found
        moved, change = length * direction, after - gradient
        curvature = float(moved @ change)
        if curvature > 1e-10 * float(change @ change):
            pairs.append((moved, change, 1.0 / curvature))
            del pairs[:-HISTORY]
        x, gradient = x + moved, after
    return Minimum(x, value, MAX_STEPS, False)


def _two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the inverse Hessian estimate times the gradient, (p,)."""
    q, weights = -gradient, []
    for moved, change, rho in reversed(pairs):
        weights.append(rho * (moved @ q))
        q = q - weights[-1] * change
    if pairs:
        _, change, rho = pairs[-1]
        q = q / (rho * (change @ change))
    for (moved, change, rho), alpha in zip(pairs, reversed(weights)):
        q = q + (alpha - rho * (change @ q)) * moved
    return q


def _line_search(
    objective: Objective, x: Tensor, direction: Tensor, start: float, slope: float
) -> tuple[float, float, Tensor] | None:
    """A step length under the weak Wolfe conditions, by doubling and bisection from 1, which nearly always does.

    start, slope  the value at x and its slope along the direction
    returns       the length, with the value and gradient there; None when rounding hides any decrease
    """
    length, low, high = 1.0, 0.0, math.inf
    for _ in range(MAX_TRIALS):
        value, gradient = objective(x + length * direction)
        if not value <= start + DECREASE * length * slope:
            high = length
        elif float(gradient @ direction) < CURVATURE * slope:
            low = length
        else:
            return length, value, gradient
        length = 2.0 * length if high == math.inf else (low + high) / 2
    return None


def flat(*parts: Tensor) -> Tensor:
    """The parts as one float64 vector (p,)."""
    return torch.cat([part.reshape(-1).double() for part in parts])


LOGITS = 1 << 21  # logits in flight while fitting: 8 MB
ROWS = 4096  # in flight while predicting
UNSEEN = 50.0  # logits by which a class without rows lies below the others, and one that every row has above


@dataclass(frozen=True)
class LogisticModel:
    """A fitted classifier: weight (K, D) and bias (K,) float64 on the CPU, and how the fit ended.

    losses     (K,) mean loss over the rows that count + ||w||² / (2 C n) of each class, 0 where there was nothing to
               fit; the loss of a softmax, which belongs to no single class, is shared equally. Their sum, times C n, is
               scikit-learn's objective
    fitted     (K,) bool: whether there was anything to fit
    steps      of the solver
    converged  whether it met its tolerance
    """

    weight: Tensor
    bias: Tensor
    losses: Tensor
    fitted: Tensor
    steps: int = 0
    converged: bool = True

    def logits(self, features: Tensor) -> Tensor:
        """Logits (n, K) float32 on the features' device, of features (n, D)."""
        weight, bias = (each.to(features.device, torch.float32) for each in (self.weight, self.bias))
        return F.linear(features.float(), weight, bias)

    def predict(self, features: Tensor, answers: np.ndarray | slice = slice(None)) -> Tensor:
        """Classes (n,) int64 on the features' device, of features (n, D); `answers` (m,) are those to choose from."""
        classes = torch.arange(len(self.bias), device=features.device)[answers]
        return torch.cat([classes[self.logits(rows)[:, answers].argmax(-1)] for rows in features.split(ROWS)])

    def chunks(self, rows: Rows, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
        """The rows (memory-mapped or not) in chunks: which they are, and their logits (m, K) float32 on the device."""
        for part, x in rows.chunks(ROWS):
            yield part, self.logits(x.to(device))

    def with_classes_of(self, other: LogisticModel, classes: Tensor) -> LogisticModel:
        """This model with the classes where `classes` (K,) bool is true taken from another."""
        return LogisticModel(
            torch.where(classes[:, None], other.weight, self.weight),
            torch.where(classes, other.bias, self.bias),
            torch.where(classes, other.losses, self.losses),
            self.fitted,
        )


class LogisticProblem(ABC):
    """Centred features with their principal axes, shared by every C; subclasses add labels and loss.

    fitted    (K,) bool: the classes that the rows say something about
    counts    (K,) rows that count for each class
    log_odds  (K,) float64 intercepts to start from, with weights of 0: how often each class occurs
    penalty   factor of ||W||² / 2

    With x = (feature - mean) / scale, logits are x A + b; A (D, k) holds the scaled weights of the classes in question.
    """

    exclusive: bool  # whether a row has one class only

    fitted: Tensor
    counts: Tensor
    log_odds: Tensor
    penalty = 1.0

    def __init__(self, rows: Rows, **options: Any) -> None:
        """Read the features; ValueError where one is not finite. `options` are those of CentredRows."""
        self.data = CentredRows(rows, **options)

    def solve(
        self,
        C: float | Tensor,
        init: LogisticModel | None = None,
        classes: Tensor | None = None,
        tolerance: float = 1e-8,
    ) -> LogisticModel:
        """Minimise the mean losses plus penalties, summed over classes.

        C          inverse regularisation, above 0: one for all classes, or one for each (K,)
        init       start from this model (a neighbour on the regularisation path)
        classes    (K,) bool, which to fit; the others stay as in `init`
        tolerance  distance to the minimum at which to stop, as a mean loss
        """
        Cs = torch.as_tensor(C, dtype=torch.float64).expand(len(self.fitted))
        weight = torch.zeros(len(self.fitted), self.data.dim, dtype=torch.float64)
        model = init or LogisticModel(weight, self.log_odds, torch.zeros_like(self.log_odds), self.fitted)
        which = (self.fitted if classes is None else self.fitted & classes).nonzero()[:, 0]
        if not len(which):
            return model
        data = self.data
        weight, bias = (each[which].to(data.mean) for each in (model.weight, model.bias))
        a, b = (weight * data.scale).mT.contiguous(), bias + weight @ data.mean  # over centred rows
        ridge = self.penalty / (Cs * self.counts)[which].to(data.mean)
        columns, counts = which.to(data.device), self.counts[which].to(data.mean)
        chances = (self._probabilities(z, part, columns) for part, _, z in self._logits(a, b))
        spread = sum(((p * (1 - p)).sum(0, dtype=b.dtype) for p in chances), torch.zeros_like(b)) / counts  # (k,)
        along, across = data.curvature(spread, ridge)
        level = spread.clamp(min=1e-12).sqrt()  # (k,) for the intercepts

        def unpack(v: Tensor) -> tuple[Tensor, Tensor]:
            scaled = v[: -len(which)].view(data.dim, len(which))
            return data.stretch(scaled, 1 / along, 1 / across), v[-len(which) :] / level

        def penalised(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            losses, grad_a, grad_b = torch.zeros_like(b), torch.zeros_like(a), torch.zeros_like(b)
            for part, x, z in self._logits(a, b):
                loss, error = self._losses(z, part, columns)
                losses += loss
                grad_a += (x.mT @ error).double()
                grad_b += error.sum(dim=0, dtype=torch.float64)
            penalty = 0.5 * ridge * a.square().sum(dim=0)
            return losses / counts + penalty, grad_a / counts + ridge * a, grad_b / counts

        def objective(v: Tensor) -> tuple[float, Tensor]:
            losses, grad_a, grad_b = penalised(*unpack(v))
            return float(losses.sum()), flat(data.stretch(grad_a, 1 / along, 1 / across), grad_b / level)

        end = minimize(objective, flat(data.stretch(a, along, across), b * level), tolerance)
        a, b = unpack(end.x)
        weight = a.mT / data.scale
        found = (weight, b - weight @ data.mean, penalised(a, b)[0])
        whole = [each.clone() for each in (model.weight, model.bias, model.losses)]
        for each, values in zip(whole, found):
            each[which] = values.cpu()
        if self.exclusive:
            whole[1][~self.fitted] = whole[1][self.fitted].min() - UNSEEN
        return LogisticModel(whole[0], whole[1], whole[2], self.fitted, end.steps, end.converged)

    def _logits(self, a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunks of rows: which they are, the rows (m, D) and their logits (m, k)."""
        a, b = a.to(self.data.dtype), b.to(self.data.dtype)
        for part, x in self.data.chunks(max(256, LOGITS // len(b))):
            yield part, x, torch.addmm(b, x, a)

    @abstractmethod
    def _losses(self, z: Tensor, part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of logits (m, k) summed over rows (k,), and their gradient by the logits; may overwrite z."""

    @abstractmethod
    def _probabilities(self, z: Tensor, part: slice, columns: Tensor) -> Tensor:
        """Of each class by logits (m, k), 0 where a row does not count."""


class SoftmaxProblem(LogisticProblem):
    """One class out of K for each row.

    rows  with labels (n,), integers in [0, K)

    The free intercept of a class without rows would go to minus infinity: it is left out, and never predicted.
    """

    exclusive = True

    def __init__(self, rows: Rows, num_classes: int, **options: Any) -> None:
        super().__init__(rows, **options)
        known = rows.labels.long()
        frequencies = torch.bincount(known, minlength=num_classes).double()
        self.fitted = frequencies > 0
        self.counts = torch.full_like(frequencies, self.data.n)
        self.log_odds = (frequencies / self.data.n).log()
        self.penalty = 2.0 if num_classes == 2 else 1.0  # scikit-learn penalises one vector for two classes
        places = self.fitted.cumsum(0) - 1  # among the classes that occur
        self.labels = places[known].to(self.data.device)[:, None]  # (n, 1)

    def _losses(self, z: Tensor, part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        true = self.labels[part]
        log_sum = z.logsumexp(dim=1, keepdim=True)
        total = (log_sum - z.gather(1, true)).sum(dtype=torch.float64)
        error = z.sub_(log_sum).exp_()
        error.scatter_add_(1, true, error.new_full((1, 1), -1.0).expand_as(true))
        return (total / z.shape[1]).expand(z.shape[1]), error

    def _probabilities(self, z: Tensor, part: slice, columns: Tensor) -> Tensor:
        return z.softmax(dim=1)


class SigmoidProblem(LogisticProblem):
    """K independent binary regressions on the same features; each has a C of its own.

    rows  with labels (n, K): 1 present, 0 absent, -1 not counted for that class
    """

    exclusive = False

    def __init__(self, rows: Rows, **options: Any) -> None:
        super().__init__(rows, **options)
        labels = rows.labels
        self.labels = labels.to(self.data.device, torch.int8)
        self.counts, present = ((labels >= least).sum(dim=0).double().cpu() for least in (0, 1))
        self.fitted = (present > 0) & (present < self.counts)
        odds = (present / (self.counts - present)).log()
        self.log_odds = odds.nan_to_num(nan=-UNSEEN, posinf=UNSEEN, neginf=-UNSEEN)

    def _losses(self, z: Tensor, part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[part][:, columns]
        counted, present = (labels >= 0).to(z), (labels == 1).to(z)
        losses = (counted * F.softplus(z) - present * z).sum(dim=0, dtype=torch.float64)
        return losses, counted * z.sigmoid() - present

    def _probabilities(self, z: Tensor, part: slice, columns: Tensor) -> Tensor:
        return (self.labels[part][:, columns] >= 0) * z.sigmoid()
