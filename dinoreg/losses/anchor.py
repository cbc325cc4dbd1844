"""Staying near features that are already good: the distance of a network's tokens to those of a frozen one.

Used when a run continues from weights (`init=`): what the new images say nothing about would drift, and with it
what the features were good for. The distance is one minus the cosine, blind to the length of a token, as nearest
neighbours and linear probes on normalised features are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def anchor_loss(
    cls_tokens: Tensor,
    patch_tokens: Tensor,
    anchor_cls: Tensor,
    anchor_patches: Tensor,
    num_patches: Tensor | None = None,
) -> Tensor:
    """Mean of the class tokens' and of the patch tokens' mean cosine distance, within [0, 2]; 0 where they agree.

    cls_tokens, anchor_cls        (n, D)   after the final norm; the gradient goes to the first only
    patch_tokens, anchor_patches  (m, D)   of the patches that the student sees; with m = 0 the class tokens count alone
    num_patches                   ()       what the patch tokens' distances are divided by: for a part of a batch, the
                                           mean number over all parts, so that the parts' mean is the batch's. None: m
    returns                       ()       float32 whatever the input
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        distances = [_cosine_distances(cls_tokens, anchor_cls).mean()]
        if num_patches is not None:
            distances.append(_cosine_distances(patch_tokens, anchor_patches).sum() / num_patches.clamp(min=1.0))
        elif len(patch_tokens):
            distances.append(_cosine_distances(patch_tokens, anchor_patches).mean())
        return torch.stack(distances).mean()


def _cosine_distances(tokens: Tensor, anchors: Tensor) -> Tensor:
    return 1.0 - F.cosine_similarity(tokens.float(), anchors.detach().float(), dim=-1)
