"""Weighted k-NN against a literal loop."""

from __future__ import annotations

import math

import pytest
import torch

from dinoreg.evaluation.metrics import knn_rankme
from dinoreg.evaluation.metrics.knn_rankme import knn_predict


def literal_votes(
    train: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, k: int, most: int, classes: int
) -> list[float]:
    cosine = [float(row @ query / (row.norm() * query.norm())) for row in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:most]
    weights = [math.exp(cosine[i] / 0.07) for i in nearest]
    votes = [0.0] * classes
    for i, weight in list(zip(nearest, weights))[:k]:
        votes[int(labels[i])] += weight / sum(weights)
    return votes


def test_votes_equal_a_literal_loop_with_the_softmax_over_the_largest_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_rankme, "TEST_CHUNK", 4)
    monkeypatch.setattr(knn_rankme, "TRAIN_CHUNK", 13)
    torch.manual_seed(0)
    train, labels, test = torch.randn(37, 6), torch.randint(0, 5, (37,)), torch.randn(11, 6)
    votes = knn_predict(train, labels, test, k=(3, 9, 20), num_classes=5)
    for k in (3, 9, 20):
        expected = [literal_votes(train, labels, query, k, 20, 5) for query in test]
        torch.testing.assert_close(votes[k], torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_chunks_do_not_change_the_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    train, labels, test = torch.randn(50, 7), torch.randint(0, 3, (50,)), torch.randn(9, 7)
    whole = knn_predict(train, labels, test, k=(5, 10), num_classes=3)
    monkeypatch.setattr(knn_rankme, "TEST_CHUNK", 2)
    monkeypatch.setattr(knn_rankme, "TRAIN_CHUNK", 7)
    parts = knn_predict(train, labels, test, k=(5, 10), num_classes=3)
    for k in whole:
        torch.testing.assert_close(whole[k], parts[k])


def test_a_k_above_the_bank_takes_every_neighbour() -> None:
    torch.manual_seed(2)
    train, labels, test = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), torch.randn(3, 4)
    votes = knn_predict(train, labels, test, k=(200,), num_classes=3)[200]
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(3))


def test_a_feature_in_the_bank_finds_its_own_class_at_any_scale() -> None:
    bank = torch.eye(4)
    votes = knn_predict(bank, torch.tensor([2, 0, 3, 1]), 100 * bank, num_classes=4, k=(1,))[1]
    assert votes.argmax(1).tolist() == [2, 0, 3, 1]
