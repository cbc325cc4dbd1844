"""Training several small heads on one frozen backbone at once: the loop that the dense and grid protocols share.

The backbone sees a batch once; every head has its own loss and optimizer. Randomness is a function of the step, so that
a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.runtime.errors import RunError


def generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step: counter-based, so that any step can be drawn without those before it."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]))


def polynomial(step: int, steps: int, warmup: int = 0, power: float = 1.0) -> float:
    """The learning rate's factor: linear warm-up, then (1 - progress)^power."""
    if step < warmup:
        return (step + 1) / warmup
    return max(1.0 - step / steps, 0.0) ** power


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """The learning rate's factor: linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def train_heads(
    heads: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    losses: Callable[[int], Mapping[str, Tensor]],
    steps: int,
    factor: Callable[[int], float],
    context: Context,
    name: str,
    clip_grad: float | None = None,
) -> dict[str, float]:
    """Train every head for `steps` steps; heads are changed in place and left in evaluation mode.

    losses     step -> {head: () loss}; it reads the images, runs the backbone without gradients, and the heads with
    factor     step -> what each optimizer's own rate is multiplied by
    name       of the saved state, distinct within the evaluation
    clip_grad  largest gradient norm of a head

    returns {head: mean loss of the last tenth}; a head whose loss stops being finite is NaN from then on and left as it
    was. Raises RunError when that happens to all of them.
    """
    start = 0
    broken: set[str] = set()
    tail = {key: [] for key in heads}  # type: dict[str, list[float]]
    saved = context.load_state(name)
    if saved is not None and set(saved["heads"]) == set(heads):
        start, broken = int(saved["step"]), set(saved["broken"])
        for key in heads:
            heads[key].load_state_dict(saved["heads"][key])
            optimizers[key].load_state_dict(saved["optimizers"][key])
            tail[key] = [float(value) for value in saved["tail"][key]]
    base = {key: [group["lr"] for group in optimizers[key].param_groups] for key in heads}
    if saved is not None and start:
        base = {key: [float(value) for value in saved["base"][key]] for key in heads}
    for head in heads.values():
        head.train()
    last_saved = time.monotonic()
    for step in context.progress(range(start, steps), steps - start, name):
        for key, optimizer in optimizers.items():
            for group, lr in zip(optimizer.param_groups, base[key]):
                group["lr"] = lr * factor(step)
        found = {key: loss for key, loss in losses(step).items() if key not in broken}
        values = {key: float(loss.detach()) for key, loss in found.items()}
        broken |= {key for key, value in values.items() if not math.isfinite(value)}
        if len(broken) == len(heads):
            raise RunError(f"{name}: the loss of every head stopped being finite at step {step}; use lower rates")
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.stack([loss for key, loss in found.items() if key not in broken]).sum().backward()
        for key, head in heads.items():
            if key in broken:
                continue
            if clip_grad is not None:
                nn.utils.clip_grad_norm_(head.parameters(), clip_grad)
            optimizers[key].step()
            if step + 1 > 0.9 * steps:
                tail[key].append(values[key])
        if time.monotonic() - last_saved > SAVE_SECONDS:
            last_saved = time.monotonic()
            context.save_state(
                name,
                {
                    "step": step + 1,
                    "broken": sorted(broken),
                    "heads": {key: head.state_dict() for key, head in heads.items()},
                    "optimizers": {key: optimizer.state_dict() for key, optimizer in optimizers.items()},
                    "base": base,
                    "tail": tail,
                },
            )
    for head in heads.values():
        head.eval()
    return {key: math.nan if key in broken or not tail[key] else float(np.mean(tail[key])) for key in heads}
