"""Batches of 16 on one device stay healthy with the settings shipped for small batches (`configs/vits14_reg4.yaml`).

Loss, optimizer and schedule are the shipped ones, untouched, the scaled learning rate included. The network is tiny and
has no LayerScale: with one of 1e-5 its branches are still closed at the end of so short a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from training import read_lines

from dinoreg.config.load import Config, load_config
from dinoreg.train.loop import pretrain

SMALL = {
    "model.name": "vitt8_reg4",
    "model.dim": 64,
    "model.depth": 3,
    "model.heads": 2,
    "model.layerscale": None,
    "head.prototypes": 128,
    "head.hidden_dim": 128,
    "head.bottleneck_dim": 32,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "crops.num_local": 4,
    "batch_size": 16,
    "steps": 240,
    "data.source": "scenes:count=600,size=48",
    "data.workers": 1,
    "log.every": 4,
    "log.tensorboard": False,
    "probe.data": "scenes:count=2000,first=10000000,size=48",
    "probe.num_images": 2000,
    "probe.every": 40,
    "probe.max_share": 1.0,
    "device": "cpu",
    "precision": "fp32",
}


@dataclass(frozen=True)
class Run:
    config: Config
    metrics: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("small") / "run"
    config = load_config("vits14_reg4", {**SMALL, "out": str(out)})
    pretrain(config)
    events = out / "health" / "events.jsonl"
    return Run(
        config,
        read_lines(out / "metrics.jsonl"),
        read_lines(out / "probe.jsonl"),
        read_lines(events) if events.is_file() else [],
    )


pytestmark = pytest.mark.slow


def mean(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def test_loss_optimizer_and_schedule_are_the_shipped_ones(run: Run) -> None:
    shipped = load_config("vits14_reg4")
    for section in ("loss", "optim", "schedule", "mask", "augment"):
        assert getattr(run.config, section) == getattr(shipped, section), section
    assert run.config.peak_lr() == pytest.approx(shipped.peak_lr() * math.sqrt(16 / shipped.batch_size))


def test_nothing_is_wrong_but_the_waiting_for_images(run: Run) -> None:
    assert {event["name"] for event in run.events} <= {"data-bound"}
    assert all(math.isfinite(line["total_loss"]) and line["nonfinite_steps"] == 0 for line in run.metrics)


def test_the_rank_of_the_features_is_kept(run: Run) -> None:
    ranks = [line["rankme"] for line in run.probes]  # of 64 dimensions
    assert min(ranks) > 10
    assert ranks[-1] > 0.9 * ranks[0]
    assert mean(run.metrics[-10:], "feature_rank") > mean(run.metrics[:10], "feature_rank")


def test_targets_are_neither_uniform_nor_one_prototype(run: Run) -> None:
    last = run.metrics[-len(run.metrics) // 4 :]
    largest = math.log(run.config.head.prototypes)
    assert 0.2 < mean(last, "teacher_entropy") / largest < 0.98
    assert mean(last, "target_marginal_entropy") > 0.98 * largest
    assert mean(last, "prototype_usage") > 0.9


def test_the_student_predicts_more_than_the_uniform_guess(run: Run) -> None:
    """Both DINO terms together are a mean cross-entropy, of which ln K is the uniform guess."""
    dino = mean(run.metrics[-10:], "dino_global_crops_loss") + mean(run.metrics[-10:], "dino_local_crops_loss")
    assert dino < math.log(run.config.head.prototypes)


def test_the_probe_is_kept_and_the_spread_of_the_features_rises(run: Run) -> None:
    """Over three seeds, and after 600 steps too, k-NN stays where it begins (0.24, +-0.01): here nothing is learnt yet.

    A collapse would take it to chance, 1/12; 0.03 is over two standard errors of one probe of 1,000 images.
    """
    assert [line["step"] for line in run.probes] == list(range(0, 241, 40))
    assert mean(run.probes[-3:], "knn_top1") > mean(run.probes[:3], "knn_top1") - 0.03
    assert mean(run.metrics[-10:], "feature_std") > 1.1 * mean(run.metrics[:10], "feature_std")
