"""Is the run learning, and if not, what is wrong: signals of every step, and diagnoses in words.

Cheap signals (entropies, prototype usage, feature spread) are computed every step and stay on the device; rank, weight
updates and pixels are measured where metrics are written. A diagnosis is a name, an observation and a remedy.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.evaluation.metrics.knn_rankme import rankme
from dinoreg.losses.paka import LEAST_OVERLAP
from dinoreg.train.parallelize import local
from dinoreg.train.step import StepResult

# Class tokens stored for the effective rank: enough for a stable value, few enough to be cheap.
RANK_WINDOW = 512

SAME_PIXELS = 1e-3  # a deviation of normalised pixels below which a batch shows nothing
LINES_IN_A_ROW = 3


@dataclass(frozen=True)
class Diagnosis:
    """One problem of a run: its name, what was measured, and what to do about it (one sentence)."""

    name: str
    message: str
    remedy: str


Signals = Mapping[str, Any]
# What means nothing where all pixels are the same.
OF_PIXELS = ("pixel_mean", "pixel_low", "pixel_high", "pixel_limits", "stale_steps", "feature_rank", "feature_std")


def read_signals(metrics: Signals, num_prototypes: int, num_steps: float = math.inf) -> dict[str, Any]:
    """One line of metrics with the values that rules derive from it; a missing value is NaN, which no rule applies to.

    num_prototypes  K of the DINO head
    num_steps       of the run
    returns         adds "entropy" and "marginal", shares (0 to 1) of ln K, "waiting", the share of the step time
                    spent waiting for data, "left", the share of the run that is to come, and "teacher_expected", what
                    the momentum says of "teacher_moved"; "lr" is that of the backbone; without `OF_PIXELS` where all
                    pixels are the same
    """
    without = () if metrics.get("pixel_std", math.nan) >= SAME_PIXELS else OF_PIXELS
    signals = defaultdict(lambda: math.nan, {key: value for key, value in metrics.items() if key not in without})
    largest_entropy = math.log(max(num_prototypes, 2))
    signals["entropy"] = signals["teacher_entropy"] / largest_entropy  # 1: a uniform guess
    signals["marginal"] = signals["target_marginal_entropy"] / largest_entropy  # 0: one prototype for all
    signals["waiting"] = signals["data_time"] / max(signals["step_time"], 1e-9)
    signals["num_steps"], signals["left"] = num_steps, 1 - signals["step"] / num_steps
    signals["teacher_expected"] = (1 - signals["mom"]) * signals["teacher_distance"]
    if "backbone_lr" in metrics:
        signals["lr"] = metrics["backbone_lr"]  # of the weights whose updates are measured
    return signals


@dataclass(frozen=True)
class Rule:
    """One diagnosis: its name, what it observes (see `_rule`), and what to do about it.

    at_once  report after one line of metrics, not after `LINES_IN_A_ROW`
    late     apply only from step `Health.grace` on
    """

    name: str
    observe: Callable[[Signals], Iterator[str]]
    remedy: str
    at_once: bool
    late: bool


RULES: list[Rule] = []


def _rule(remedy: str, at_once: bool = False, late: bool = False) -> Callable[..., None]:
    """Declares a rule: a function of `read_signals` that yields what was measured, in words, where the rule applies."""

    def declare(observe: Callable[[Signals], Iterator[str]]) -> None:
        RULES.append(Rule(observe.__name__[1:].replace("_", "-"), observe, remedy, at_once, late))

    return declare


@_rule("Raise batch_size to 16 or more; optim.accumulate keeps the memory as it is.", at_once=True)
def _batch_too_small(x: Signals) -> Iterator[str]:
    if x["global_batch_size"] < 2:
        yield f"a global batch of {x['global_batch_size']} image: no image has a neighbour"


@_rule("Look at the images with `dinoreg inspect data=…`: their pixels are all the same.")
def _constant_images(x: Signals) -> Iterator[str]:
    if x["pixel_std"] < SAME_PIXELS:
        yield f"pixels vary by {x['pixel_std']:.2g} over the whole batch (normalised)"


@_rule("Set augment.mean and augment.std to what `dinoreg inspect data=…` measures, on a range of 0 to 1.")
def _normalisation(x: Signals) -> Iterator[str]:
    mean, std = x["pixel_mean"], x["pixel_std"]
    if abs(mean) > 3 or SAME_PIXELS <= std < 0.05 or std > 5:
        yield f"normalised crops have a mean of {mean:.2g} and a spread of {std:.2g} (healthy: near 0 and 1)"


@_rule("Set data.range=LOW,HIGH to the values that are black and white; `dinoreg inspect data=…` says which occur.")
def _value_range(x: Signals) -> Iterator[str]:
    low, high, limits = (x[f"pixel_{key}"] for key in ("low", "high", "limits"))
    if high < 0.1 or low > 0.9 or limits > 0.95:
        yield f"of the range from black 0 to white 1 crops use {low:.2g} to {high:.2g}, {limits:.0%} at its ends"


@_rule("Remove copies, which are learnt as often as they are there: `dinoreg inspect data=…` lists them.")
def _duplicated_images(x: Signals) -> Iterator[str]:
    if x["copies"] > 0.3:
        yield f"{x['copies']:.0%} of the first images are files that came before under another name"


@_rule("Shuffle: with images of one kind in a batch the losses tell kinds apart by the batch.")
def _data_in_order(x: Signals) -> Iterator[str]:
    if x["in_order"] > 0.5:
        yield f"{x['in_order']:.0%} of the images come in the order of the data"


@_rule("Start the run anew with resume=true; if it comes back, look at the disk and the memory of that machine.")
def _stale_data(x: Signals) -> Iterator[str]:
    if x["stale_steps"] > 0:
        steps = f"{x['stale_steps']:.0f} step(s)"
        yield f"process {x['stale_rank']} got the pixels of the step before once more in {steps}"


@_rule("Set mask.ratio=0.1,0.5 and mask.probability=0.5.")
def _mask_ratio(x: Signals) -> Iterator[str]:
    if not math.isnan(x["ibot_loss"]) and not 0.02 <= x["masked"] <= 0.8:
        yield f"{x['masked']:.0%} of the patches of a masked crop are hidden (DINOv2: 10 % to 50 %)"


@_rule("Lower crops.local_scale or raise crops.global_scale, or set loss.paka_weight=0.")
def _apart_crops(x: Signals) -> Iterator[str]:
    if x["paka_loss"] == 0:
        yield f"no local crop lies by {LEAST_OVERLAP:.0%} in a global one: loss.paka_weight has nothing to align"


@_rule("Lower optim.lr (or optim.base_lr) by a factor of 3 to 10, or lengthen schedule.warmup.")
def _learning_rate_too_high(x: Signals) -> Iterator[str]:
    if x["update_ratio"] > 0.05:  # a small network with a high rate moves most
        yield f"a step moves the weights by {x['update_ratio']:.1%} of their norm (healthy: 0.01 % to 1 %)"


@_rule("Check that the learning rate is not zero and that parameters require gradients.")
def _frozen_student(x: Signals) -> Iterator[str]:
    if x["lr"] > 0 and x["update_ratio"] == 0.0:
        yield f"the learning rate is {x['lr']:.2g}, yet no weight moves"


@_rule("Check that these parameters require gradients and that what they compute reaches the losses.")
def _frozen_part(x: Signals) -> Iterator[str]:
    if x["lr"] > 0 and isinstance(x["frozen_parts"], str):
        yield f"no weight of {x['frozen_parts']} has moved since the start, while others do"


@_rule("Lower schedule.momentum: 0.99 to 0.996 at the start suits most runs.")
def _teacher_stands_still(x: Signals) -> Iterator[str]:
    # Less than a millionth float32 may round away; a teacher that averages over more than 100 runs is what it was.
    rounded_away = x["teacher_moved"] < 0.1 * x["teacher_expected"] > 1e-6
    too_slow = (1 - x["mom"]) * x["num_steps"] < 0.01
    if rounded_away or (x["update_ratio"] > 0 and x["left"] > 0.5 and too_slow):
        yield f"a step moves the teacher by {x['teacher_moved']:.2g} of its weights, at a momentum of {x['mom']:.6g}"


@_rule("Raise schedule.momentum: 0.99 to 0.996 at the start suits most runs.")
def _teacher_follows_student(x: Signals) -> Iterator[str]:
    distance, step = x["teacher_distance"], x["update_ratio"]
    if step > 0 and distance < 0.01 * step:
        yield f"the teacher is {distance:.2g} from the student, far less than one step moves ({step:.2g})"


@_rule(
    "Lower schedule.teacher_temp, raise the learning rate, use fewer head.prototypes, or loss.centering=sinkhorn.",
    late=True,
)
def _uniform_targets(x: Signals) -> Iterator[str]:
    if x["entropy"] > 0.995:
        yield f"the teacher's targets have {x['entropy']:.1%} of the entropy of a uniform guess at step {x['step']}"


@_rule("Raise schedule.teacher_temp: 0.04 to 0.07 suits most runs.")
def _one_hot_targets(x: Signals) -> Iterator[str]:
    if x["entropy"] < 0.05:  # healthy runs stay above 0.29
        yield f"the teacher's targets have {x['entropy']:.1%} of the entropy of a uniform guess: each is one prototype"


@_rule("Use loss.centering=sinkhorn, or raise schedule.teacher_temp.", late=True)
def _single_prototype(x: Signals) -> Iterator[str]:
    if x["marginal"] < 0.05:
        yield f"all images get the same prototype (marginal entropy {x['marginal']:.1%} of ln K)"


@_rule("Use loss.centering=sinkhorn or fewer head.prototypes.", late=True)
def _few_prototypes_used(x: Signals) -> Iterator[str]:
    if x["marginal"] >= 0.05 and x["prototype_usage"] < 0.02:
        yield f"{x['prototype_usage']:.1%} of the prototypes are used"


@_rule("Raise loss.koleo_weight, lower the learning rate, or use loss.centering=sinkhorn.", late=True)
def _feature_collapse(x: Signals) -> Iterator[str]:
    rank, spread = x["feature_rank"], x["feature_std"]
    if x["global_batch_size"] > 1 and (rank < 1.5 or spread < 1e-3):
        yield f"class tokens are nearly equal (effective rank {rank:.2f}, spread {spread:.2g})"


@_rule("Lower the learning rate, use precision=bf16 or fp32, and look at the listed images.", at_once=True)
def _non_finite_steps(x: Signals) -> Iterator[str]:
    if x["nonfinite_steps"] > 0:
        yield f"{x['nonfinite_steps']} step(s) were not finite and were left out"


@_rule("Raise data.workers, store smaller images, or use a faster disk.", late=True)
def _data_bound(x: Signals) -> Iterator[str]:
    if x["waiting"] > 0.3:
        yield f"{x['waiting']:.0%} of the time goes to waiting for images"


REMEDIES = {rule.name: rule.remedy for rule in RULES} | {
    "forgetting": "Lower adapt.lr, raise loss.anchor_weight, train on general images too (data=[DOMAIN,GENERAL] with "
    "data.weights), or use a checkpoint from before the fall.",
    "dense-decay": "For dense tasks use `best` by its patches (probe.metric=dense_miou or dse) or a shorter run; lower "
    "the learning rate, hold patches with loss.gram_weight=1, or with init= raise loss.anchor_weight.",
}


class Health:
    """Collects the signals of steps and turns them into metrics and diagnoses.

    num_prototypes  K of the DINO head
    grace           the first step at which rules marked `late` apply, and dense scores without masks
    ranks           the processes that train together
    num_steps       of the run
    """

    def __init__(self, num_prototypes: int, grace: int, ranks: Ranks = ALONE, num_steps: float = math.inf) -> None:
        self.num_prototypes, self.num_steps, self.grace, self.ranks = num_prototypes, num_steps, grace, ranks
        self.features: deque[Tensor] = deque()
        self.reported: set[str] = set()
        self._in_a_row: dict[str, int] = {}  # by rule, lines that it has applied to
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._sums: Tensor | float = 0.0  # (2,) of the targets' entropy and the features' spread
        self._marginal: Tensor | float = 0.0  # (K,) of the mean targets

    @torch.no_grad()
    def observe(self, result: StepResult) -> None:
        """Add the signals of one step, if it had targets; does not wait for the device."""
        if result.targets is None:
            return
        targets, features = result.targets.dino, result.targets.features  # (2B, K), (2B, D)
        self._sums = self._sums + torch.stack([torch.special.entr(targets).sum(dim=-1).mean(), _spread(features)])
        self._marginal = self._marginal + targets.mean(dim=0)
        self._steps += 1
        self.features.append(features)
        # Complete steps only, so that the images do not depend on the number of processes.
        while self.ranks.world_size * (sum(map(len, self.features)) - len(self.features[0])) >= RANK_WINDOW:
            self.features.popleft()

    @torch.no_grad()
    def summarise(self) -> dict[str, float]:
        """The metrics of the steps since the last call; waits for the device. {} when there were none.

        They cover all processes, which call together; the spread is the mean over the processes' own batches.

        returns  teacher_entropy, teacher_entropy_max and target_marginal_entropy in nats; prototype_usage, a share in
                 0 to 1; feature_std, 1 for isotropic and 0 for equal features; feature_rank, the RankMe
                 (arXiv 2210.02885) of about `RANK_WINDOW` centred class tokens, NaN where they are not finite.
                 Without prototypes (`distill=`) only the last two
        """
        if not isinstance(self._sums, Tensor) or not isinstance(self._marginal, Tensor):
            return {}
        entropy, spread = (self.ranks.all_reduce_mean(self._sums) / self._steps).tolist()
        share = -(-RANK_WINDOW // self.ranks.world_size)
        own = self.features[0][-share:] if len(self.features) == 1 else torch.cat(list(self.features))
        window = self.ranks.gather_rows(own)
        rank = rankme(window - window.mean(dim=0)) if bool(window.isfinite().all()) else math.nan
        features = {"feature_std": spread, "feature_rank": rank}
        marginal, steps = self._marginal, self._steps
        self._clear()
        if not len(marginal):
            return features
        marginal = self.ranks.all_reduce_mean(marginal) / steps
        return features | {
            "teacher_entropy": entropy,
            "teacher_entropy_max": math.log(self.num_prototypes),
            "target_marginal_entropy": float(torch.special.entr(marginal).sum()),
            # A prototype counts as used when it gets at least a tenth of its even share.
            "prototype_usage": float((marginal > 0.1 / self.num_prototypes).float().mean()),
        }

    def diagnose(self, metrics: Signals) -> list[Diagnosis]:
        """The diagnoses of one line of metrics; each is returned once a run.

        A rule not marked `at_once` has to apply to `LINES_IN_A_ROW` lines in a row.
        """
        signals = read_signals(metrics, self.num_prototypes, self.num_steps)
        late = signals["step"] >= self.grace
        suspected = {r: found for r in RULES if late or not r.late for found in r.observe(signals)}
        self._in_a_row = {rule.name: self._in_a_row.get(rule.name, 0) + 1 for rule in suspected}
        certain = (r for r in suspected if r.at_once or self._in_a_row[r.name] >= LINES_IN_A_ROW)
        return [diagnosis for rule in certain for diagnosis in self._once(rule.name, suspected[rule])]

    def forgetting(self, start: float, step: int, now: float, margin: float) -> list[Diagnosis]:
        """One diagnosis when the general probe's k-NN accuracy `now` is below `start` - `margin`; returned once a run.

        start, now, margin  shares of the test images, in 0 to 1
        step                at which `start` was measured
        """
        if not now < start - margin:
            return []
        message = f"k-NN on probe.general fell from {start:.1%} at step {step} to {now:.1%}"
        return self._once("forgetting", f"{message}, by more than probe.margin ({100 * margin:.3g} points)")

    def dense_decay(self, metric: str, peak: Mapping[str, Any], now: Mapping[str, Any]) -> list[Diagnosis]:
        """One diagnosis for patches that got worse while the class token got better; returned once a run.

        metric     "dense_miou" or "dse", by which the patches are measured
        peak, now  the probes with their "step", metric and "knn_top1": when the patches were best, and the newest
        """
        patches = f"patches fell from {metric} {peak[metric]:.3f} at step {peak['step']} to {now[metric]:.3f}"
        token = f"k-NN on class tokens rose from {peak['knn_top1']:.1%} to {now['knn_top1']:.1%}"
        return self._once("dense-decay", f"{patches}, while {token}, both by more than chance")

    def _once(self, name: str, message: str) -> list[Diagnosis]:
        if name in self.reported:
            return []
        self.reported.add(name)
        return [Diagnosis(name, message, REMEDIES[name])]


def _spread(features: Tensor) -> Tensor:
    """Mean standard deviation over the batch of L2-normalised features, times sqrt(D): 1 is isotropic, 0 collapsed."""
    unit = nn.functional.normalize(features.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[-1] ** 0.5


def parts_of(
    student: nn.ModuleDict, teacher: nn.ModuleDict, frozen: Collection[str] = ()
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """{part of the networks: (its weights in the student, in the teacher)}: every block, the heads, and the rest.

    frozen  names of modules to leave out: "backbone", "ibot_head". The mask token is left out, too: it learns only
            where patches are hidden
    """
    parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    averages = dict(teacher.named_parameters())
    for name, weight in student.named_parameters():
        module, *inside = name.split(".")
        if module in frozen or inside[0] == "mask_token":
            continue
        part = ".".join(inside[: 1 + (inside[0] == "blocks")]) if module == "backbone" else module
        for side, tensor in zip(parts.setdefault(part, ([], [])), (weight, averages[name])):
            side.append(local(tensor).detach())
    return parts


class WeightWatch:
    """Update-to-weight ratio and student-teacher distance, measured on up to 4 weight matrices around one step.

    Call `before`, take the step, call `after`; all processes call together.

    frozen  names of modules that do not learn in this run, or whose loss has no weight
    """

    def __init__(
        self, student: nn.ModuleDict, teacher: nn.ModuleDict, ranks: Ranks, frozen: Collection[str] = ()
    ) -> None:
        self.ranks = ranks
        self.parts = parts_of(student, teacher, frozen)
        pairs = zip(student["backbone"].named_parameters(), teacher["backbone"].parameters(), strict=True)
        matrices = [
            (p, average) for (name, p), average in pairs if p.ndim == 2 and "blocks" in name and p.requires_grad
        ]
        chosen = matrices[:: max(1, len(matrices) // 4)][:4]
        self.student, self.teacher = ([local(pair[side]).detach() for pair in chosen] for side in (0, 1))
        self._before: list[list[Tensor]] = []

    def before(self) -> None:
        """Copy the weights as they are before a step."""
        self._before = [[weight.clone() for weight in weights] for weights in (self.student, self.teacher)]

    @torch.no_grad()
    def after(self) -> dict[str, Any]:
        """L2 norms relative to that of the student's weights at `before`, and the parts that never moved.

        returns  update_ratio, of what the step changed; teacher_distance, of student - teacher; teacher_moved, of what
                 the step changed in the teacher; and where some parts of the networks, but not all, are as they were
                 at the start, their names as frozen_parts. Waits for the device
        """
        (student, teacher), self._before = self._before, []
        pairs = {
            "update_ratio": (self.student, student),
            "teacher_distance": (self.student, self.teacher),
            "teacher_moved": (self.teacher, teacher),
        }
        apart, norm = {name: torch._foreach_sub(*pair) for name, pair in pairs.items()}, self._norm(student)
        measured: dict[str, Any] = {name: float(self._norm(each) / norm) for name, each in apart.items()}
        still = self._still_parts()
        return measured | ({"frozen_parts": ", ".join(still)} if 0 < len(still) < len(self.parts) else {})

    def _still_parts(self) -> list[str]:
        """The parts in which the teacher still equals the student, as both did at the start."""
        differences = (torch._foreach_sub(*sides) for sides in self.parts.values())
        apart = [torch.stack(torch._foreach_norm(each)).max() for each in differences]
        most = self.ranks.all_reduce_max(torch.stack(apart)).tolist() if apart else []  # none: all of it is left alone
        return [name for name, distance in zip(self.parts, most) if distance == 0]

    def _norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm over all processes. Every replica of a tensor counts, which cancels in ratios of such norms."""
        squares = torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()
        return self.ranks.all_reduce_sum(squares).sqrt()
