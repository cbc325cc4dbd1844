"""One optimizer step of DINOv2: teacher targets, student losses, their gradients, and the update.

The batches of all processes are one batch: its targets, its nearest neighbours and its gradient norm are those that a
single process would compute. Sums over processes are the identity on one.

Losses and targets follow DINOv2 section 4: the teacher sees clean global crops, the student masked
global crops and clean local ones. A step computed in micro-batches has the statistics of the full batch: targets are
computed for all of it before the student starts, and KoLeo searches neighbours in all of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinoreg.data.loader import Batch
from dinoreg.distributed.process_group import Ranks
from dinoreg.losses.anchor import anchor_loss
from dinoreg.losses.centering import sinkhorn_knopp, softmax_center, update_center
from dinoreg.losses.diet import diet_loss
from dinoreg.losses.dino import dino_loss
from dinoreg.losses.gram import gram_loss, on_grid
from dinoreg.losses.ibot import ibot_loss
from dinoreg.losses.koleo import koleo_loss
from dinoreg.losses.paka import overlapping, paka_loss
from dinoreg.models.vit import ChosenTokens
from dinoreg.runtime.device import autocast
from dinoreg.train.distill import distill_backward
from dinoreg.train.micro_batch import MicroBatch, micro_batches, restore
from dinoreg.train.optimizer import clip_gradients, set_rates, update_teacher
from dinoreg.train.parallelize import Modules, reshard, without_reduction
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState


@dataclass(frozen=True)
class Targets:
    """What the student has to predict, all without gradient.

    dino     (2B, K)   rows of view 1, then of view 2; each sums to one
    ibot     (M, K')   one row per masked patch; each sums to one
    features (2B, D)   the teacher's class tokens, float32, in the order of `dino`
    centers            {"dino": (1, K), "ibot": (1, K')}, the centres for the next step; {} where they do not move

    With a tutor (see `distill_backward`) there are no prototypes, K = 0, and the features are the student's.
    """

    dino: Tensor
    ibot: Tensor
    features: Tensor
    centers: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for logging; tensors stay on the device.

    losses    {"dino_global", "dino_local", "ibot", "koleo", "diet", "anchor", "gram", "paka", "total"}, each (): as
              optimised, weights included, means over the batches of all processes; those with a weight of 0 are left
              out. With a tutor {"distill_cls", "distill_patch", "total"}
    norms     {"grad_norm_backbone", …}, each (): before clipping, of the modules with gradients
    accepted  ()  1.0, or 0.0 when loss or gradient was not finite and nothing was changed
    targets   None where no loss has any
    """

    losses: dict[str, Tensor]
    norms: dict[str, Tensor]
    accepted: Tensor
    targets: Targets | None


@dataclass(frozen=True)
class Held:
    """What tokens are held to besides targets, and what sums over a micro-batch are divided by; None: no such loss.

    anchor          the frozen backbone of loss.anchor_weight or loss.gram_weight, which sees global crops unmasked
    teacher         the teacher's backbone, which sees undistorted global crops for loss.paka_weight
    num_visible ()  the mean number of unmasked patches over all micro-batches, `num_patches` of `anchor_loss`
    num_pairs ()    the same of pairs of crops that overlap, of `paka_loss`
    """

    num_visible: Tensor
    num_pairs: Tensor
    anchor: nn.Module | None = None
    teacher: nn.Module | None = None


NOT_HELD = Held(torch.ones(()), torch.ones(()))


def project(networks: Modules, cls_tokens: list[Tensor], patch_tokens: Tensor) -> tuple[Tensor, ...]:
    """Apply the prototype heads: one call of a tied head, one call each of two untied heads.

    cls_tokens    groups of (n, D)
    patch_tokens  (m, D)
    returns       logits: (n, K) for each group, then (m, K') of the patches; K' = K for a tied head

    The result is split, not sliced: the gradient of a slice is a zero-filled copy of the full tensor.
    """
    sizes = [len(tokens) for tokens in cls_tokens]
    if "ibot_head" in networks:
        return (*networks["dino_head"](torch.cat(cls_tokens)).split(sizes), networks["ibot_head"](patch_tokens))
    return networks["dino_head"](torch.cat([*cls_tokens, patch_tokens])).split([*sizes, len(patch_tokens)])


@torch.no_grad()
def teacher_targets(state: TrainState, batch: Batch, teacher_temp: float) -> Targets:
    """The teacher's prototype assignments of both views and of the masked patches, over the whole batch.

    It sees the global crops without masks. All processes, whose batches are one batch, call together.

    teacher_temp  > 0
    """
    loss, teacher, centers, ranks = state.loss, state.teacher, state.centers, state.ranks
    parts = list(micro_batches(batch, state.optim.accumulate))
    crops, masked = [part.rows for part in parts], [part.masked_rows for part in parts]
    outputs = []
    for part in parts:
        with autocast(batch.global_crops.device, state.dtype):
            (tokens,) = teacher["backbone"]([part.global_crops], None, [part.mask_indices])
            cls_part, patch_part = project(teacher, [tokens.cls], tokens.patches)
        # A copy: a view would keep the patch tokens in memory for as long as the health checks hold the features.
        outputs.append((cls_part, patch_part, tokens.cls.float().clone()))
    cls_logits, patch_logits, features = (list(tensors) for tensors in zip(*outputs))
    cls_all, patch_all = restore(cls_logits, crops), restore(patch_logits, masked)
    next_centers = {}
    if loss.centering == "sinkhorn":
        dino = sinkhorn_knopp(cls_all, teacher_temp, loss.sinkhorn_iterations, ranks)
        ibot = sinkhorn_knopp(patch_all, teacher_temp, loss.sinkhorn_iterations, ranks)
    else:
        dino = softmax_center(cls_all, centers["dino"], teacher_temp)
        ibot = softmax_center(patch_all, centers["ibot"], teacher_temp)
        next_centers = {
            "dino": update_center(centers["dino"], cls_all, loss.center_momentum, ranks),
            "ibot": update_center(centers["ibot"], patch_all, loss.center_momentum, ranks, loss.center_by_process),
        }
    return Targets(dino, ibot, restore(features, crops), next_centers)


def student_inputs(part: MicroBatch, held: Held) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """The student backbone's input: groups of crops, their masks, and the indices of the patches that losses need.

    held      to an anchor: the unmasked patches are needed after the masked ones; to the teacher: all of local crops
    returns   three lists with one entry per group, the global crops and, if there are any, the local crops:
              images (2b, C, H, W) and (L*b, C, h, w), masks (2b, N) bool and None, patch indices (m,) and (n,) int64
    """
    patches = part.mask_indices
    if held.anchor is not None:
        visible = (~part.mask).flatten()
        patches = torch.cat([patches, torch.nonzero_static(visible, size=len(visible) - len(patches))[:, 0]])
    if part.local_crops is None:
        return [part.global_crops], [part.mask], [patches]
    local_patches = patches[:0]
    if held.teacher is not None:
        pixels = part.global_crops[:, 0].numel() // part.mask.numel()  # of a patch
        local_patches = torch.arange(part.local_crops[:, 0].numel() // pixels, device=patches.device)
    return [part.global_crops, part.local_crops], [part.mask, None], [patches, local_patches]


def student_losses(
    state: TrainState, part: MicroBatch, targets: Targets | None, held: Held = NOT_HELD, frozen: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted losses of a micro-batch, and the student's global class tokens (2b, D).

    targets  None where no loss has any
    held     what the tokens are held to besides
    frozen   no gradient goes to the backbone, only to the heads
    returns  {"dino_global", "dino_local", "ibot"} with targets, "diet", those of `held_losses`, each () float32
    """
    student, seen, temp = state.train_modules, state.seen, state.loss.student_temp
    groups, masks, patches = student_inputs(part, held)
    num_masked = len(part.mask_indices)
    with autocast(part.global_crops.device, state.dtype):
        with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
            tokens = student["backbone"](groups, masks, patches)
        global_tokens = tokens[0].cls
        masked, visible = tokens[0].patches.split([num_masked, len(patches[0]) - num_masked])
        cls_tokens = [t.cls for t in tokens]
        logits = [] if targets is None else project(student, cls_tokens, masked)
    losses = {}
    if targets is not None:
        global_logits, *local_logits, patch_logits = logits
        local_group = local_logits[0] if local_logits else None
        dino_global, dino_local = dino_loss(global_logits, local_group, targets.dino[part.rows], temp)
        ibot = ibot_loss(patch_logits, targets.ibot[part.masked_rows], part.mask_weights, len(global_tokens), temp)
        losses = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot}
    if seen is not None:
        crops, images = torch.cat(cls_tokens), torch.from_numpy(part.sample_ids).to(seen.device, non_blocking=True)
        losses["diet"] = diet_loss(crops, seen, images.repeat(len(crops) // len(images)))
    return losses | held_losses(state, part, tokens, patches[0], visible, held), global_tokens


def held_losses(
    state: TrainState, part: MicroBatch, tokens: list[ChosenTokens], indices: Tensor, visible: Tensor, held: Held
) -> dict[str, Tensor]:
    """The unweighted losses of a micro-batch to what it is held to: {"anchor", "gram", "paka"}, those that are on.

    tokens   of the student, of the global crops and, for "paka", of the local ones with all their patches
    indices  (m,) int64 of the patches in tokens[0], into 2b·N
    visible  (v, D) the last of them, which are not masked
    """
    losses: dict[str, Tensor] = {}
    loss, where = state.loss, (part.global_crops.device, state.dtype)
    if held.anchor is not None:
        crops = part.clean_crops if loss.gram_weight > 0 and loss.gram_size is not None else part.global_crops
        with torch.no_grad(), autocast(*where):
            anchored = held.anchor(crops)
        if loss.gram_weight > 0:
            own = tokens[0].patches.new_empty(part.mask.numel(), tokens[0].patches.shape[1])
            own = own.index_copy(0, indices, tokens[0].patches).unflatten(0, part.mask.shape)
            losses["gram"] = gram_loss(own, on_grid(anchored.patches, round(part.mask.shape[1] ** 0.5)))
        else:
            anchor_patches = anchored.patches.flatten(0, 1)[indices[len(part.mask_indices) :]]
            losses["anchor"] = anchor_loss(tokens[0].cls, visible, anchored.cls, anchor_patches, held.num_visible)
    if held.teacher is not None:
        assert part.places is not None
        with torch.no_grad(), autocast(*where):
            (seen,) = held.teacher([part.clean_crops])
        losses["paka"] = paka_loss(tokens[1].patches, seen.patches, part.places, held.num_pairs)
    return losses


def koleo_of_views(features: Tensor) -> Tensor:
    """KoLeo of view 1 plus KoLeo of view 2, (); the two views of an image are never compared.

    features  (2B, D)   rows of view 1 first
    """
    return koleo_loss(features.unflatten(0, (2, -1)))


def koleo_of_processes(features: Tensor, weight: float, num_ranks: int | None, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Weighted KoLeo over the images of several processes, and what this process backpropagates for it.

    features   (2B, D)  this process's class tokens, rows of view 1 first
    weight              of the loss, > 0
    num_ranks           consecutive ranks whose images are searched together for neighbours; None: all
    returns    ()       the value, the same on those processes
               (2B, D)  its gradient with respect to `features`, times the number of those processes, because the mean
                        over processes that follows divides by it
    """
    size = ranks.world_size if num_ranks is None else num_ranks
    gathered = ranks.gather_rows(features.detach().float(), size)  # (G·2B, D)
    views = gathered.unflatten(0, (size, 2, -1)).transpose(0, 1).flatten(1, 2)  # (2, G·B, D)
    views = views.contiguous().requires_grad_()
    with torch.enable_grad():
        value = weight * koleo_of_views(views.flatten(0, 1))
        (gradient,) = torch.autograd.grad(value, views)
    return value.detach(), size * gradient.unflatten(1, (size, -1))[:, ranks.rank % size].flatten(0, 1)


def held_to(state: TrainState, batch: Batch, gram: bool) -> Held:
    """What a step is held to; every process calls this.

    gram  whether `loss.gram_weight` counts by now
    """
    loss, accumulate = state.loss, state.optim.accumulate
    anchor = state.anchor if loss.anchor_weight > 0 or gram else None
    teacher, num_visible, num_pairs = None, torch.ones(()), torch.ones(())
    if anchor is not None and loss.anchor_weight > 0:
        num_visible = state.ranks.all_reduce_mean((~batch.mask).sum().float()) / accumulate
    if loss.paka_weight > 0:
        assert batch.places is not None
        teacher = state.teacher["backbone"]
        num_pairs = state.ranks.all_reduce_mean(overlapping(batch.places).sum().float()) / accumulate
    return Held(num_visible, num_pairs, anchor, teacher)


def backward(
    state: TrainState, batch: Batch, targets: Targets | None, seed: int, frozen: bool = False, gram: bool = False
) -> dict[str, Tensor]:
    """Add the gradients of the total loss to the student's; returns the weighted losses, detached.

    seed     of the networks' own randomness in this step, see `micro_batch_seed`
    frozen   no gradient goes to the backbone, only to the heads
    gram     whether `loss.gram_weight` counts by now
    returns  as `StepResult.losses`; gradients are multiplied by state.loss_scale, losses are not

    With several micro-batches KoLeo needs the class tokens of all of them: they are computed once without gradient,
    KoLeo's gradient with respect to them is taken, and each micro-batch's backward pass carries its part of it. Drop
    path draws the same samples both times because every micro-batch sets its seed again. The tokens of other processes
    take part in the same way.
    """
    loss, weights, accumulate = state.loss, state.loss.weights, state.optim.accumulate
    held = NOT_HELD if frozen else held_to(state, batch, gram)
    parts, ranks = list(micro_batches(batch, accumulate)), state.ranks
    seeds = [micro_batch_seed(seed, index, ranks.rank) for index in range(accumulate)]
    koleo, search = loss.koleo_weight > 0, (loss.koleo_weight, loss.koleo_ranks, ranks)
    alone = accumulate == 1 and ranks.world_size == 1  # then autograd sees all of KoLeo's batch
    totals: dict[str, Tensor] = {}
    koleo_gradient: Tensor | None = None
    if koleo and accumulate > 1:
        features = _class_tokens(state, parts, seeds, held)
        totals["koleo"], koleo_gradient = koleo_of_processes(features, *search)
    for index, part in enumerate(parts):
        torch.manual_seed(seeds[index])
        with without_reduction(state.train_modules, index + 1 < len(parts)):
            losses, cls_tokens = student_losses(state, part, targets, held, frozen)
            share = {name: weights[name] / len(parts) * value for name, value in losses.items() if weights[name] > 0}
            if koleo and alone:
                share["koleo"] = loss.koleo_weight * koleo_of_views(cls_tokens)
            elif koleo and accumulate == 1:
                totals["koleo"], koleo_gradient = koleo_of_processes(cls_tokens, *search)
            objective = torch.stack(list(share.values())).sum()
            if koleo_gradient is not None:
                objective = objective + (cls_tokens.float() * koleo_gradient[part.rows]).sum()
            (objective * state.loss_scale).backward()
        for name, value in share.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
    means = ranks.all_reduce_mean(torch.stack(list(totals.values())))
    totals = dict(zip(totals, means))
    totals["total"] = means.sum()
    return totals


@torch.no_grad()
def _class_tokens(state: TrainState, parts: list[MicroBatch], seeds: list[int], held: Held) -> Tensor:
    """The student's global class tokens (2B, D) float32, equal to those of the passes with gradient."""
    tokens = []
    for part, seed in zip(parts, seeds):
        torch.manual_seed(seed)
        # The local crops take part so that drop path consumes the same random numbers in both passes.
        with autocast(part.global_crops.device, state.dtype):
            tokens.append(state.student["backbone"](*student_inputs(part, held))[0].cls.float())
    return restore(tokens, [part.rows for part in parts])


def micro_batch_seed(seed: int, index: int, rank: int) -> int:
    """The seed, in 0 to 2**63 - 1, of the networks' randomness (drop path) in one micro-batch on one process.

    seed  of the step
    """
    return (seed * 1_000_003 + index + rank * 998_244_353_000) % 2**63


def train_step(state: TrainState, batch: Batch, now: Now) -> StepResult:
    """One optimizer step, which updates `state` in place; every process calls it together.

    now  the scheduled values of the step

    A step whose loss or gradient is not finite changes counters and the loss scale only. Whether it is
    finite stays on the device: AdamW, centres and EMA read the flag there, so nothing waits. While `now.backbone` is 0
    the backbone gets no gradient, so neither its learning rate nor weight decay can change it.
    """
    loss, optim, ranks = state.loss, state.optim, state.ranks
    if now.renew and loss.gram_weight > 0:
        state.renew_anchor()
    state.optimizer.zero_grad(set_to_none=True)
    seed, frozen = state.seed * 2**32 + state.step, now.backbone == 0.0
    if state.tutor is None:
        targets = teacher_targets(state, batch, now.teacher_temp) if loss.distils else None
        losses = backward(state, batch, targets, seed, frozen, now.gram)
    else:
        seeds = [micro_batch_seed(seed, index, ranks.rank) for index in range(optim.accumulate)]
        losses, features, centers = distill_backward(state, batch.global_crops, seeds, frozen)
        none = features[:, :0]
        targets = Targets(none, none, features, centers)
    for networks in (state.student, state.teacher):
        reshard(networks)
    norms = clip_gradients(state.student, optim.clip_grad, state.optimizer, state.loss_scale)
    finite = torch.stack([losses["total"].float(), *norms.values()]).isfinite().all()
    # One flag of all processes, on which skipping, saving and rolling back depend: they must not decide differently.
    accepted = 1.0 - ranks.all_reduce_max((~finite).float())

    set_rates(state.optimizer, now)
    state.optimizer.found_inf = 1.0 - accepted
    state.optimizer.step()
    moves = torch.ones_like(accepted) if optim.move_on_skip else accepted
    update_teacher(state.teacher, state.student, now.momentum, moves)
    for name, center in (targets.centers if targets else {}).items():
        finite = center.isfinite().all() if optim.move_on_skip else accepted.bool()
        state.centers[name] = torch.where(finite, center, state.centers[name])
    if state.dtype == torch.float16:
        _move_loss_scale(state, accepted)
    state.rejected = (state.rejected + 1.0) * (1.0 - accepted)
    state.step += 1
    state.position = batch.position
    return StepResult(losses, norms, accepted, targets)


def _move_loss_scale(state: TrainState, accepted: Tensor) -> None:
    """As torch.amp: halve on overflow, but down to 1 only, double after 2000 finite steps."""
    torch._amp_update_scale_(state.loss_scale, state.scale_age, 1.0 - accepted, 2.0, 0.5, 2000)
    state.loss_scale.clamp_(min=1.0)
