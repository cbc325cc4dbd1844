"""Learning rate, weight decay, teacher momentum and temperature as functions of the step (DINOv2's schedules).

Warm-ups are inclusive: with w warm-up steps, step 0 has 0 and step w - 1 the peak; with a single one, step 0 has 0.
Cosines run from the end of the warm-up to the end of the run and stay at their final value beyond it. In a run that is
constant instead, they run over its cool-down, if any.
"""

from dataclasses import dataclass

from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler

from dinoreg.config.schema import AdaptConfig, ScheduleConfig


@dataclass(frozen=True)
class Now:
    """The scheduled values of one step.

    lr, last_layer_lr  learning rates, before each group's multiplier; that of the heads' last layers is 0 at first
    weight_decay       AdamW's, decoupled
    momentum           of the teacher's moving average, in [0, 1]
    teacher_temp       temperature of the teacher's softmax, > 0
    backbone           in [0, 1], factor of the backbone's learning rates; at 0 the backbone gets no gradient
    gram               whether patches are held to the relations that an earlier teacher saw
    renew              whether the teacher of now becomes that earlier one, before the step
    """

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    backbone: float = 1.0
    gram: bool = False
    renew: bool = False


def linear(start: float, end: float, step: int, steps: int) -> float:
    """The line from `start` at step 0 to `end` at step `steps` - 1; `end` after it, and at once where `steps` is 0."""
    if step == 0 < steps:
        return start
    if step >= steps - 1:
        return end
    return LinearParamScheduler(start, end)(step / (steps - 1))


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`; `end` after it."""
    return end if step >= steps else CosineParamScheduler(start, end)(step / steps)


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; the lengths in `options` and `adapt` are shares of `horizon`.

    num_steps  optimizer steps of the run
    peak_lr    learning rate at the end of the warm-up
    adapt      of a run that starts from weights: how long the backbone stays frozen, how long its factor then rises,
               and the value it rises to. None: the factor is 1
    """

    num_steps: int
    peak_lr: float
    options: ScheduleConfig
    adapt: AdaptConfig | None = None

    @property
    def horizon(self) -> int:
        """Steps that shares of the run are of: `num_steps`, unless the options say otherwise."""
        return self.options.horizon or self.num_steps

    def fall(self, start: float, end: float, step: int, first: int = 0) -> float:
        """A falling or rising value at `step`: half a cosine from `first` to the horizon, or over the cool-down."""
        if self.options.shape == "cosine":
            return cosine(start, end, step - first, self.horizon - first)
        since = step - (self.num_steps - self.options.cooldown)
        return cosine(start, end, since, self.options.cooldown) if since > 0 and self.options.cooldown else start

    def at(self, step: int) -> Now:
        """The values for step `step`, counted from 0; beyond the end of the run they stay at their final values."""
        options, horizon = self.options, self.horizon
        warmup = round(options.warmup * horizon)
        if step < warmup:
            lr = linear(0.0, self.peak_lr, step, warmup)
        else:
            final = min(1e-6, self.peak_lr) if options.final_lr is None else options.final_lr  # as in DINOv2
            lr = self.fall(self.peak_lr, final, step, warmup)
        frozen = step < round(options.freeze_last_layer * horizon)
        temp_steps = round(options.teacher_temp_warmup * horizon)
        since_gram = step - round(options.gram_start * horizon)
        period = horizon if options.gram_every is None else max(1, round(options.gram_every * horizon))
        return Now(
            lr=lr,
            last_layer_lr=0.0 if frozen else lr,
            weight_decay=self.fall(*options.weight_decay, step),
            momentum=self.fall(*options.momentum, step),
            teacher_temp=linear(*options.teacher_temp, step, temp_steps),
            backbone=self.backbone_at(step),
            gram=since_gram >= 0,
            renew=since_gram == 0 or (since_gram > 0 and options.gram_every is not None and since_gram % period == 0),
        )

    def backbone_at(self, step: int) -> float:
        """The factor of the backbone's learning rate: 0 while it is frozen, then a line up to `adapt.lr`.

        The line's first step is above 0: at 0 the backbone would get gradients and not move.
        """
        if self.adapt is None:
            return 1.0
        since = step - round(self.adapt.heads * self.horizon)
        if since < 0:
            return 0.0
        return linear(0.0, self.adapt.lr, since + 1, round(self.adapt.warmup * self.horizon) + 1)
