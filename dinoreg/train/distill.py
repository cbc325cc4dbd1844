"""What a step of a run with `distill=` computes in place of self-distillation.

The student sees the global crops whole. Its class and patch tokens, projected to the width of the tutor's, learn to
point where those of the tutor point (`losses/distill.py`). There are no prototypes, masks and local crops.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoreg.losses.centering import update_center
from dinoreg.losses.distill import distill_loss, resample_tokens
from dinoreg.models.vit import Tokens
from dinoreg.runtime.device import autocast
from dinoreg.train.parallelize import without_reduction
from dinoreg.train.state import TrainState


def distill_backward(
    state: TrainState, crops: Tensor, seeds: Sequence[int], frozen: bool
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Add the gradients of the distance to the tutor's tokens to the student's, a micro-batch for each seed.

    crops    (2B, C, H, W), as the loader cut them; len(seeds) divides B
    seeds    of the networks' own randomness (drop path)
    frozen   no gradient goes to the backbone, only to the projections
    returns  {"distill_cls", "distill_patch", "total"}, as `StepResult.losses`; the student's class tokens (2B, D),
             float32; the centres {"cls", "patch"} for the next step, each (1, D')
    """
    tutor, ranks, student, loss = state.tutor, state.ranks, state.train_modules, state.loss
    assert tutor is not None
    weights = {"distill_cls": 1.0, "distill_patch": loss.distill_patch_weight}
    sums: list[Tensor] = []
    features: list[Tensor] = []
    means: list[tuple[Tensor, Tensor]] = []
    for index, part in enumerate(crops.chunk(len(seeds))):
        seen = tutor.tokens(part)
        torch.manual_seed(seeds[index])
        with without_reduction(student, index + 1 < len(seeds)):
            with autocast(part.device, state.dtype):
                with torch.set_grad_enabled(not frozen):
                    tokens: Tokens = student["backbone"](tutor.for_student(part))
                cls_tokens, patch_tokens = student["distill_head"](tokens.cls, tokens.patches)
            grids = tutor.encoder.grid(tutor.size, tutor.size), state.student.backbone.grid
            patches = resample_tokens(seen.patches, *grids)
            distances = {
                "distill_cls": distill_loss(cls_tokens, seen.cls, state.centers["cls"]),
                "distill_patch": distill_loss(patch_tokens, patches, state.centers["patch"]),
            }
            values = torch.stack([weights[name] / len(seeds) * value for name, value in distances.items()])
            (values.sum() * state.loss_scale).backward()
        sums.append(values.detach())
        features.append(tokens.cls.detach().float())
        means.append((seen.cls.mean(dim=0, keepdim=True), seen.patches.mean(dim=(0, 1)).unsqueeze(0)))
    totals = ranks.all_reduce_mean(torch.stack(sums).sum(dim=0))
    centers = {
        name: update_center(state.centers[name], torch.cat(rows), loss.center_momentum, ranks)
        for name, rows in zip(("cls", "patch"), zip(*means, strict=True), strict=True)
    }
    return {**dict(zip(weights, totals)), "total": totals.sum()}, torch.cat(features), centers
