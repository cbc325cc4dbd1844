"""The anchor loss: the cosine distance of a network's tokens to those of a frozen network.

Used when a run continues from weights (`init=`): directions of feature space that the new images do not constrain
would drift, and the features would become worse on other images. The distance is one minus the cosine; like nearest
neighbours and linear probes on normalised features it ignores the norm of a token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def anchor_loss(
    cls_tokens: Tensor, patch_tokens: Tensor, anchor_cls: Tensor, anchor_patches: Tensor, num_patches: Tensor
) -> Tensor:
    """The average of two mean cosine distances, of class tokens and of patch tokens; 0 where the networks agree.

    cls_tokens, anchor_cls        (n, D)   n > 0, after the final norm; only the first gets a gradient
    patch_tokens, anchor_patches  (m, D)   of the unmasked patches
    num_patches                   ()       divisor of the patch tokens' sum of distances (at least 1). For a part of a
                                           batch: the mean of m over all parts, so that the mean over the parts is the
                                           loss of the batch
    returns                       ()       float32 whatever the input; in [0, 2], unless num_patches differs from m
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        of_cls = _cosine_distances(cls_tokens, anchor_cls).mean()
        of_patches = _cosine_distances(patch_tokens, anchor_patches).sum() / num_patches.clamp(min=1.0)
        return torch.stack([of_cls, of_patches]).mean()


def _cosine_distances(tokens: Tensor, anchors: Tensor) -> Tensor:
    return 1.0 - F.cosine_similarity(tokens.float(), anchors.detach().float(), dim=-1)
