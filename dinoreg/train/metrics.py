"""What a run writes down between steps: a line of metrics, left-out steps, diagnoses, probes."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from dinoreg.data.loader import Batch
from dinoreg.distributed import process_group as distributed
from dinoreg.runtime.device import peak_memory
from dinoreg.train.health import Diagnosis, Health
from dinoreg.train.logger import RunLog
from dinoreg.train.prepare import Setup
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState
from dinoreg.train.step import StepResult


def step_metrics(setup: Setup, state: TrainState, batch: Batch, result: StepResult, now: Now) -> dict[str, float | int]:
    """The values of this very step, under dinov2's names; losses as they are optimised."""
    losses = {
        "total_loss": "total",
        "dino_global_crops_loss": "dino_global",
        "dino_local_crops_loss": "dino_local",
        "ibot_loss": "ibot",
        "koleo_loss": "koleo",
        "anchor_loss": "anchor",
    }
    return {
        "step": state.step,
        "images": state.step * setup.global_batch_size,
        **{name: float(result.losses[key]) for name, key in losses.items() if key in result.losses},
        "lr": now.lr,
        **({"backbone_lr": now.lr * now.backbone} if setup.start is not None else {}),
        "wd": now.weight_decay,
        "mom": now.momentum,
        "teacher_temp": now.teacher_temp,
        "last_layer_lr": now.last_layer_lr,
        **{name: float(norm) for name, norm in result.norms.items()},
        "current_batch_size": setup.config.batch_size,
        "global_batch_size": setup.global_batch_size,
        "pixel_std": float(batch.global_crops.std(dim=(0, 2, 3)).max()),
        "max_memory": peak_memory(setup.device),
        **({"loss_scale": float(state.loss_scale)} if setup.dtype == torch.float16 else {}),
    }


class Clock:
    """Step and data times since the last line of metrics, and which steps were accepted."""

    def __init__(self) -> None:
        self.probing = 0.0  # seconds spent in probes since the run began
        self.started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._data = 0.0
        self._paused = 0.0
        self.steps: list[tuple[np.ndarray, Tensor]] = []

    def add(self, batch: Batch, result: StepResult) -> None:
        self._data += batch.data_time
        self.steps.append((batch.sample_ids, result.accepted))

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training: probes."""
        self._paused += seconds

    def read(self, global_batch_size: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self._since - self._paused
        steps = max(1, len(self.steps))
        return {
            "step_time": elapsed / steps,
            "data_time": self._data / steps,
            "images_per_second": global_batch_size * steps / elapsed,
        }

    def finish_window(self) -> list[tuple[np.ndarray, Tensor]]:
        """Sample ids and acceptance of the steps since the last line; starts the next window."""
        steps = self.steps
        self._reset()
        return steps


def record_rejected(setup: Setup, log: RunLog, clock: Clock, state: TrainState) -> dict[str, int]:
    """Name the samples of steps that were left out because they were not finite."""
    steps = clock.finish_window()
    accepted = torch.stack([flag for _, flag in steps]).tolist()
    first = state.step - len(steps) + 1
    rejected = 0
    for offset, ((sample_ids, _), fine) in enumerate(zip(steps, accepted)):
        if not fine:
            rejected += 1
            ids = [int(i) for each in distributed.gather_objects(sample_ids.tolist()) for i in each]
            names = [setup.source.name(i) for i in ids]
            log.append("health/nonfinite.jsonl", {"step": first + offset, "sample_ids": ids, "names": names})
    overflow_is_normal = setup.dtype == torch.float16 and float(state.loss_scale) > 1.0
    return {"nonfinite_steps": 0 if overflow_is_normal else rejected}


def report_diagnoses(log: RunLog, step: int, diagnoses: list[Diagnosis]) -> None:
    for found in diagnoses:
        log.say(f"health: {found.name} at step {step}: {found.message}. {found.remedy}", logging.WARNING)
        log.append(
            "health/events.jsonl",
            {"step": step, "name": found.name, "message": found.message, "remedy": found.remedy},
        )


def run_probe(setup: Setup, state: TrainState, log: RunLog, clock: Clock, health: Health) -> bool:
    """Probe the teacher; returns whether it is the best so far. Left out when it would take too much of the time.

    Both ends of a run are always probed, the beginning where there is something to compare with (`init=`).
    """
    elapsed = time.perf_counter() - clock.started
    ends = state.step in (0, setup.num_steps)
    if not ends and distributed.from_main(clock.probing > setup.config.probe.max_share * elapsed):
        return False
    values = distributed.from_main(measure(setup, state))  # machines may differ in the last digit
    if state.step > 0:  # the first is no reason to leave out the next
        clock.probing += values["probe_time"]
    clock.pause(values["probe_time"])
    log.append("probe.jsonl", {"step": state.step, **values})
    shown = "  ".join(f"{key}: {value:.4g}" for key, value in values.items() if key != "probe_time")
    log.say(f"probe at step {state.step}: {shown}")
    if setup.general is not None:
        now = values["general_knn_top1"]
        start = state.history.setdefault("general", {"step": state.step, "knn_top1": now})
        margin = setup.config.probe.margin
        report_diagnoses(log, state.step, health.forgetting(start["knn_top1"], start["step"], now, margin))
    metric = setup.config.probe.metric if setup.config.probe.metric in values else "rankme"
    best = state.history.get("best")
    if state.step == 0 or (best is not None and best["metric"] == metric and best["value"] >= values[metric]):
        return False
    state.history["best"] = {"metric": metric, "value": values[metric], "step": state.step}
    return True


def measure(setup: Setup, state: TrainState) -> dict[str, float]:
    """{"rankme", ["knn_top1"], ["general_rankme", "general_knn_top1"], "probe_time"} of the teacher."""
    assert setup.probe is not None
    values = setup.probe.measure(state.teacher.backbone, setup.device, setup.dtype)
    if setup.general is not None:
        general = setup.general.measure(state.teacher.backbone, setup.device, setup.dtype)
        values["probe_time"] += general.pop("probe_time")
        values |= {f"general_{key}": value for key, value in general.items()}
    return values
