"""Is the run learning, and if not, what is wrong: signals of every step, and diagnoses in words.

Cheap signals (entropies, prototype usage, feature spread) are taken every step and stay on the device; rank, weight
updates and pixels are looked at where metrics are written. A diagnosis is a name, what was seen and a remedy.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinoreg.distributed import process_group as distributed
from dinoreg.evaluation.metrics.knn_rankme import rankme
from dinoreg.train.parallelize import local
from dinoreg.train.step import StepResult

# Class tokens kept for the effective rank: enough for a stable figure, small enough to cost nothing.
RANK_WINDOW = 512

# A healthy AdamW run moves its weights by 1e-4 to 1e-2 of their norm a step (a small network with a high rate most).
UPDATE_TOO_LARGE = 0.05
# Targets this close to uniform carry no information; this close to one prototype, neither.
UNIFORM = 0.995
SINGLE = 0.05
FLAT_FEATURES = 1e-3
LOW_RANK = 1.5
FEW_PROTOTYPES = 0.02
DATA_BOUND = 0.3


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong: its name, what was seen, what to do about it (one sentence)."""

    name: str
    message: str
    remedy: str


REMEDIES = {
    "learning-rate-too-high": "Lower optim.lr (or optim.base_lr) by a factor of 3 to 10, or lengthen schedule.warmup.",
    "constant-images": "Look at the images with `dinoreg inspect data=…`: their pixels are all the same.",
    "frozen-student": "Check that the learning rate is not zero and that parameters require gradients.",
    "teacher-follows-student": "Raise schedule.momentum: 0.99 to 0.996 at the start suits most runs.",
    "batch-too-small": "Raise batch_size to 16 or more; optim.accumulate keeps the memory as it is.",
    "uniform-targets": "Lower schedule.teacher_temp, raise the learning rate, use fewer head.prototypes, or "
    "loss.centering=sinkhorn.",
    "single-prototype": "Use loss.centering=sinkhorn, or raise schedule.teacher_temp.",
    "feature-collapse": "Raise loss.koleo_weight, lower the learning rate, or use loss.centering=sinkhorn.",
    "few-prototypes-used": "Use loss.centering=sinkhorn or fewer head.prototypes.",
    "non-finite-steps": "Lower the learning rate, use precision=bf16 or fp32, and look at the listed images.",
    "forgetting": "Lower adapt.lr, raise loss.anchor_weight, train on general images too (data=[DOMAIN,GENERAL] with "
    "data.weights), or use a checkpoint from before the fall.",
    "data-bound": "Raise data.workers, store smaller images, or use a faster disk.",
}


