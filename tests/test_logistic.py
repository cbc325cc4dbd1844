"""The solver against scikit-learn on the same objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from dinoreg.evaluation.solvers.feature_matrix import Rows
from dinoreg.evaluation.solvers.logistic_regression import LogisticModel, SoftmaxProblem, minimize
from dinoreg.evaluation.solvers.regularisation_path import balanced_split, select_and_fit


def fit_logistic(
    x: torch.Tensor,
    y: torch.Tensor,
    num_classes: int,
    C: float = 1.0,
    init: LogisticModel | None = None,
    tolerance: float = 1e-8,
    **options: Any,
) -> LogisticModel:
    return SoftmaxProblem(Rows.of(x, y), num_classes, **options).solve(C, init, tolerance=tolerance)


def clusters(n: int, dim: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters with correlated features of very different scale and an offset."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, dim, generator=generator)
    mix = torch.randn(dim, dim, generator=generator) @ torch.diag(torch.logspace(0, -1.5, dim))
    noise = 1.5 * torch.randn(n, dim, generator=generator)
    return (means[labels] + noise) @ mix + 3.0 * torch.randn(dim, generator=generator), labels


def objective(features: torch.Tensor, labels: torch.Tensor, weight: object, bias: object, C: float) -> float:
    """C * mean loss + ||W||² / (2 n), literally: scikit-learn's objective for each row."""
    w, b = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    losses = F.cross_entropy(features.double() @ w.T + b, labels)
    return float(C * losses + 0.5 * w.square().sum() / len(features))


@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fit_reaches_the_optimum_of_scikit_learn(C: float, dtype: torch.dtype) -> None:
    x, y = clusters(300, 12, 5)
    peer = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(x.double().numpy(), y.numpy())
    ours = fit_logistic(x, y, 5, C, dtype=dtype)
    theirs = objective(x, y, peer.coef_, peer.intercept_, C)
    reached = objective(x, y, ours.weight, ours.bias, C)
    assert ours.converged
    assert abs(reached - theirs) <= 1e-4 * max(1.0, C)
    assert reached / C == pytest.approx(theirs / C, abs=1e-6)
    assert float(ours.losses.sum()) == pytest.approx(reached / C, rel=1e-4)
    assert (ours.predict(x).numpy() == peer.predict(x.double().numpy())).mean() >= 0.995
    assert (ours.predict(x) == y).float().mean() == pytest.approx(peer.score(x.double().numpy(), y), abs=0.004)


def test_two_classes_carry_the_penalty_scikit_learn_gives_them() -> None:
    x, y = clusters(90, 6, 2)
    peer = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    ours = fit_logistic(x, y, 2, 0.3, dtype=torch.float64, tolerance=1e-12)
    np.testing.assert_allclose((ours.weight[1] - ours.weight[0]).numpy(), peer.coef_[0], rtol=1e-3, atol=1e-4)


def test_more_features_than_rows_and_than_exact_axes_reach_the_same_optimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.solvers.feature_matrix.EXACT_AXES", 20)
    monkeypatch.setattr("dinoreg.evaluation.solvers.feature_matrix.LEADING_AXES", 8)
    x, y = clusters(40, 70, 3)
    peer = LogisticRegression(C=0.05, tol=1e-9, max_iter=20_000).fit(x.double().numpy(), y.numpy())
    ours = fit_logistic(x, y, 3, 0.05)
    expected = objective(x, y, peer.coef_, peer.intercept_, 0.05)
    assert objective(x, y, ours.weight, ours.bias, 0.05) == pytest.approx(expected, abs=1e-6)


def test_a_warm_start_ends_at_the_same_minimum_in_fewer_steps() -> None:
    x, y = clusters(200, 10, 4)
    near = fit_logistic(x, y, 4, 0.9, standardize=True)
    cold, warm = (
        fit_logistic(x, y, 4, 1.0, standardize=True),
        fit_logistic(x, y, 4, 1.0, standardize=True, init=near),
    )
    assert warm.steps < cold.steps
    assert warm.losses.sum() == pytest.approx(float(cold.losses.sum()), rel=1e-6)


def test_standardising_equals_fitting_standardised_features() -> None:
    x, y = clusters(150, 7, 3)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    inside, outside = fit_logistic(x, y, 3, 0.2, standardize=True), fit_logistic(scaled, y, 3, 0.2)
    torch.testing.assert_close(inside.logits(x).softmax(1), outside.logits(scaled).softmax(1), atol=2e-3, rtol=0)


