"""The three leading principal components of patch tokens as red, green and blue (DINOv2 paper, figure 1).

One basis is shared by a set of images, so that one colour means the same thing in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.models.vit import RegisterViT
from dinoreg.view.sheet import sheet, tile, to_pixels


class PatchBasis(NamedTuple):
    """Centre and axes of a set of patch tokens, and each component's range from no colour to full colour."""

    mean: Tensor  # (D,)
    axes: Tensor  # (D, 3) orthonormal, most variance first
    low: Tensor  # (3,)
    high: Tensor  # (3,)


@torch.no_grad()
def patch_basis(patches: Tensor, margin: float = 0.01) -> PatchBasis:
    """Fit the basis on patches (B, N, D); colours saturate for `margin` of the patches at either end.

    Each axis points where its largest entry is positive, so the same tokens always get the same colours.
    """
    x = patches.detach().flatten(0, -2).double().cpu()  # (n, D)
    mean = x.mean(dim=0)
    _, _, components = torch.linalg.svd(x - mean, full_matrices=False)
    axes = x.new_zeros(x.shape[1], 3)
    kept = components[:3].mT  # (D, up to 3)
    signs = kept.gather(0, kept.abs().argmax(dim=0, keepdim=True)).sign()
    axes[:, : kept.shape[1]] = kept * signs
    shares = torch.tensor([margin, 1 - margin], dtype=x.dtype)
    low, high = ((x - mean) @ axes).quantile(shares, dim=0)
    return PatchBasis(mean.float(), axes.float(), low.float(), high.float())


def patch_colours(patches: Tensor, basis: PatchBasis) -> np.ndarray:
    """patches (B, N, D) -> uint8 (B, N, 3)."""
    components = (patches.detach().float().cpu() - basis.mean) @ basis.axes  # (B, N, 3)
    shares = (components - basis.low) / (basis.high - basis.low).clamp(min=1e-12)
    return (shares.clamp(0, 1) * 255).round().byte().numpy()


@torch.no_grad()
def pca_sheet(
    model: RegisterViT, images: Tensor, mean: Sequence[float], std: Sequence[float], height: int = 120
) -> Image.Image:
    """Images (B, C, H, W) above their patches in colour, one column per image (2 B tiles)."""
    patches = model(images).patches
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    colours = patch_colours(patches, patch_basis(patches)).reshape(len(images), *grid, 3)
    pictures = [tile(each, height) for each in to_pixels(images, mean, std)]
    painted = [tile(each, height, above.width, smooth=False) for each, above in zip(colours, pictures)]
    return sheet([pictures, painted])
