"""The probes inside a run: when they are due, what is logged of them, and which step is the best so far.

The teacher's features of fixed, unaugmented images are measured, first before any update: `class_probe` measures the
class tokens.

`best` is the step of a labelled probe that was better than the best before it, at first than the untrained network, by
more than chance: by the paired difference on the same tested images (`evaluation.comparison.judged`).
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dinoreg.checkpoint.steps import ACCURACIES, probe_in_words
from dinoreg.config.schema import ProbeConfig
from dinoreg.evaluation.comparison import BETTER, judged
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, paired_difference
from dinoreg.train.class_probe import Measured, Probe
from dinoreg.train.metrics import Monitor
from dinoreg.train.state import TrainState


@dataclass
class ProbeRunner:
    """Probes the teacher of a run at intervals, logs the results, and reports when it is the best so far.

    general    the probe on images that a run which started from weights must not forget; None: none
    num_steps  of the run
    horizon    without options.every a probe is due every tenth of these steps; None: of `num_steps`
    dtype      of autocast
    monitor    logs; it excludes the time of probes from the step time
    """

    probe: Probe
    general: Probe | None
    options: ProbeConfig
    num_steps: int
    device: torch.device
    dtype: torch.dtype
    monitor: Monitor
    horizon: int | None = None

    def __post_init__(self) -> None:
        tenth = max(1, (self.horizon or self.num_steps) // 10)
        self.every = tenth if self.options.every is None else self.options.every
        self._started = time.perf_counter()
        self._probing = 0.0  # seconds spent in probes
        self._images = "" if self.probe.source is None else self.probe.source.fingerprint()

    def is_due(self, step: int) -> bool:
        """Whether to probe at `step`: at multiples of the period and at the end of the run."""
        return step % self.every == 0 or step == self.num_steps

    def run(self, state: TrainState) -> bool:
        """Probe the teacher and log the result; returns whether it is the best so far. All processes call together.

        Except at step 0 and at the end, nothing is measured while probes have taken more than options.max_share of the
        time. The result at step 0 is what later ones have to be better than, and never the best itself.
        """
        elapsed = time.perf_counter() - self._started
        ends = state.step in (0, self.num_steps)
        if not ends and self.monitor.ranks.from_main(self._probing > self.options.max_share * elapsed):
            return False
        # Machines may differ in the last digit.
        values, right = self.monitor.ranks.from_main(self._measure(state.teacher.backbone))
        if state.step > 0:  # the first is no reason to leave out the next
            self._probing += values["probe_time"]
        self.monitor.pause(values["probe_time"])
        now = {"step": state.step, **values, "right": _packed(right), "images": self._images}
        # Of other images than those of before, as after a change of probe.data, this is the new start.
        if state.step == 0 or state.history.get("start", {}).get("images") != self._images:
            state.history["start"] = now
            state.history.pop("best", None)
        start, best = state.history["start"], state.history.get("best", {})
        line = {"step": state.step, **values, **self._against(now, start)}
        self.monitor.log.append("probe.jsonl", line)
        self.monitor.log.say(f"probe at step {state.step}: {probe_in_words(line)}")
        self._watch_general(state, values)
        before = best if best.get("metric") == self.options.metric else start
        if start is now or not self._is_better(now, before):
            return False
        state.history["best"] = {**now, "metric": self.options.metric}
        return True

    def _against(self, now: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
        """The start in a later line: its step and accuracies, and the paired difference to it with its verdict."""
        if now["step"] == start["step"]:
            return {}
        found = {"start_step": start["step"], **{f"{key}_start": start[key] for key in ACCURACIES if key in start}}
        if now["right"] is not None and start.get("right") is not None:
            gain = self._compared(now, start)
            found |= {"knn_top1_gain": gain["difference"], "knn_top1_gain_verdict": gain["verdict"]}
            found |= {"knn_top1_gain_low": gain["low"], "knn_top1_gain_high": gain["high"]}
        return found

    def _compared(self, now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """What the answers on the tested images say against those of an earlier probe, as `comparison.judged`."""
        count = len(self.probe.images) - self.probe.in_bank
        right = [_unpacked(each["right"], count) for each in (now, before)]
        difference = paired_difference(*(bootstrap_interval(each).replicates for each in right))
        return judged(float(right[0].mean() - right[1].mean()), difference, count)

    def _is_better(self, now: dict[str, Any], before: dict[str, Any]) -> bool:
        """Whether a probe is better than another on the same images: k-NN by the paired interval, RankMe at all."""
        if self.options.metric == "rankme":
            return now["rankme"] > before["rankme"]
        if now["right"] is None:
            return False
        return bool(self._compared(now, before)["verdict"] == BETTER)

    def _watch_general(self, state: TrainState, values: dict[str, float]) -> None:
        """Warn when the general probe has fallen below its first value by more than the margin."""
        if self.general is not None:
            now = values["general_knn_top1"]
            start = state.history.setdefault("general", {"step": state.step, "knn_top1": now})
            diagnoses = self.monitor.health.forgetting(start["knn_top1"], start["step"], now, self.options.margin)
            self.monitor.report(state.step, diagnoses)

    def _measure(self, backbone: nn.Module) -> Measured:
        """`Probe.measure` of the teacher's backbone, with the values of the general probe as "general_…"."""
        values, right = self.probe.measure(backbone, self.device, self.dtype, self.monitor.ranks)
        if self.general is not None:
            general, _ = self.general.measure(backbone, self.device, self.dtype, self.monitor.ranks)
            values["probe_time"] += general.pop("probe_time")
            values |= {f"general_{key}": value for key, value in general.items()}
        return Measured(values, right)


def _packed(right: np.ndarray | None) -> str | None:
    """Bits as text, for the history in a checkpoint."""
    return None if right is None else np.packbits(right).tobytes().hex()


def _unpacked(text: str, count: int) -> np.ndarray:
    """(count,) float64 of 0 and 1, from the text of `_packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(float)
