"""Training several small heads on one frozen backbone at once: the loop that the dense and grid protocols share.

The backbone sees a batch once; every head has its own loss and optimizer. Randomness is a function of the step, so that
an interrupted training resumes with the result of an uninterrupted one.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.evaluation.context import Context, SavedState
from dinoreg.runtime.errors import RunError

B = TypeVar("B")


def generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step: counter-based, so that any step can be drawn without those before it.

    stream  a number that separates several uses of the same seed
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]))


def linear(step: int, steps: int, warmup: int = 0, start: float = 1e-6) -> float:
    """The learning rate's factor in [0, 1] at a step from 0: 1 - step / steps, times a linear warm-up from `start`.

    mmcv's "poly" of power 1 with the warm-up of DINOv2's segmentation heads.
    """
    return max(1.0 - step / steps, 0.0) * _warm_up(step, warmup, start)


def cosine(step: int, steps: int, warmup: int = 0, start: float = 1e-3) -> float:
    """The learning rate's factor in [0, 1] at a step from 0: half a cosine from 1 to 0 over all steps, times a linear
    warm-up from `start`.

    mmcv's "CosineAnnealing" with the warm-up of DINOv2's depth heads: the cosine does not wait for the warm-up's end.
    """
    return 0.5 * (1.0 + math.cos(math.pi * step / steps)) * _warm_up(step, warmup, start)


def _warm_up(step: int, warmup: int, start: float) -> float:
    return start + (1.0 - start) * step / warmup if step < warmup else 1.0


def train_heads(
    heads: Mapping[Any, nn.Module],
    optimizers: Mapping[Any, torch.optim.Optimizer],
    batches: Callable[[int], Iterable[B]],
    losses: Callable[[int, B], Mapping[Any, Tensor]],
    steps: int,
    context: Context,
    name: str,
    *,
    schedule: Callable[[int, int, int], float] = cosine,
    warmup: int = 0,
    clip_grad: float | None = None,
    depends_on: object = (),
    shorter: str = "",
) -> dict[Any, float]:
    """Train every head for `steps` steps; heads are changed in place and left in evaluation mode.

    batches     step -> what each step from that one on learns from
    losses      (step, batch) -> {key: () loss}; it runs the backbone without gradients, and the heads with. One for
                each head, or several where a module holds several heads side by side
    name        of the saved state, distinct within the evaluation
    schedule    (step, steps, warmup) -> what each optimizer's own rate is multiplied by
    warmup      steps of the linear warm-up
    clip_grad   largest gradient norm of a head; None: no clipping
    depends_on  compared (by its repr) with that of a saved state, which is used only where they are equal
    shorter     the option that makes the training shorter, shown beside the time left
    returns     {key: mean loss of the last tenth}; NaN where a loss was not finite, after which its head is not trained
    raises      RunError when no loss is finite any more
    """
    saved = SavedState(context, name, (sorted(heads), depends_on))
    start, broken, tail = 0, set[Any](), dict[Any, list[float]]()
    parts: dict[str, Mapping[Any, Any]] = {"heads": heads, "optimizers": optimizers}
    if saved.state is not None:
        start, broken, tail = saved.state["step"], set(saved.state["broken"]), saved.state["tail"]
        for part, members in parts.items():
            for key, member in members.items():
                member.load_state_dict(saved.state[part][key])

    def state() -> dict[str, Any]:
        states = {part: {key: each.state_dict() for key, each in members.items()} for part, members in parts.items()}
        return {"step": step + 1, "broken": sorted(broken), "tail": tail, **states}

    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    modules = nn.ModuleList(heads.values()).train()
    title = name + f" (shorter: {shorter}=)" * bool(shorter)
    for step, batch in context.progress(zip(range(start, steps), batches(start)), steps - start, title):
        for group in groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(step, steps, warmup)
        found = losses(step, batch)
        values = torch.stack([loss.detach() for loss in found.values()]).tolist()  # the one wait for the device
        broken |= {key for key, value in zip(found, values) if not math.isfinite(value)}
        if len(broken) == len(found):
            raise RunError(f"{name}: the loss of every head stopped being finite at step {step}; use lower rates")
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.stack([loss for key, loss in found.items() if key not in broken]).sum().backward()
        for key, head in heads.items():
            if clip_grad is not None:
                nn.utils.clip_grad_norm_(head.parameters(), clip_grad)
            optimizers[key].step()  # a parameter without a gradient is left as it is
        if step + 1 > 0.9 * steps:
            for key, value in zip(found, values):
                tail.setdefault(key, []).append(value)
        saved.save_when_due(state)
    modules.eval()
    return {key: math.nan if key in broken else float(np.mean(values)) for key, values in tail.items()}
