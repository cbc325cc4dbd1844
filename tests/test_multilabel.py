"""Binary logistic regressions against scikit-learn's optimum, the choice of C, and the whole multi-label protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.benchmark import Task, find_benchmark
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, MultiLabelled
from dinoreg.evaluation.metrics.average_precision import Ranking
from dinoreg.evaluation.options import EvalOptions, MultilabelOptions
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.protocols.multilabel import choose, evaluate
from dinoreg.evaluation.solvers import feature_matrix as feature_rows
from dinoreg.evaluation.solvers.feature_matrix import Rows
from dinoreg.evaluation.solvers.logistic_regression import SigmoidProblem
from dinoreg.models.registry import build
from dinoreg.runtime.errors import UserError
from tests.miniatures import voc2007


def rows(n: int, dim: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of very different scale with an offset, and overlapping sets of classes with some not to be counted."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) @ np.diag(np.logspace(0, -1.5, dim))
    scores = x @ np.random.default_rng(99).normal(size=(dim, classes)) + rng.normal(size=(n, classes)) * 2
    labels = (scores > np.quantile(scores, np.linspace(0.5, 0.9, classes), axis=0).diagonal()).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = -1
    return torch.from_numpy(x + 3.0).float(), torch.from_numpy(labels)


def loss(x: torch.Tensor, y: torch.Tensor, weight: np.ndarray, bias: float, C: float) -> float:
    """Mean loss + ||w||² / (2 C n) over the rows that count: scikit-learn's objective, literally."""
    kept = y >= 0
    z = x[kept].double().numpy() @ weight + bias
    losses = np.logaddexp(0, np.where(y[kept].numpy() == 1, -z, z))
    return float(losses.mean() + weight @ weight / (2 * C * len(z)))


