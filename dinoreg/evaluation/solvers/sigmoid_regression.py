"""Many independent binary logistic regressions on the same frozen features, all solved together.

The objective of each class is scikit-learn's over the rows that count for it: C * sum of losses + ||w||² / 2 with a
free intercept. The classes share every product with the features; L-BFGS runs on their sum, in coordinates where each
class's Hessian is nearly the identity (principal axes of the features, divided by the curvature along them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.evaluation.solvers.feature_matrix import CentredRows, Parts
from dinoreg.evaluation.solvers.lbfgs import flat, minimize

UNSEEN = 50.0  # intercept of a class that every counted row has, or none


@dataclass(frozen=True)
class BinaryModels:
    """Fitted classifiers: weight (K, D) and bias (K,) float64 on the CPU.

    losses     (K,) mean loss + ||w||² / (2 C n) of each class over its n counted rows; 0 where there was nothing to fit
    fitted     (K,) bool: the class has both positive and negative rows
    """

    weight: Tensor
    bias: Tensor
    losses: Tensor
    fitted: Tensor
    steps: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """features (n, D) -> (n, K) float32 on the features' device; the more, the more likely the class."""
        return F.linear(features.float(), self.weight.to(features), self.bias.to(features)).float()


class BinaryProblem:
    """Centred features with their principal axes, shared by every C and every class.

    parts   feature matrices that follow one another, each with the ascending rows that are meant, or None for all; they
            may be memory-mapped and of any floating type
    labels  (n, K) 1 present, 0 absent, -1 not counted for that class
    dtype   of the large products; sums and parameters are float64 either way

    Raises ValueError for features that are not finite and for labels of another shape or value.
    """

    def __init__(
        self,
        parts: Parts,
        labels: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.data = CentredRows(parts, dtype, device)
        if labels.ndim != 2 or len(labels) != self.data.n:
            raise ValueError(f"labels of shape {tuple(labels.shape)} for {self.data.n} rows, expected (n, K)")
        if not torch.isin(labels, torch.tensor([-1, 0, 1], dtype=labels.dtype)).all():
            raise ValueError("labels must be 1, 0 or -1")
        self.labels = labels.to(self.data.device, torch.int8)
        self.counted = (self.labels >= 0).sum(dim=0).double()
        self.present = (self.labels == 1).sum(dim=0).double()
        self.fitted = (self.present > 0) & (self.present < self.counted)

    def solve(
        self,
        C: Tensor,
        classes: Tensor | None = None,
        init: BinaryModels | None = None,
        tolerance: float = 1e-7,
        max_steps: int = 1000,
    ) -> BinaryModels:
        """Fit some classes, each with its own C.

        C          (K,) above 0, one for each class of the labels
        classes    (k,) which to fit; the others keep what `init` has, or zeros
        init       start from these
        tolerance  distance to the minimum at which to stop, as a mean loss summed over the classes
        """
        if C.shape != self.counted.shape or not bool((C > 0).all()):
            raise ValueError("every class needs a C above 0")
        weight, bias, losses = self._start(init)
        wanted = torch.arange(len(C)) if classes is None else classes.cpu()
        which = wanted[self.fitted.cpu()[wanted]].to(self.data.device)
        if not len(which):
            return self._models(weight, bias, losses, 0, True)
        rows = self.counted[which]
        ridge = 1.0 / (C.to(self.counted)[which] * rows)
        # Over centred rows: (D, k) and (k,).
        a, b = weight[which].mT.contiguous(), bias[which] + weight[which] @ self.data.mean
        spread = self._spread(a, b, which)
        along, across = self.data.curvature(spread, ridge)
        level = spread.clamp(min=1e-12).sqrt()  # (k,) for the intercept
        width = len(which)

        apply = self.data.stretch

        def unpack(v: Tensor) -> tuple[Tensor, Tensor]:
            return apply(v[: -width or None].view(self.data.dim, width), 1 / along, 1 / across), v[-width:] / level

        def penalised(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, grad_a, grad_b = self._mean_loss(a, b, which)
            return value + 0.5 * ridge * a.square().sum(dim=0), grad_a + ridge * a, grad_b

        def objective(v: Tensor) -> tuple[float, Tensor]:
            value, grad_a, grad_b = penalised(*unpack(v))
            return float(value.sum()), flat(apply(grad_a, 1 / along, 1 / across), grad_b / level)

        end = minimize(objective, flat(apply(a, along, across), b * level), tolerance, max_steps)
        a, b = unpack(end.x)
        losses[which] = penalised(a, b)[0]
        weight[which], bias[which] = a.mT, b - a.mT @ self.data.mean
        return self._models(weight, bias, losses, end.steps, end.converged)

    def _logits(self, a: Tensor, b: Tensor, which: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of rows (m, D), of their labels (m, k) and logits (m, k)."""
        for start, x in self.data.chunks():
            labels = self.labels[start : start + len(x)][:, which]
            yield x, labels, torch.addmm(b.to(self.data.dtype), x, a.to(self.data.dtype))

    def _mean_loss(self, a: Tensor, b: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each class's mean loss over its counted rows (k,), and its gradients (D, k) and (k,)."""
        value, grad_a, grad_b = torch.zeros_like(b), torch.zeros_like(a), torch.zeros_like(b)
        for x, labels, z in self._logits(a, b, which):
            counted, present = (labels >= 0).to(z), (labels == 1).to(z)
            value += (counted * F.softplus(z) - present * z).sum(dim=0, dtype=torch.float64)
            error = counted * z.sigmoid() - present
            grad_a += (x.mT @ error).double()
            grad_b += error.sum(dim=0, dtype=torch.float64)
        rows = self.counted[which]
        return value / rows, grad_a / rows, grad_b / rows

    def _spread(self, a: Tensor, b: Tensor, which: Tensor) -> Tensor:
        """The mean of p (1 - p) for each class (k,)."""
        total = torch.zeros_like(b)
        for _, labels, z in self._logits(a, b, which):
            p = z.sigmoid()
            total += ((labels >= 0) * p * (1 - p)).sum(dim=0, dtype=torch.float64)
        return total / self.counted[which]

    def _start(self, init: BinaryModels | None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (K, D), biases and losses (K,) to start from, over raw features."""
        if init is not None:
            return tuple(each.to(self.data.mean) * 1.0 for each in (init.weight, init.bias, init.losses))  # type: ignore
        odds = (self.present / (self.counted - self.present)).log()
        bias = torch.nan_to_num(odds, nan=-UNSEEN, posinf=UNSEEN, neginf=-UNSEEN)
        return self.data.mean.new_zeros(len(bias), self.data.dim), bias, torch.zeros_like(bias)

    def _models(self, weight: Tensor, bias: Tensor, losses: Tensor, steps: int, converged: bool) -> BinaryModels:
        return BinaryModels(weight.cpu(), bias.cpu(), losses.cpu(), self.fitted.cpu(), steps, converged)
