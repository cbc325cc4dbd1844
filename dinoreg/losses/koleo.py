"""The KoLeo regulariser (Sablayrolles et al., arXiv 1806.03198; DINOv2 section 4): spread the features of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean_i log of the distance between feature i and its nearest neighbour, on the unit sphere.

    features  (B, D)   the student's class tokens of ONE global view, before the head: two views of an image
                       are near by design, so views are never searched together; (V, B, D): the sum of V views
    eps                > 0; keeps norms and distances off zero
    returns   ()       float32 whatever the input or autocast (float64 for float64), always finite; in nats, lower where
                       features are farther apart

    The gradient reaches both ends of a pair. Duplicates are finite: at distance 0 a term is
    -log(eps * sqrt(D) + eps). With B < 2 there is no neighbour, and the value is 0 with a gradient of 0 (the
    reference, where a lone feature finds itself, gives the value of a duplicate).
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(dtype), dim=-1, eps=eps)
        size = x.shape[-2]
        if size < 2:
            return x.sum() * 0
        with torch.no_grad():
            similarities = x @ x.mT
            similarities.diagonal(dim1=-2, dim2=-1).fill_(-2)
            first = torch.arange(0, x[..., 0].numel(), size, device=x.device).unsqueeze(1)  # row of each view
            nearest = (similarities.argmax(dim=-1) + first).flatten()  # (V * B,)
        x = x.flatten(0, -2)
        # eps inside the norm keeps its gradient defined where two features coincide.
        return -torch.log(F.pairwise_distance(x, x[nearest], eps=eps) + eps).sum() / size