@pytest.mark.parametrize("exact", [True, False])
def test_every_class_reaches_the_optimum_of_scikit_learn(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(feature_rows, "EXACT_AXES", 4)
        monkeypatch.setattr(feature_rows, "LEADING_AXES", 6)
    x, y = rows(300, 12, 5)
    C = torch.tensor([1e-3, 0.05, 1.0, 40.0, 1e4])
    ours = SigmoidProblem(Rows.of(x, y)).solve(C)
    assert ours.converged
    for k in range(5):
        kept = y[:, k] >= 0
        peer = LogisticRegression(C=float(C[k]), tol=1e-10, max_iter=50_000)
        peer.fit(x[kept].double().numpy(), y[kept, k].numpy())
        best = loss(x, y[:, k], peer.coef_[0], peer.intercept_[0], float(C[k]))
        reached = loss(x, y[:, k], ours.weight[k].numpy(), float(ours.bias[k]), float(C[k]))
        assert abs(reached - best) <= 1e-4
        assert reached == pytest.approx(best, abs=2e-6)
        assert float(ours.losses[k]) == pytest.approx(reached, abs=1e-5)


def test_rows_in_parts_and_chunks_give_the_fit_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(90, 7, 3)
    whole = SigmoidProblem(Rows.of(x, y)).solve(torch.ones(3))
    monkeypatch.setattr(feature_rows, "CHUNK_NUMBERS", 1)
    monkeypatch.setattr(feature_rows, "LEAST_ROWS", 16)
    monkeypatch.setattr(feature_rows, "IN_MEMORY", 0)
    parts = ((x[:20], None), (torch.cat([x[:5] * 0, x[20:]]), torch.arange(5, 75)))
    split = SigmoidProblem(Rows(parts, y)).solve(torch.ones(3))
    torch.testing.assert_close(split.losses, whole.losses, atol=1e-6, rtol=0)


def test_a_class_that_all_rows_have_or_none_is_not_fitted() -> None:
    x, y = rows(60, 4, 3)
    y[:, 0], y[:, 2] = 1, torch.where(y[:, 2] == 1, -1, y[:, 2])
    model = SigmoidProblem(Rows.of(x, y)).solve(torch.ones(3))
    assert model.fitted.tolist() == [False, True, False]
    assert model.weight[0].abs().max() == 0
    assert (model.logits(x)[:, 0] > 0).all()
    assert (model.logits(x)[:, 2] < 0).all()


def test_bad_rows_are_refused() -> None:
    x, y = rows(20, 3, 2)
    with pytest.raises(ValueError, match="finite"):
        SigmoidProblem(Rows.of(x * torch.nan, y))


def test_each_class_takes_the_C_of_its_best_validation_average_precision() -> None:
    x, y = rows(120, 30, 4)
    held_x, held_y = rows(200, 30, 4, seed=1)
    Cs = np.array([1e-5, 1e-3, 1e-1, 10.0])
    fit, judged = Rows.of(x, y), Rows.of(held_x, held_y)
    chosen = choose(fit, judged, Cs, "11", "cpu").C
    for k in range(4):
        kept, held = y[:, k] >= 0, held_y[:, k]
        scores = {}
        for C in Cs:
            peer = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(x[kept].numpy(), y[kept, k].numpy())
            scores[C] = Ranking(peer.decision_function(held_x.numpy()), held == 1, held < 0).curve().average("11")
        assert scores[chosen[k]] == pytest.approx(max(scores.values()), abs=0.01)
    assert len(set(chosen)) > 1


def test_a_class_without_examples_takes_the_middle_C_and_no_class_at_all_is_an_error() -> None:
    x, y = rows(50, 5, 3)
    y[:, 1] = 0
    same = Rows.of(x, y)
    path = choose(same, same, np.array([0.1, 1.0]), "11", "cpu")
    assert path.model.fitted.tolist() == [True, False, True]
    assert path.C[1] == pytest.approx(np.sqrt(path.C[0] * path.C[2]))
    with pytest.raises(UserError, match="no class has both"):
        choose(Rows.of(x, y * 0), same, np.array([1.0]), "11", "cpu")


def context(folder: Path, examples: bool = False) -> Context:
    return Context(folder / "features", folder / "state", folder / "examples" if examples else None, 0, 28, 16, 0)


def voc(folder: Path, **options: object) -> tuple[Data, Task]:
    voc2007.write(folder, **options)  # type: ignore[arg-type]
    benchmark = find_benchmark("voc2007")
    task = next(task for task in benchmark.tasks if task.protocol == "multilabel")
    return task.read(benchmark.find(folder), benchmark.option_values({})), task


FAST = EvalOptions(multilabel=MultilabelOptions(min_c=1e-3, max_c=1e3, num_c=7))


def test_planted_classes_are_found_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    encoder = wrap(build("vitt14_reg4", image_size=28))
    data, task = voc(tmp_path / "true")
    rows = evaluate(Measurement(encoder, data, task, FAST, context(tmp_path / "a", examples=True)))
    assert [row.metric for row in rows] == ["11-point mAP", "all-points mAP"]
    for row in rows:
        assert row.value > 0.85
        assert row.low <= row.value <= row.high
        assert row.chosen_on == "the official validation split"
        assert (row.n_train, row.n_test) == (48, 24)
        assert set(row.details["AP"]) == set(voc2007.SHOWN)
        assert row.value == pytest.approx(np.mean(list(row.details["AP"].values())))
        assert "bicycle" in row.note
    assert len(list((tmp_path / "a/examples").glob("multilabel_*.png"))) == 8
    data, task = voc(tmp_path / "shuffled", shuffled=True)
    row = evaluate(Measurement(encoder, data, task, FAST, context(tmp_path / "b")))[0]
    assert row.value < 0.65
    assert row.chance is not None
    assert abs(row.value - row.chance) < 0.2


def test_without_a_validation_split_a_seeded_share_of_train_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.backbones.encoder.PIXEL_SIDE", 8)
    data, task = voc(tmp_path)
    data = replace(data, splits={name: data.splits[name] for name in ("train", "test")})
    encoder = PixelEncoder(14, (28, 28))
    first = evaluate(Measurement(encoder, data, task, FAST, context(tmp_path / "a")))[0]
    again = evaluate(Measurement(encoder, data, task, FAST, context(tmp_path / "b")))[0]
    assert first.chosen_on == "10% of train, seed 0"
    assert first.n_train == 24
    assert replace(first, hours=0) == replace(again, hours=0)


def test_wrong_data_and_metrics_are_refused(tmp_path: Path) -> None:
    data, task = voc(tmp_path, per_class=1)
    encoder = PixelEncoder(14, (28, 28))
    missing = replace(data, splits={"train": data.splits["train"]})
    with pytest.raises(UserError, match="the test split is missing"):
        evaluate(Measurement(encoder, missing, task, FAST, context(tmp_path)))
    with pytest.raises(UserError, match="11-point mAP and all-points mAP"):
        evaluate(Measurement(encoder, data, replace(task, metric="top-1"), FAST, context(tmp_path)))
    with pytest.raises(UserError, match=r"multilabel\.num_c=0"):
        MultilabelOptions(num_c=0)
    with pytest.raises(UserError, match="1, 0 and -1"):
        MultiLabelled(data.splits["train"].source, data.splits["train"].labels + 1, 20)
