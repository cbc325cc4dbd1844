"""Instance discrimination by an index (DIET, arXiv 2302.10260; going on from weights by it: DIET-CP, arXiv 2509.06990).

Every image of the data is a class of its own, a linear layer on the class token names it, whatever the augmentation.
There is no teacher, no prototype and no neighbour, so a batch may be small; a class for every image suits thousands.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTHING = 0.8  # of DIET: so few views of a class must not be named with certainty


def diet_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Mean cross-entropy of the images' numbers, with label smoothing.

    logits  (n, I)        of crops, I images in the data
    images  (n,) int64    the number of each crop's image, below I
    returns ()            float32 whatever the input
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), images, label_smoothing=SMOOTHING)