class Health:
    """Collects the signals of steps and turns them into metrics and diagnoses.

    num_prototypes  K of the DINO head          grace  steps before slow-starting signals are judged
    """

    def __init__(self, num_prototypes: int, grace: int) -> None:
        self.num_prototypes = num_prototypes
        self.grace = grace
        self.features: deque[Tensor] = deque()
        self.reported: set[str] = set()
        self._suspicions: dict[str, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._marginal: Tensor | None = None

    @torch.no_grad()
    def observe(self, result: StepResult) -> None:
        """Take the signals of one step; nothing waits for the device."""
        targets = result.targets.dino  # (2B, K)
        entropy = torch.special.entr(targets).sum(dim=-1).mean()
        marginal = targets.mean(dim=0)  # (K,)
        self._marginal = marginal if self._marginal is None else self._marginal + marginal
        features = result.targets.features
        signals = {"teacher_entropy": entropy, "feature_std": _spread(features)}
        for name, value in signals.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self.features.append(features)
        while sum(len(kept) for kept in self.features) - len(self.features[0]) >= RANK_WINDOW:
            self.features.popleft()

    @torch.no_grad()
    def summarise(self) -> dict[str, float]:
        """The metrics since the last call; waits for the device. {} when nothing was observed.

        They are those of all processes, which call together; the spread is the mean of each one's own batch.
        """
        if self._steps == 0 or self._marginal is None:
            return {}
        means = distributed.all_reduce_mean(torch.stack(list(self._sums.values()))) / self._steps
        metrics = dict(zip(self._sums, means.tolist()))
        metrics["teacher_entropy_max"] = math.log(self.num_prototypes)
        marginal = distributed.all_reduce_mean(self._marginal) / self._steps
        metrics["target_marginal_entropy"] = float(torch.special.entr(marginal).sum())
        # A prototype counts as used when it gets at least a tenth of its even share.
        metrics["prototype_usage"] = float((marginal > 0.1 / self.num_prototypes).float().mean())
        share = -(-RANK_WINDOW // distributed.world_size())
        window = distributed.gather_rows(torch.cat(list(self.features))[-share:])
        metrics["feature_rank"] = rankme(window - window.mean(dim=0)) if bool(window.isfinite().all()) else math.nan
        self._clear()
        return metrics

    def diagnose(self, metrics: dict[str, Any]) -> list[Diagnosis]:
        """What is wrong according to one line of metrics; each diagnosis is given once a run.

        A signal that can be chance in one line has to show in three lines in a row.
        """
        found: list[tuple[str, str, bool]] = []  # name, message, certain at once

        def suspect(name: str, condition: bool, message: str, at_once: bool = False) -> None:
            if condition:
                found.append((name, message, at_once))

        step = int(metrics["step"])
        late = step >= self.grace
        update = metrics.get("update_ratio", math.nan)
        lr = metrics.get("backbone_lr", metrics.get("lr", 0.0))  # of the weights that are watched
        entropy = metrics.get("teacher_entropy", math.nan) / math.log(max(self.num_prototypes, 2))
        marginal = metrics.get("target_marginal_entropy", math.nan) / math.log(max(self.num_prototypes, 2))
        pixels = metrics.get("pixel_std", math.nan)
        batch = metrics.get("global_batch_size", 2)

        suspect("batch-too-small", batch < 2, f"a global batch of {batch} image: no image has a neighbour", True)
        suspect("constant-images", pixels < 1e-3, f"pixels vary by {pixels:.2g} over the whole batch (normalised)")
        suspect(
            "learning-rate-too-high",
            update > UPDATE_TOO_LARGE,
            f"a step moves the weights by {update:.1%} of their norm (healthy: 0.01 % to 1 %)",
        )
        suspect("frozen-student", lr > 0 and update == 0.0, f"the learning rate is {lr:.2g}, yet no weight moves")
        distance = metrics.get("teacher_distance", math.nan)
        suspect(
            "teacher-follows-student",
            update > 0 and distance < 0.01 * update,
            f"the teacher is {distance:.2g} from the student, far less than one step moves ({update:.2g})",
        )
        suspect(
            "uniform-targets",
            late and entropy > UNIFORM,
            f"the teacher's targets have {entropy:.1%} of the entropy of a uniform guess at step {step}",
        )
        suspect(
            "single-prototype",
            late and marginal < SINGLE,
            f"all images get the same prototype (marginal entropy {marginal:.1%} of ln K)",
        )
        usage = metrics.get("prototype_usage", 1.0)
        suspect(
            "few-prototypes-used",
            late and marginal >= SINGLE and usage < FEW_PROTOTYPES,
            f"{usage:.1%} of the prototypes are used",
        )
        rank, spread = metrics.get("feature_rank", math.nan), metrics.get("feature_std", math.nan)
        suspect(
            "feature-collapse",
            late and pixels >= 1e-3 and batch > 1 and (rank < LOW_RANK or spread < FLAT_FEATURES),
            f"class tokens are nearly equal (effective rank {rank:.2f}, spread {spread:.2g})",
        )
        rejected = metrics.get("nonfinite_steps", 0)
        suspect("non-finite-steps", rejected > 0, f"{rejected} step(s) were not finite and were left out", True)
        busy = metrics.get("data_time", 0.0) / max(metrics.get("step_time", 1.0), 1e-9)
        suspect("data-bound", late and busy > DATA_BOUND, f"{busy:.0%} of the time goes to waiting for images")
        return self._confirm(found)

    def forgetting(self, start: float, step: int, now: float, margin: float) -> list[Diagnosis]:
        """Whether the k-NN accuracy of the general probe has fallen from `start` at `step` by more than `margin`.

        Shares of the test images, all three; given once a run.
        """
        if not now < start - margin or "forgetting" in self.reported:
            return []
        self.reported.add("forgetting")
        fallen = f"k-NN on probe.general fell from {start:.1%} at step {step} to {now:.1%}"
        message = f"{fallen}, by more than probe.margin ({100 * margin:.3g} points)"
        return [Diagnosis("forgetting", message, REMEDIES["forgetting"])]

    def _confirm(self, found: list[tuple[str, str, bool]]) -> list[Diagnosis]:
        names = {name for name, _, _ in found}
        self._suspicions = {name: self._suspicions.get(name, 0) + 1 for name in names}
        confirmed = []
        for name, message, at_once in found:
            if name not in self.reported and (at_once or self._suspicions[name] >= 3):
                self.reported.add(name)
                confirmed.append(Diagnosis(name, message, REMEDIES[name]))
        return confirmed


def _spread(features: Tensor) -> Tensor:
    """Mean standard deviation over the batch of L2-normalised features, times sqrt(D): 1 is isotropic, 0 collapsed."""
    unit = nn.functional.normalize(features.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[-1] ** 0.5


class WeightWatch:
    """Update-to-weight ratio and student-teacher distance, measured on a few weight matrices around one step."""

    def __init__(self, student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
        names = [name for name, p in student["backbone"].named_parameters() if p.ndim == 2 and "blocks" in name]
        chosen = names[:: max(1, len(names) // 4)][:4]
        students = dict(student["backbone"].named_parameters())
        teachers = dict(teacher["backbone"].named_parameters())
        self.student = [local(students[name]) for name in chosen]
        self.teacher = [local(teachers[name]) for name in chosen]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before(self) -> None:
        self._before = [weight.detach().clone() for weight in self.student]

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """{"update_ratio", "teacher_distance"}: norms of differences over the norm of the weights."""
        if not self._before:
            return {}
        norm = _norm(self._before)
        moved = _norm([now - then for now, then in zip(self.student, self._before)])
        apart = _norm([now - average for now, average in zip(self.student, self.teacher)])
        self._before = []
        return {"update_ratio": float(moved / norm), "teacher_distance": float(apart / norm)}


def _norm(tensors: list[Tensor]) -> Tensor:
    """The joint norm over all processes. Copies of a tensor count each, which ratios of such norms do not see."""
    squares = torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()
    return distributed.all_reduce_sum(squares).sqrt()
