"""Logistic regression on frozen features to its optimum: 10,000 x 384 features of 100 classes, against scikit-learn.

    python benchmarks/logistic.py
    python benchmarks/logistic.py --strength 100 --rows 50000

Both minimise C * sum of losses + ||W||² / 2 over the same rows; each stops by its own rule, and the table shows how far
above the lowest objective of all it ended, as a mean loss per row: compare speed at a like distance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
import torch

VARIANTS = ("dinoreg", "scikit-learn", "scikit-learn, tol 1e-5")


def rows(settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Features like a backbone's: classes that overlap, directions of very different variance."""
    rng = np.random.default_rng(0)
    count, dim, classes = settings["rows"], settings["dim"], settings["classes"]
    scales = np.geomspace(3.0, 0.03, dim)
    labels = rng.integers(0, classes, count)
    centres = rng.normal(size=(classes, dim)) * 0.4
    features = ((centres[labels] + rng.normal(size=(count, dim))) * scales).astype(np.float32)
    return features, labels


def build(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """One variant; see `measure.serve`."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    features, labels = rows(settings)
    C, classes = settings["strength"], settings["classes"]

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        """Mean loss and ridge, in float64."""
        logits = features.astype(np.float64) @ weight.T.astype(np.float64) + bias
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        return float(losses.mean() + 0.5 * np.square(weight, dtype=np.float64).sum() / (C * len(labels)))

    def dinoreg() -> tuple[np.ndarray, np.ndarray]:
        from dinoreg.evaluation.solvers.feature_matrix import Rows
        from dinoreg.evaluation.solvers.logistic_regression import SoftmaxProblem

        problem = SoftmaxProblem(Rows.of(torch.from_numpy(features), torch.from_numpy(labels)), classes)
        model = problem.solve(C, tolerance=1e-6)  # as the evaluators' path
        return model.weight.numpy(), model.bias.numpy()

    def scikit_learn() -> tuple[np.ndarray, np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        tolerance = 1e-5 if settings["variant"].endswith("1e-5") else 1e-4  # the second is its default
        model = LogisticRegression(C=C, max_iter=10_000, tol=tolerance).fit(features, labels)
        return model.coef_, model.intercept_

    fit = dinoreg if settings["variant"] == "dinoreg" else scikit_learn
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def take() -> measure.Measurement:
        spent = measure.seconds(lambda: found.append(fit()), torch.device("cpu"))
        return {"fits_per_s": 1.0 / spent, "seconds": spent, "objective": objective(*found.pop())}

    fit()  # libraries are loaded and threads started
    return take


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--rows", type=int, default=10_000)
    options.add_argument("--dim", type=int, default=384)
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--strength", type=float, default=1.0, help="C")
    options.add_argument("--threads", type=int)
    given = options.parse_args()
    if given.worker:
        measure.serve(build, given.worker)
        return
    settings = {key: getattr(given, key) for key in ("rows", "dim", "classes", "strength", "threads")}
    if given.short:
        settings |= {"rows": 300, "dim": 12, "classes": 4}
        given.rounds = 1
    variants = {name: ("logistic.py", {**settings, "variant": name}, sys.executable, None) for name in VARIANTS}
    with measure.workers_of(variants, build if given.short else None) as workers:
        rounds = measure.in_turn(workers, given.rounds, given.budget)
    summary = measure.compare(rounds, "fits_per_s", list(VARIANTS[1:]))
    table = measure.comparison_rows(summary, "fits_per_s", "fits/s")
    lowest = min(measure.median(rounds, name, "objective") for name in VARIANTS)
    for row in table:
        row["seconds"] = f"{measure.median(rounds, row['variant'], 'seconds'):.2f}"
        row["above the lowest objective"] = f"{measure.median(rounds, row['variant'], 'objective') - lowest:.1e}"
    measure.report("logistic", {**settings, "rounds": len(rounds)}, summary, measure.table(table))


if __name__ == "__main__":
    main()
