"""Telling images apart by an index: DIET (arXiv 2302.10260; going on from weights by it: DIET-CP, arXiv 2509.06990).

Every image of the data is a class of its own, which its crops have to be given. DIET learns a linear layer for that,
which needs passes over the data before it says anything to the backbone. Here it is known and fixed from the start:
the row of an image is its class token by the weights that the run begins with. There is no teacher and no prototype,
so a batch may be small; a class for every image suits some thousands.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.2  # of the cosines


def diet_loss(tokens: Tensor, seen: Tensor, images: Tensor) -> Tensor:
    """Mean cross-entropy of the images' numbers, by the cosine of a crop's class token to that of each whole image.

    Both are taken from their mean over the data: class tokens have most of their length in common.

    tokens  (n, D)        class tokens of crops
    seen    (I, D)        class tokens of all I images at the start; 0 for what could not be read
    images  (n,) int64    the number of each crop's image, below I
    returns ()            float32 whatever the input
    """
    with torch.autocast(tokens.device.type, enabled=False):
        mean = seen.mean(dim=0)
        rows = F.normalize(seen - mean, dim=-1)
        return F.cross_entropy(F.normalize(tokens.float() - mean, dim=-1) @ rows.mT / TEMPERATURE, images)
