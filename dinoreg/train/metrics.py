"""What a run logs between steps: a line of metrics, the samples of rejected steps, diagnoses."""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoreg.checkpoint.run_folder import logged_losses
from dinoreg.config.schema import LossConfig
from dinoreg.data.loader import Batch
from dinoreg.data.source import Source
from dinoreg.distributed.process_group import Ranks
from dinoreg.runtime.device import peak_memory
from dinoreg.train.data_watch import DataWatch
from dinoreg.train.health import Diagnosis, Health, WeightWatch
from dinoreg.train.logger import SilentLog
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState
from dinoreg.train.step import StepResult

# dinov2's names of what a step optimises.
LOSS_NAMES = {
    "total_loss": "total",
    "dino_global_crops_loss": "dino_global",
    "dino_local_crops_loss": "dino_local",
    "ibot_loss": "ibot",
    "koleo_loss": "koleo",
    "diet_loss": "diet",
    "anchor_loss": "anchor",
    "gram_loss": "gram",
    "paka_loss": "paka",
    "distill_cls_loss": "distill_cls",
    "distill_patch_loss": "distill_patch",
}


@dataclass
class Monitor:
    """Follows a run step by step and writes its metrics and diagnoses.

    source      names the samples of rejected steps
    batch_size  images a step on this process
    fp16        whether the loss is scaled, so that an occasional overflow is normal
    pretrained  whether the run started from weights (`init=`), with a learning rate schedule of the backbone's own
    loss        the weights that the losses of a step include
    """

    log: SilentLog
    health: Health
    weights: WeightWatch
    data: DataWatch
    source: Source
    ranks: Ranks
    batch_size: int
    fp16: bool
    pretrained: bool
    loss: LossConfig

    def __post_init__(self) -> None:
        self.global_batch_size = self.batch_size * self.ranks.world_size
        self._restart()

    def _restart(self) -> None:
        """Begin what the next line of metrics is about."""
        self._steps: list[tuple[np.ndarray, Tensor]] = []  # sample ids and acceptance
        self._since = time.perf_counter()
        self._data_time = 0.0

    def pause(self, seconds: float) -> None:
        """Exclude `seconds`, spent in a probe, from the step time of the next metrics."""
        self._since += seconds

    def observe(self, batch: Batch, result: StepResult) -> None:
        """Add the signals of one step; does not wait for the device."""
        self.health.observe(result)
        self.data.observe(batch)
        self._data_time += batch.data_time
        self._steps.append((batch.sample_ids, result.accepted))

    def write(
        self, state: TrainState, batch: Batch, result: StepResult, now: Now, checkpoint_stall: float
    ) -> dict[str, float | int]:
        """Write one line of metrics, waiting for the device, and return it. Called by all processes.

        checkpoint_stall  seconds that training waited for checkpoints since the last line
        returns           step_time and data_time in seconds a step, images_per_second over all processes, max_memory
                          as `peak_memory` measures it, losses by `logged_losses`, and the metrics of `Health.summarise`
        """
        metrics = self._of_step(state, batch, result, now)
        metrics |= self.weights.after() | self.health.summarise() | self.data.summarise(batch)
        num_steps, elapsed = len(self._steps), time.perf_counter() - self._since
        metrics |= {"step_time": elapsed / num_steps, "data_time": self._data_time / num_steps}
        metrics["images_per_second"] = self.global_batch_size * num_steps / elapsed
        rejected = self._record_rejected(state.step)
        overflow_is_normal = self.fp16 and float(state.loss_scale) > 1.0
        metrics["nonfinite_steps"] = 0 if overflow_is_normal else rejected
        metrics["checkpoint_stall"] = checkpoint_stall
        self.log.metrics(metrics)
        return metrics

    def _of_step(self, state: TrainState, batch: Batch, result: StepResult, now: Now) -> dict[str, float | int]:
        """The values of this very step, under dinov2's names."""
        losses = {name: float(result.losses[key]) for name, key in LOSS_NAMES.items() if key in result.losses}
        return {
            "step": state.step,
            "images": state.step * self.global_batch_size,
            **logged_losses(losses, self.loss.dino_weight, self.loss.ibot_weight),
            "lr": now.lr,
            **({"backbone_lr": now.lr * now.backbone} if self.pretrained else {}),
            "wd": now.weight_decay,
            "mom": now.momentum,
            "teacher_temp": now.teacher_temp,
            "last_layer_lr": now.last_layer_lr,
            **{name: float(norm) for name, norm in result.norms.items()},
            "current_batch_size": self.batch_size,
            "global_batch_size": self.global_batch_size,
            "pixel_std": float(batch.global_crops.std(dim=(0, 2, 3)).max()),
            "max_memory": peak_memory(batch.global_crops.device),
            **({"loss_scale": float(state.loss_scale)} if self.fp16 else {}),
        }

    def _record_rejected(self, step: int) -> int:
        """Name the samples of steps that were left out because they were not finite; returns how many steps."""
        steps = self._steps
        self._restart()
        accepted = torch.stack([flag for _, flag in steps]).tolist()
        rejected = [index for index, flag in enumerate(accepted) if not flag]
        for index in rejected:
            ids = [int(i) for part in self.ranks.gather_objects(steps[index][0].tolist()) for i in part]
            line = {"step": step - len(steps) + 1 + index, "sample_ids": ids}
            self.log.append("health/nonfinite.jsonl", {**line, "names": [self.source.name(i) for i in ids]})
        return len(rejected)

    def report(self, step: int, diagnoses: list[Diagnosis]) -> None:
        """Log diagnoses as warnings and append them to `health/events.jsonl`."""
        for diagnosis in diagnoses:
            text = f"{diagnosis.name} at step {step}: {diagnosis.message}. {diagnosis.remedy}"
            self.log.say(f"health: {text}", logging.WARNING)
            self.log.append("health/events.jsonl", {"step": step, **vars(diagnosis)})
