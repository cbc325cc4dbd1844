"""Learning rate, weight decay, teacher momentum and temperature as functions of the step (DINOv2's schedules).

Warm-ups are inclusive: with w warm-up steps, step 0 has 0 and step w - 1 the peak. Cosines run from the end of
the warm-up to the end of the run and stay at their final value beyond it.
"""

from dataclasses import dataclass

from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler

from dinoreg.config.schema import AdaptConfig, ScheduleConfig


@dataclass(frozen=True)
class Now:
    """The scheduled values of one step; `backbone` multiplies the backbone's rates, and at 0 it is frozen."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    backbone: float = 1.0


def linear(start: float, end: float, step: int, steps: int) -> float:
    """Inclusive line: `start` at step 0, `end` from step `steps` - 1 on."""
    if step >= steps - 1:
        return end
    return LinearParamScheduler(start, end)(step / (steps - 1))


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, falling (or rising) to `end` at step `steps` and beyond."""
    if step >= steps:
        return end
    return CosineParamScheduler(start, end)(step / steps)


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; their lengths are fractions of `num_steps`.

    adapt  of a run that starts from weights: how long the backbone stays frozen, how long its rate then rises, and the
           multiplier it rises to; None: the backbone learns as the heads do
    """

    num_steps: int
    peak_lr: float
    options: ScheduleConfig
    adapt: AdaptConfig | None = None

    def at(self, step: int) -> Now:
        options = self.options
        warmup = round(options.warmup * self.num_steps)
        if step < warmup:
            lr = linear(0.0, self.peak_lr, step, warmup)
        else:
            lr = cosine(self.peak_lr, min(options.final_lr, self.peak_lr), step - warmup, self.num_steps - warmup)
        frozen = step < round(options.freeze_last_layer * self.num_steps)
        temp_steps = round(options.teacher_temp_warmup * self.num_steps)
        return Now(
            lr=lr,
            last_layer_lr=0.0 if frozen else lr,
            weight_decay=cosine(*options.weight_decay, step, self.num_steps),
            momentum=cosine(*options.momentum, step, self.num_steps),
            teacher_temp=linear(*options.teacher_temp, step, temp_steps),
            backbone=self.backbone_at(step),
        )

    def backbone_at(self, step: int) -> float:
        """0 while the backbone is frozen; then a line whose first step is above 0, since a step at 0 would be lost."""
        if self.adapt is None:
            return 1.0
        since = step - round(self.adapt.heads * self.num_steps)
        if since < 0:
            return 0.0
        return linear(0.0, self.adapt.lr, since + 1, round(self.adapt.warmup * self.num_steps) + 1)
