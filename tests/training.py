"""The smallest whole run, shared by the tests of the training loop: seconds on one core."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dinoreg.config.load import Config, load_config
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.runtime.errors import Interrupted
from dinoreg.train import loop
from dinoreg.train.probes import Measured

TINY = {
    "model.name": "vitt8_reg4",
    "model.dim": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.drop_path": 0.2,
    "model.layerscale": None,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "crops.num_local": 2,
    "head.prototypes": 24,
    "head.hidden_dim": 40,
    "head.bottleneck_dim": 16,
    "batch_size": 6,
    "steps": 8,
    "data.source": "scenes:count=50,size=40",
    "data.workers": 1,
    "log.every": 1,
    "log.tensorboard": False,
    "probe.every": 0,
    "optim.lr": 1e-3,
    "device": "cpu",
    "precision": "fp32",
}


def tiny_config(out: Path | str | None = None, **overrides: Any) -> Config:
    """`overrides` by dotted key, with `__` for the dot."""
    values = {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return load_config(None, {**values, "out": None if out is None else str(out)})


def setup_of(config: Config, num_steps: int) -> Any:
    """What `ProbeRunner` knows of a run without general images and masks."""
    schedules = SimpleNamespace(horizon=num_steps)
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    return SimpleNamespace(config=config, num_steps=num_steps, schedules=schedules, general=None, dense=None, **place)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def stopped_after(step: int, out: Path, num_steps: int = 8) -> Iterator[None]:
    """The run inside, of `num_steps` with a line each in `out`/metrics.jsonl, is stopped by SIGTERM after `step`."""

    class Stop(loop.Signals):
        @property
        def received(self) -> int:
            return signal.SIGTERM if len(read_lines(out / "metrics.jsonl")) == step else 0

        @received.setter
        def received(self, value: int) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Signals", Stop)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {step} of {num_steps}"):
            yield


LOSSES = ("loss", "total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")


def loss_trace(out: Path) -> list[tuple[float, ...]]:
    """Every step's losses and gradient norms, exactly as written."""
    keys = ("step", *LOSSES, "grad_norm_backbone", "grad_norm_dino_head")
    return [tuple(line[key] for key in keys) for line in read_lines(out / "metrics.jsonl")]


def given(top1: float, count: int, rank: float = 3.0, first: int = 0) -> Measured:
    """The figures of a probe that was right on this share of its tested images, from the one numbered `first` on."""
    right = np.roll(np.arange(count) < round(top1 * count), first)
    interval = bootstrap_interval(right)
    values = {"rankme": rank, "knn_top1": top1, "knn_top1_low": interval.low, "knn_top1_high": interval.high}
    return Measured({**values, "knn_top1_chance": 0.1, "knn_top1_majority": 0.2, "probe_time": 1e-6}, right)
