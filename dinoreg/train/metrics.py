"""What a run measures of itself and logs: a line of metrics, the samples of rejected steps, diagnoses, and probes.

What the batches look like, their order, copies, pixels and masks, is measured without slowing a step: numbers of images
and masks are on the host, files are compared while the first images are read, and of the pixels of a step one sum over
a few of them is taken. The teacher's features of fixed, unaugmented images are measured (`probes`), first before any
update. `best` is the step of a probe that was better than the best before it, at first than the untrained network, by
more than chance: by the paired difference on the same images (`evaluation.comparison.judged`). RankMe has none, and DSE
begins after the first fifth of the run.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.checkpoint.run_folder import OWN_LOSSES, logged_losses
from dinoreg.checkpoint.steps import ACCURACIES, DENSE, dense_in_words, probe_in_words
from dinoreg.config.load import Config
from dinoreg.data.loader import Batch
from dinoreg.distributed.process_group import Ranks
from dinoreg.evaluation.comparison import BETTER, WORSE, judged
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, paired_difference
from dinoreg.evaluation.result import packed, unpacked
from dinoreg.runtime.device import peak_memory, per_channel
from dinoreg.train.health import LINES_IN_A_ROW, Diagnosis, Health, WeightWatch
from dinoreg.train.logger import SilentLog
from dinoreg.train.prepare import Setup
from dinoreg.train.probes import Measured, Probe
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState
from dinoreg.train.step import StepResult

# dinov2's names of what a step optimises.
LOSS_NAMES = {
    "total_loss": "total",
    "dino_global_crops_loss": "dino_global",
    "dino_local_crops_loss": "dino_local",
    **{name: name.removesuffix("_loss") for name in ("ibot_loss", "koleo_loss", *OWN_LOSSES)},
}


class Monitor:
    """Follows a run step by step and writes its metrics and diagnoses."""

    def __init__(self, setup: Setup, state: TrainState, log: SilentLog) -> None:
        """Slow signals are judged after a fifth of the run's horizon, at least 100 steps."""
        config, horizon, self.ranks = setup.config, setup.schedules.horizon, setup.ranks
        self.setup, self.log = setup, log
        self.health = Health(config.head.prototypes, max(100, horizon // 5), setup.ranks, num_steps=horizon)
        self.weights = WeightWatch(state.student, state.teacher, setup.ranks, frozen=unlearning(config))
        self.data = DataWatch(config.augment.mean, config.augment.std, setup.ranks)
        self.fp16 = setup.dtype == torch.float16  # then the loss is scaled, and an occasional overflow is normal
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

    def write(self, state: TrainState, batch: Batch, result: StepResult, now: Now, stall: float) -> dict[str, float]:
        """Write one line of metrics, waiting for the device, and return it. Called by all processes.

        stall    seconds that training waited for checkpoints since the last line
        returns  step_time and data_time in seconds a step, images_per_second over all processes, max_memory as
                 `peak_memory` measures it, losses by `logged_losses`, and the metrics of `Health.summarise`
        """
        metrics = self._of_step(state, batch, result, now)
        metrics |= self.weights.after() | self.health.summarise() | self.data.summarise(batch)
        num_steps, elapsed = len(self._steps), time.perf_counter() - self._since
        metrics |= {"step_time": elapsed / num_steps, "data_time": self._data_time / num_steps}
        metrics["images_per_second"] = self.setup.global_batch_size * num_steps / elapsed
        rejected = self._record_rejected(state.step)
        overflow_is_normal = self.fp16 and float(state.loss_scale) > 1.0
        metrics["nonfinite_steps"] = 0 if overflow_is_normal else rejected
        metrics["checkpoint_stall"] = stall
        self.log.metrics(metrics)
        return metrics

    def _of_step(self, state: TrainState, batch: Batch, result: StepResult, now: Now) -> dict[str, float]:
        """The values of this very step, under dinov2's names."""
        config = self.setup.config
        losses = {name: float(result.losses[key]) for name, key in LOSS_NAMES.items() if key in result.losses}
        return {
            "step": state.step,
            "images": state.step * self.setup.global_batch_size,
            **logged_losses(losses, config.loss.dino_weight, config.loss.ibot_weight),
            "lr": now.lr,
            **({"backbone_lr": now.lr * now.backbone} if self.setup.init else {}),
            "wd": now.weight_decay,
            "mom": now.momentum,
            "teacher_temp": now.teacher_temp,
            "last_layer_lr": now.last_layer_lr,
            **{name: float(norm) for name, norm in result.norms.items()},
            "current_batch_size": config.batch_size,
            "global_batch_size": self.setup.global_batch_size,
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
            self.log.append("health/nonfinite.jsonl", {**line, "names": [self.setup.source.name(i) for i in ids]})
        return len(rejected)

    def report(self, step: int, diagnoses: list[Diagnosis]) -> None:
        """Log diagnoses as warnings and append them to `health/events.jsonl`."""
        for diagnosis in diagnoses:
            text = f"{diagnosis.name} at step {step}: {diagnosis.message}. {diagnosis.remedy}"
            self.log.say(f"health: {text}", logging.WARNING)
            self.log.append("health/events.jsonl", {"step": step, **vars(diagnosis)})


def unlearning(config: Config) -> list[str]:
    """The modules of the networks that do not learn as a whole in a run of this config, see `WeightWatch`."""
    loss = config.loss
    still = {
        "backbone": config.adapt.blocks is not None,
        "dino_head": loss.dino_weight == 0 and (config.head.separate or loss.ibot_weight == 0),
        "ibot_head": loss.ibot_weight == 0,
    }
    return [name for name, applies in still.items() if applies]


_LIMIT = 1 / 512  # of the range of values: nearer to black or white is at its end


class DataWatch:
    """Follows the batches of this process; `summarise` is called by all processes together.

    mean, std  by which crops are normalised, one number or one for each channel, on a range of 0 to 1
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], ranks: Ranks) -> None:
        self.mean, self.std, self.ranks = mean, std, ranks
        self._known: dict[int, int] = {}  # checksum of a file: the first image that had it
        self._compared = self._copies = 0
        self._last: Tensor | None = None  # of the step before
        self._clear()

    def _clear(self) -> None:
        self._sums: list[Tensor] = []
        self._neighbours = self._pairs = self._hidden = self._patches = 0

    def observe(self, batch: Batch) -> None:
        """Add one batch; does not wait for the device."""
        ids = batch.sample_ids
        self._neighbours += int(np.count_nonzero(np.diff(ids) == 1))
        self._pairs += len(ids) - 1
        self._hidden += int(batch.hidden.sum())
        self._patches += int(np.count_nonzero(batch.hidden)) * batch.mask.shape[1]
        for number, checksum in zip(ids.tolist(), batch.checksums.tolist()):
            self._copies += self._known.setdefault(checksum, number) != number
            self._compared += 1
        self._sums.append(batch.global_crops[:, 0, ::7, ::7].sum())  # a few pixels

    def summarise(self, batch: Batch) -> dict[str, float]:
        """What was seen since the last call, and the pixels of `batch`; waits for the device.

        returns  in_order, the share of images drawn right after the one before them in the data; copies, the share of
                 the first images whose file is that of another; stale_steps, steps whose pixels are those of the step
                 before, on the process `stale_rank` that has most; masked, the share of patches hidden in crops with
                 hidden ones; pixel_mean, of the normalised channel that is farthest from 0; pixel_low
                 and pixel_high, the darkest and the brightest value on a range of 0 to 1; pixel_limits, the share of
                 values at either end of it. Pixels are those of rank 0
        """
        crops = batch.global_crops
        sums = torch.stack([*([] if self._last is None else [self._last]), *self._sums])
        self._last = self._sums[-1]
        stale = (sums[1:] == sums[:-1]).sum()
        shares = [self._neighbours / max(1, self._pairs), self._copies / max(1, self._compared)]
        own = torch.cat([stale[None].float(), torch.tensor(shares).to(stale.device)])[None]
        steps, in_order, copies = self.ranks.gather_rows(own).T.tolist()
        mean, std = (per_channel(values, crops.device) for values in (self.mean, self.std))
        # The crops take as much memory as they are: limits are normalised, and not the crops put back.
        at_limits = ((crops < (_LIMIT - mean) / std) | (crops > (1 - _LIMIT - mean) / std)).sum() / crops.numel()
        low, high = (ends[:, None, None] * std + mean for ends in (crops.amin((0, 2, 3)), crops.amax((0, 2, 3))))
        means = crops.mean(dim=(0, 2, 3))
        pixels = torch.stack([means[means.abs().argmax()], low.min(), high.max(), at_limits])
        masked = self._hidden / max(1, self._patches)
        self._clear()
        return {
            "in_order": sum(in_order) / len(in_order),
            "copies": sum(copies) / len(copies),
            "stale_steps": max(steps),
            "stale_rank": steps.index(max(steps)),
            "masked": masked,
            **dict(zip(("pixel_mean", "pixel_low", "pixel_high", "pixel_limits"), pixels.tolist())),
        }


# ------------------------------------------------------------------------------------------------------------
# Probes


class ProbeRunner:
    """Probes the teacher of a run at intervals, logs the results, and reports when it is the best so far."""

    def __init__(self, setup: Setup, probe: Probe, monitor: Monitor) -> None:
        """
        probe    of `setup`
        monitor  logs; it excludes the time of probes from the step time
        """
        self.setup, self.probe, self.monitor, self.options = setup, probe, monitor, setup.config.probe
        every = self.options.every
        self.every = max(1, setup.schedules.horizon // 10) if every is None else every
        self._started = time.perf_counter()
        self._probing = 0.0  # seconds spent in probes
        self._images = "" if self.probe.source is None else self.probe.source.fingerprint()
        if self.options.dense is not None:
            self._images += f" {self.options.dense} {self.options.dense_values}"

    def is_due(self, step: int) -> bool:
        """Whether to probe at `step`: at multiples of the period and at the end of the run."""
        return step % self.every == 0 or step == self.setup.num_steps

    def run(self, state: TrainState) -> bool:
        """Probe the teacher and log the result; returns whether it is the best so far. All processes call together.

        Except at step 0 and at the end, nothing is measured while probes have taken more than options.max_share of the
        time. The result at step 0 is what later ones have to be better than, and never the best itself.
        """
        elapsed = time.perf_counter() - self._started
        ends = state.step in (0, self.setup.num_steps)
        if not ends and self.monitor.ranks.from_main(self._probing > self.options.max_share * elapsed):
            return False
        # Machines may differ in the last digit.
        values, right, replicates = self.monitor.ranks.from_main(self._measure(state.teacher.backbone))
        if state.step > 0:  # the first is no reason to leave out the next
            self._probing += values["probe_time"]
        self.monitor.pause(values["probe_time"])
        bits = None if right is None else np.packbits(right).tobytes().hex()  # as text, for a checkpoint's history
        now = {"step": state.step, **values, "right": bits, "images": self._images}
        now["replicates"] = {name: packed(each, "<f4") for name, each in (replicates or {}).items()}
        # Of other images than those of before, as after a change of probe.data, this is the new start.
        if state.step == 0 or state.history.get("start", {}).get("images") != self._images:
            state.history["start"] = now
            state.history.pop("best", None)
            state.history.pop("peak", None)
        start, best = state.history["start"], state.history.get("best", {})
        line = {"step": state.step, **values, **self._against(now, start)}
        self.monitor.log.append("probe.jsonl", line)
        self.monitor.log.say(f"probe at step {state.step}: {probe_in_words(line)}")
        if patches := dense_in_words(line):
            self.monitor.log.say(f"dense at step {state.step}: {patches}")
        self._watch_general(state, values)
        self._watch_dense(state, now)
        before = best if best.get("metric") == self.options.metric else start
        if start is now or not self._is_better(now, before):
            return False
        state.history["best"] = {**now, "metric": self.options.metric}
        return True

    def _against(self, now: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
        """The start in a later line: its step and accuracies, and the paired difference to it with its verdict."""
        if now["step"] == start["step"]:
            return {}
        keys = (*ACCURACIES, *DENSE)
        found = {"start_step": start["step"], **{f"{key}_start": start[key] for key in keys if key in start}}
        for key in ("knn_top1", *DENSE):
            if gain := self._compared(key, now, start):
                found |= {f"{key}_gain": gain["difference"], f"{key}_gain_verdict": gain["verdict"]}
                found |= {f"{key}_gain_low": gain["low"], f"{key}_gain_high": gain["high"]}
        return found

    def _compared(self, metric: str, now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """What a figure says against that of an earlier probe, as `comparison.judged`; {} where one of them has none.

        metric  "knn_top1", or one of `DENSE`
        """
        if metric not in now or metric not in before:
            return {}
        count, both = 0, (now, before)
        if metric == "knn_top1":
            count = len(self.probe.images) - self.probe.in_bank
            bits = (np.frombuffer(bytes.fromhex(each["right"]), dtype=np.uint8) for each in both)
            rights = (np.unpackbits(each, count=count).astype(float) for each in bits)
            replicates = [bootstrap_interval(each).replicates for each in rights]
        else:
            replicates = [unpacked(each["replicates"][metric], "<f4") for each in both]
        return judged(now[metric] - before[metric], paired_difference(*replicates), count)

    def _is_better(self, now: dict[str, Any], before: dict[str, Any]) -> bool:
        """Whether a probe is better than another on the same images: by the paired interval, RankMe at all.

        The DSE of untrained patches, which point everywhere, is no base: the first probe from `grace` on is better.
        """
        if self.options.metric == "dse" and before["step"] < self.monitor.health.grace:
            return bool(now["step"] >= self.monitor.health.grace)
        if self.options.metric == "rankme":
            return now["rankme"] > before["rankme"]
        return bool(self._compared(self.options.metric, now, before).get("verdict") == BETTER)

    def _watch_general(self, state: TrainState, values: dict[str, float]) -> None:
        """Warn when the general probe has fallen below its first value by more than the margin."""
        if self.setup.general is not None:
            now = values["general_knn_top1"]
            start = state.history.setdefault("general", {"step": state.step, "knn_top1": now})
            diagnoses = self.monitor.health.forgetting(start["knn_top1"], start["step"], now, self.options.margin)
            self.monitor.report(state.step, diagnoses)

    def _watch_dense(self, state: TrainState, now: dict[str, Any]) -> None:
        """Warn when for several probes the patches have been worse than at their best, and the class token better."""
        metric = "dense_miou" if "dense_miou" in now else "dse"
        if metric not in now or (metric == "dse" and state.step < self.monitor.health.grace):  # as for `best`
            return
        peak = state.history.setdefault("peak", {**now, "decayed": 0})
        if now[metric] > peak[metric]:
            peak = state.history["peak"] = {**now, "decayed": 0}
        patches, token = (self._compared(key, now, peak).get("verdict") for key in (metric, "knn_top1"))
        peak["decayed"] = peak["decayed"] + 1 if (patches, token) == (WORSE, BETTER) else 0
        if peak["decayed"] >= LINES_IN_A_ROW:
            self.monitor.report(state.step, self.monitor.health.dense_decay(metric, peak, now))

    def _measure(self, backbone: nn.Module) -> Measured:
        """All probes of the teacher's backbone, with the values of the general one as "general_…"."""
        setup = self.setup
        place = backbone, setup.device, setup.dtype, self.monitor.ranks
        values, right, _ = self.probe.measure(*place)
        if setup.general is not None:
            general = setup.general.measure(*place).values
            values["probe_time"] += general.pop("probe_time")
            values |= {f"general_{key}": value for key, value in general.items()}
        dense = Measured({"probe_time": 0.0}) if setup.dense is None else setup.dense.measure(*place)
        seconds = values["probe_time"] + dense.values["probe_time"]
        return Measured({**values, **dense.values, "probe_time": seconds}, right, dense.replicates)
