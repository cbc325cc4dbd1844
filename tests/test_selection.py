"""Heads and penalties are chosen by the metric of the task: accuracy of images, or the mean over classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import context, small_encoder
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from dinoreg.data.source import ScenesSource
from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.metrics.bootstrap import mean_per_class_accuracy, top1
from dinoreg.evaluation.options import LinearOptions
from dinoreg.evaluation.protocols.linear import Grid
from dinoreg.evaluation.solvers.regularisation_path import select_and_fit


def rare_and_common(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """One class in ten is rare and hard to tell: a strong penalty ignores it at no cost in accuracy."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.1).astype(np.int64)
    return torch.from_numpy((labels[:, None] * 0.9 + rng.normal(size=(count, 3))).astype(np.float32)), labels


def test_the_penalty_is_chosen_by_the_metric_that_is_reported() -> None:
    (x, y), (held_x, held_y) = rare_and_common(300, 0), rare_and_common(300, 1)
    Cs = np.geomspace(1e-4, 1e2, 7).tolist()
    fits = [LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(x.numpy(), y).predict(held_x.numpy()) for C in Cs]
    chosen = {}
    for score, theirs in ((top1, lambda *pair: (pair[0] == pair[1]).mean()), (mean_per_class_accuracy, balanced)):
        found = select_and_fit(x, y, 2, Cs, validation=(held_x, held_y), score=score)
        expected = [theirs(held_y, predicted) for predicted in fits]
        assert [each.scores[0] for each in found.visited] == pytest.approx(expected, abs=2 / 300)
        assert found.C.item() in [C for C, value in zip(Cs, expected) if value >= max(expected) - 1e-9]
        chosen[score] = found.C.item()
    assert chosen[top1] != chosen[mean_per_class_accuracy]


def balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(balanced_accuracy_score(truth, predicted))


def test_the_heads_of_the_grid_are_scored_by_either_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.evaluation.protocols.linear.CHUNK", 7)
    labels = np.array([0] * 12 + [1] * 5 + [2] * 3)
    train = Labelled(ScenesSource(count=20, size=16), labels, 3)
    options = LinearOptions(lrs=(0.1, 1.0), blocks=(1,), avgpool=(0,))
    grid = Grid(small_encoder(), train, np.arange(20), options, context(tmp_path))
    features = np.random.default_rng(0).normal(size=(20, 1, 6)).astype(np.float32)
    grid.start(6)
    linear = grid.maps[grid.kinds[0]]
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(1))
    rows = np.arange(1, 20)
    for metric, literal in (("top-1", top1), ("mean per class", mean_per_class_accuracy)):
        found, said, losses = grid.scores(features, labels, metric, rows)
        for name in grid.names(grid.kinds[0]):
            assert found[name] == pytest.approx(literal(said[name], labels[rows]), abs=1e-12)
    for place, name in enumerate(grid.names(grid.kinds[0])):
        weight, bias = (each.unflatten(0, (2, 3))[place] for each in (linear.weight, linear.bias))
        logits = torch.from_numpy(features[rows, 0]) @ weight.T + bias
        assert said[name].tolist() == logits.argmax(dim=-1).tolist()
        literal = nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]))
        assert losses[name] == pytest.approx(literal.item(), rel=1e-5)
