"""Distillation: the cosine distance of projected tokens to those of a frozen network, less the mean of the latter.

The tokens of a pretrained network have a large part in common. Without it the distance is about what tells pictures
apart, which is what nearest neighbours and linear probes see. The mean is a moving one (`centering.update_center`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distill_loss(tokens: Tensor, targets: Tensor, center: Tensor) -> Tensor:
    """The mean of one minus the cosine between tokens and targets - center, over all tokens.

    tokens   (..., D)   n > 0 tokens in all; only they get a gradient
    targets  (..., D)   of the frozen network
    center   (1, D)
    returns  ()         float32 whatever the input; in [0, 2]
    """
    with torch.autocast(tokens.device.type, enabled=False):
        centered = targets.detach().float() - center.float()
        return 1.0 - F.cosine_similarity(tokens.float(), centered, dim=-1).mean()


def resample_tokens(patches: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Patch tokens of one grid as those of another over the same picture: bilinear, antialiased where it is coarser.

    patches  (B, gh * gw, D)   float32, of the grid (gh, gw) = `grid`, row by row
    target                     (h, w), rows and columns of the new grid
    returns  (B, h * w, D)     `patches` itself where the grids agree
    """
    if grid == target:
        return patches
    image = patches.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(image, target, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
