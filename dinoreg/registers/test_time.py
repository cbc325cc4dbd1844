"""Registers for a backbone that was trained without any (Jiang et al., arXiv 2506.08010, §4 and §5).

A few hidden units of the feed-forward layers ("register neurons") make a patch an outlier. When the activation that
they would have there is given to an added token of zeros instead, the large norm moves to that token and the patches
have normal norms: nothing is trained. Two departures from the paper, both for models of any kind: units are
ranked by how much more active they are at outliers than at other patches, so that one that is always active does not
count, and "largest" is by magnitude, because SwiGLU's units have a sign.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.register_neurons import output_layer
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.weights.load import rebuilt

COUNTS = (1, 2, 5, 10, 20, 50, 100)  # numbers of neurons that are tried
CLEANED = 0.1  # the search ends with the first number of neurons that leaves at most this share of the outliers


class RegisterNeuron(NamedTuple):
    """A hidden unit of a block (from 0), and how much larger its mean |activation| is at outliers than elsewhere."""

    block: int
    unit: int
    score: float


@torch.no_grad()
def register_neurons(
    model: RegisterViT, batches: Sequence[Tensor], outliers: Sequence[Tensor], last_block: int, count: int
) -> list[RegisterNeuron]:
    """The hidden units that are more active at outliers than elsewhere, best first (arXiv 2506.08010, §4).

    batches     of normalised images (B, C, H, W)
    outliers    (B, N) bool for each batch
    last_block  the block after which outliers stand out: later units react to them but do not make them
    count       of units, at most
    raises      UserError where no patch is an outlier, or none is not
    """
    width = output_layer(model.blocks[0]).in_features
    sums, counts = torch.zeros(2, last_block + 1, width, dtype=torch.float64), torch.zeros(2, 1, 1, dtype=torch.float64)
    for images, mask in zip(batches, outliers, strict=True):
        kinds = torch.stack([mask, ~mask]).to(images.device)
        counts += kinds.sum(dim=(1, 2), dtype=torch.float64).cpu().view(2, 1, 1)
        for block, hidden in enumerate(_hidden_units(model, images, last_block + 1)):
            activation = hidden.unflatten(0, (len(images), -1))[:, 1 + model.num_registers :].abs()
            sums[:, block] += torch.stack([activation[kind].sum(dim=0, dtype=torch.float64) for kind in kinds]).cpu()
    if not counts.all():
        raise UserError("test-time registers need images with outlier patches and with others")
    at, elsewhere = sums / counts
    scores = at - elsewhere  # (blocks, hidden)
    best = scores.flatten().topk(min(count, scores.numel()))
    return [RegisterNeuron(int(i) // width, int(i) % width, float(v)) for v, i in zip(best.values, best.indices)]


def with_test_time_register(
    model: RegisterViT, neurons: Sequence[RegisterNeuron], num_registers: int = 1
) -> RegisterViT:
    """The same backbone with tokens of zeros that take over the neurons' largest activation (arXiv 2506.08010, §5).

    The given model is not changed and shares its weights with the one returned, a RegisterViT with `num_registers`
    registers, whose methods work as usual and whose `architecture` has the neurons. For evaluation mode only.

    raises  UserError where the model has registers already, or a neuron does not exist
    """
    if model.num_registers:
        raise UserError(f"the model has {model.num_registers} registers; a test-time register is for one without any")
    added = {"num_registers": num_registers, "register_neurons": [(each.block, each.unit) for each in neurons]}
    return rebuilt(model, added, {"register_tokens": model.cls_token.new_zeros(1, num_registers, model.dim)})


@torch.no_grad()
def fit_test_time_register(
    model: RegisterViT,
    batches: Sequence[Tensor],
    outliers: Sequence[Tensor],
    limit: float,
    last_block: int,
    counts: Sequence[int] = COUNTS,
) -> tuple[RegisterViT, dict[str, Any]]:
    """The backbone with the fewest register neurons that remove at least nine in ten outliers, else those that remove
    most; and the search for them, fit for JSON.

    batches, outliers, last_block  as for `register_neurons`
    limit                          the norm, before the final one, above which a patch is an outlier
    counts                         numbers of neurons to try
    returns                        the model, and "neurons", "before", the share in [0, 1] of outliers without the
                                   register, and "trials", for each number of "neurons" the "share" that is left, and
                                   mean cosines to what they were, after the final norm: "cls_cosine" of the class
                                   token, "patch_cosine" of the patches that were no outliers
    raises                         UserError as `register_neurons` and `with_test_time_register`
    """
    ranked = register_neurons(model, batches, outliers, last_block, max(counts))
    plain = [(model.prenorm(images), model(images)) for images in batches]
    before = _share([tokens[:, 1:] for tokens, _ in plain], limit)
    tried: list[tuple[dict[str, Any], RegisterViT]] = []
    for count in sorted({min(count, len(ranked)) for count in counts}):
        changed = with_test_time_register(model, ranked[:count])
        share = _share([changed.prenorm(images)[:, 2:] for images in batches], limit)
        patches, classes = [], []
        for images, mask, (_, tokens) in zip(batches, outliers, plain, strict=True):
            now = changed(images)
            patches.append(F.cosine_similarity(now.patches, tokens.patches, dim=-1)[~mask.to(images.device)])
            classes.append(F.cosine_similarity(now.cls, tokens.cls, dim=-1))
        cosines = {"patch_cosine": float(torch.cat(patches).mean()), "cls_cosine": float(torch.cat(classes).mean())}
        tried.append(({"neurons": count, "share": share, **cosines}, changed))
        if share <= CLEANED * before:
            break
    best, changed = min(tried, key=lambda each: each[0]["share"])
    neurons = [neuron._asdict() for neuron in ranked[: best["neurons"]]]
    return changed, {"neurons": neurons, "before": before, "trials": [trial for trial, _ in tried]}


def _hidden_units(model: RegisterViT, images: Tensor, blocks: int) -> list[Tensor]:
    """The activations (B T, hidden) of the feed-forward layers of the first blocks, in block order."""
    hidden: list[Tensor] = []
    with ExitStack() as handles:
        for block in range(blocks):
            layer = output_layer(model.blocks[block])
            handle = layer.register_forward_pre_hook(lambda _module, inputs: hidden.append(inputs[0].detach()))
            handles.enter_context(handle)
        model(images)
    return hidden


def _share(patches: Sequence[Tensor], limit: float) -> float:
    return float(torch.cat([(part.float().norm(dim=-1) > limit).flatten() for part in patches]).double().mean())
