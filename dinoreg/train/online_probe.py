"""The probes inside a run: when they are due, what is logged of them, and which step is the best so far.

The teacher's features of fixed, unaugmented images are measured (`probes`), first before any update.

`best` is the step of a probe that was better than the best before it, at first than the untrained network, by more than
chance: by the paired difference on the same images (`evaluation.comparison.judged`). RankMe has none, and DSE begins
after the first fifth of the run.
"""

import time
from typing import Any

import numpy as np
from torch import nn

from dinoreg.checkpoint.steps import ACCURACIES, DENSE, dense_in_words, probe_in_words
from dinoreg.evaluation.comparison import BETTER, WORSE, judged
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, paired_difference
from dinoreg.evaluation.result import packed, unpacked
from dinoreg.train.health import LINES_IN_A_ROW
from dinoreg.train.metrics import Monitor
from dinoreg.train.prepare import Setup
from dinoreg.train.probes import Measured, Probe
from dinoreg.train.state import TrainState


class ProbeRunner:
    """Probes the teacher of a run at intervals, logs the results, and reports when it is the best so far."""

    def __init__(self, setup: Setup, probe: Probe, monitor: Monitor) -> None:
        """
        probe    of `setup`
        monitor  logs; it excludes the time of probes from the step time
        """
        self.setup, self.probe, self.monitor, self.options = setup, probe, monitor, setup.config.probe
        tenth = max(1, setup.schedules.horizon // 10)
        self.every = tenth if self.options.every is None else self.options.every
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
