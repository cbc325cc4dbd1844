"""Limited-memory BFGS with a weak Wolfe line search, on one flat float64 vector on any device.

Nocedal and Wright, Numerical Optimization, algorithm 7.4 (two-loop recursion); Lewis and Overton, Nonsmooth
optimization via quasi-Newton methods, algorithm 2.6 (line search). `torch.optim.LBFGS` and SciPy's L-BFGS-B need as
many evaluations to the same value, but their stopping rules, on the gradient and on the last decrease, do not say how
far the minimum still is. The rule here is the predicted decrease of the next step, in units of the objective.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
