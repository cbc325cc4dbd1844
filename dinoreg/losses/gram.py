"""Gram anchoring (DINOv3, arXiv 2508.10104, section 4): patches keep the relations that they had to one another.

In long runs the similarities of an image's patches decay while the class token still improves. Held are these
similarities alone, and not the features, which may go on moving together.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoreg.runtime.tiling import chunks, rows_per_chunk


def gram_loss(patches: Tensor, anchors: Tensor) -> Tensor:
    """The mean squared difference of two matrices of cosines, of the patches of an image with one another.

    patches  (n, N, D)   n, N > 0, of the student, after the final norm; only they get a gradient
    anchors  (n, N, D)   of the network that is held to, at the same places
    returns  ()          float32 (float64 for float64 patches); in [0, 4], 0 where all cosines agree
    """
    with torch.autocast(patches.device.type, enabled=False):
        dtype = torch.promote_types(patches.dtype, torch.float32)
        unit = (F.normalize(tokens.to(dtype), dim=-1) for tokens in (patches, anchors.detach()))
        return _GramDistance.apply(*unit)  # type: ignore[no-any-return, no-untyped-call]


def on_grid(patches: Tensor, side: int) -> Tensor:
    """Patches (n, M, D) of square images, resampled to a grid of `side` by `side` (bicubic) unless it is theirs.

    returns (n, side**2, D)
    """
    count = patches.shape[1]
    if count == side**2:
        return patches
    square = patches.float().transpose(1, 2).unflatten(2, (round(count**0.5), -1))
    return F.interpolate(square, (side, side), mode="bicubic").flatten(2).transpose(1, 2)


class _GramDistance(torch.autograd.Function):
    """The mean of (x xᵀ - y yᵀ)² over all images and pairs; the gradient is taken on the way, a few images at a time.

    The matrices would take more memory than the patches: they are never all there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        images, count, _ = x.shape
        total, gradient = x.new_zeros(()), torch.empty_like(x)
        for rows in chunks(0, images, rows_per_chunk(count**2, x.device)):
            difference = x[rows] @ x[rows].mT
            difference.baddbmm_(y[rows], y[rows].mT, alpha=-1)
            total += difference.square().sum()
            torch.bmm(difference, x[rows], out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total / (images * count**2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        images, count, _ = gradient.shape
        return gradient * (grad * (4 / (images * count**2))), None
