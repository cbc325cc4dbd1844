"""Staying near features that are already good: the distance of a network's tokens to those of a frozen one.

Used when a run continues from weights (`init=`): what the new images say nothing about would drift, and with it
what the features were good for. The distance is one minus the cosine, blind to the length of a token, as nearest
neighbours and linear probes on normalised features are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def anchor_loss(cls_tokens: Tensor, patch_tokens: Tensor, anchor_cls: Tensor, anchor_patches: Tensor) -> Tensor:
    """Mean of the class tokens' and of the patch tokens' mean cosine distance, within [0, 2]; 0 where they agree.

    cls_tokens, anchor_cls        (n, D)   after the final norm; the gradient goes to the first only
    patch_tokens, anchor_patches  (m, D)   of the patches that the student sees; with m = 0 the class tokens count alone
    returns                       ()       float32 whatever the input
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        distances = [_cosine_distance(cls_tokens, anchor_cls)]
        if len(patch_tokens):
            distances.append(_cosine_distance(patch_tokens, anchor_patches))
        return torch.stack(distances).mean()


def _cosine_distance(tokens: Tensor, anchors: Tensor) -> Tensor:
    return 1.0 - F.cosine_similarity(tokens.float(), anchors.detach().float(), dim=-1).mean()