def test_a_class_that_training_never_shows_is_never_predicted() -> None:
    x, y = clusters(60, 5, 3)
    model = fit_logistic(x, y + (y > 1), 5)  # classes 0, 1, 3 of 5
    assert set(model.predict(x).tolist()) <= {0, 1, 3}
    assert model.weight.shape == (5, 5)
    assert torch.isfinite(model.logits(x)).all()


@pytest.mark.parametrize("held", [True, False])
def test_rows_in_chunks_give_the_fit_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    x, y = clusters(700, 6, 3)
    whole = fit_logistic(x, y, 3, 0.5)
    chosen = select_and_fit(x, y, 3, (0.1, 1.0))
    monkeypatch.setattr("dinoreg.evaluation.solvers.feature_matrix.CHUNK_NUMBERS", 1)
    monkeypatch.setattr("dinoreg.evaluation.solvers.feature_matrix.LEAST_ROWS", 64)
    if not held:  # read again in every evaluation, as when they do not fit in memory
        monkeypatch.setattr("dinoreg.evaluation.solvers.feature_matrix.IN_MEMORY", 0)
    assert fit_logistic(x, y, 3, 0.5).losses.sum() == pytest.approx(float(whole.losses.sum()), rel=1e-6)
    again = select_and_fit(x, y, 3, (0.1, 1.0))
    assert [each.losses[0] for each in again.visited] == pytest.approx(
        [each.losses[0] for each in chosen.visited], rel=1e-4
    )


def test_the_chosen_C_is_the_best_on_validation_and_the_refit_uses_every_row() -> None:
    x, y = clusters(400, 8, 4)
    held_x, held_y = clusters(200, 8, 4)
    Cs = (1e-5, 1e-3, 1e-1, 10.0)
    chosen = select_and_fit(x, y, 4, Cs, validation=(held_x, held_y))
    assert [each.C for each in chosen.visited] == list(Cs)
    assert chosen.C.item() == max(chosen.visited, key=lambda each: (each.scores[0], -each.losses[0])).C
    split = select_and_fit(x, y, 4, (chosen.C.item(),))
    direct = fit_logistic(x, y, 4, chosen.C.item())
    assert split.model.losses.sum() == pytest.approx(float(direct.losses.sum()), rel=1e-5)


def test_the_held_out_share_is_seeded_and_balanced() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 250)[
        torch.randperm(400, generator=torch.Generator().manual_seed(1))
    ]
    held = balanced_split(labels, 0.1, seed=3)
    assert torch.bincount(labels[held]).tolist() in (
        [10, 5, 25],
        [10, 6, 24],
        [10, 4, 26],
        [11, 4, 25],
        [9, 6, 25],
    )
    assert torch.equal(held, balanced_split(labels, 0.1, seed=3))
    assert not torch.equal(held, balanced_split(labels, 0.1, seed=4))


def test_bad_rows_and_labels_are_refused() -> None:
    x, y = clusters(20, 3, 2)
    with pytest.raises(ValueError, match="finite"):
        fit_logistic(torch.full_like(x, float("nan")), y, 2)


def test_the_minimiser_solves_a_quadratic_and_a_curved_valley() -> None:
    scale = torch.logspace(0, 3, 8, dtype=torch.float64)
    goal = torch.arange(8, dtype=torch.float64)
    end = minimize(lambda x: (float((scale * (x - goal) ** 2).sum()), 2 * scale * (x - goal)), torch.zeros(8).double())
    torch.testing.assert_close(end.x, goal, atol=1e-3, rtol=0)

    def valley(x: torch.Tensor) -> tuple[float, torch.Tensor]:  # Rosenbrock's
        a, b = x.tolist()
        slope = [-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)]
        return (1 - a) ** 2 + 100 * (b - a * a) ** 2, torch.tensor(slope, dtype=torch.float64)

    end = minimize(valley, torch.tensor([-1.2, 1.0], dtype=torch.float64), tolerance=1e-12)
    torch.testing.assert_close(end.x, torch.ones(2).double(), atol=1e-4, rtol=0)
    assert end.converged
    assert end.steps < 60


def test_logits_are_affine_in_the_features() -> None:
    model = LogisticModel(
        torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0]), torch.zeros(2), torch.ones(2) > 0
    )
    assert model.logits(torch.tensor([[3.0, 1.0]])).tolist() == [[5.5, -1.0]]
    assert model.predict(torch.tensor([[3.0, 1.0], [-3.0, 0.0]])).tolist() == [0, 1]
