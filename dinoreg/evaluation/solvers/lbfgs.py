"""Limited-memory BFGS with a strong Wolfe line search, on one flat float64 vector on any device.

Nocedal and Wright, Numerical Optimization, algorithms 7.4 (two-loop recursion) and 3.5/3.6 (line search). It
differs from `torch.optim.LBFGS` in its stopping rule: the predicted decrease of the next step, which is in
units of the objective and so says how far the minimum still is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]


class Minimum(NamedTuple):
    """Where the search ended: x (p,), its value, the steps taken, and whether the tolerance was met."""

    x: Tensor
    value: float
    steps: int
    converged: bool


class _Trial(NamedTuple):
    """One point of a line search: step length, value, slope along the direction, gradient."""

    length: float
    value: float
    slope: float
    gradient: Tensor


def minimize(
    objective: Objective, x: Tensor, tolerance: float = 1e-8, max_steps: int = 1000, history: int = 10
) -> Minimum:
    """Minimise a smooth convex function.

    objective   x (p,) -> (value, gradient (p,)); scale x so that the Hessian is near the identity
    tolerance   stop when half the directional slope, the decrease a quadratic model promises, is below this
    """
    value, gradient = objective(x)
    pairs: list[tuple[Tensor, Tensor, float]] = []  # (step, change of gradient, 1 / their product)
    for step in range(max_steps):
        direction = _two_loop(gradient, pairs)
        slope = float(gradient @ direction)
        if -0.5 * slope <= tolerance:
            return Minimum(x, value, step, True)
        trial = _line_search(objective, x, direction, _Trial(0.0, value, slope, gradient))
        if trial is None:
            if not pairs:
                return Minimum(x, value, step, False)
            pairs.clear()  # stale curvature: try once more along the gradient
            continue
        moved, change = trial.length * direction, trial.gradient - gradient
        curvature = float(moved @ change)
        if curvature > 1e-10 * float(change @ change):
            pairs.append((moved, change, 1.0 / curvature))
            del pairs[:-history]
        x, value, gradient = x + moved, trial.value, trial.gradient
    return Minimum(x, value, max_steps, False)


def _two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the inverse Hessian estimate times the gradient, (p,)."""
    q = -gradient
    weights = []
    for moved, change, rho in reversed(pairs):
        alpha = rho * (moved @ q)
        weights.append(alpha)
        q = q - alpha * change
    if pairs:
        _, change, rho = pairs[-1]
        q = q / (rho * (change @ change))
    for (moved, change, rho), alpha in zip(pairs, reversed(weights)):
        q = q + (alpha - rho * (change @ q)) * moved
    return q


def _line_search(
    objective: Objective,
    x: Tensor,
    direction: Tensor,
    origin: _Trial,
    decrease: float = 1e-4,
    curvature: float = 0.9,
    max_trials: int = 25,
) -> _Trial | None:
    """A step length under the strong Wolfe conditions, or None when rounding hides any decrease."""

    def at(length: float) -> _Trial:
        value, gradient = objective(x + length * direction)
        return _Trial(length, value, float(gradient @ direction), gradient)

    def low_enough(trial: _Trial) -> bool:
        return trial.value <= origin.value + decrease * trial.length * origin.slope

    def flat_enough(trial: _Trial) -> bool:
        return abs(trial.slope) <= -curvature * origin.slope

    before = origin
    low: _Trial | None = None  # of an interval known to hold a minimum, the end with the lower value
    high = origin
    length = 1.0
    for _ in range(max_trials):
        trial = at(length)
        if low is None:  # still looking for an interval that holds a minimum
            if not low_enough(trial) or (before is not origin and trial.value >= before.value):
                low, high = before, trial
            elif flat_enough(trial):
                return trial
            elif trial.slope >= 0:
                low, high = trial, before
            else:
                before, length = trial, 2.0 * trial.length
                continue
        elif not low_enough(trial) or trial.value >= low.value:
            high = trial
        else:
            if flat_enough(trial):
                return trial
            if trial.slope * (high.length - low.length) >= 0:
                high = low
            low = trial
        if abs(high.length - low.length) <= 1e-14 * max(high.length, low.length):
            break  # the interval has shrunk to rounding: nothing between its ends is left to try
        length = _between(low, high)
    return low if low is not None and low is not origin and low_enough(low) else None


def _between(low: _Trial, high: _Trial) -> float:
    """The minimiser of the cubic through both ends, kept a tenth of the interval away from either."""
    width = high.length - low.length
    bend = low.slope + high.slope - 3.0 * (high.value - low.value) / width
    inside = bend * bend - low.slope * high.slope
    share = 0.5
    if inside >= 0 and bend == bend:
        root = inside**0.5 * (1.0 if width > 0 else -1.0)
        denominator = high.slope - low.slope + 2.0 * root
        if denominator != 0:
            share = 1.0 - (high.slope + root - bend) / denominator
    return low.length + width * min(max(share, 0.1), 0.9)


def flat(*parts: Tensor) -> Tensor:
    """The parts as one float64 vector (p,)."""
    return torch.cat([part.reshape(-1).double() for part in parts])
