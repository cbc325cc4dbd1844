"""Where the class token and each register look: the attention weights of one block, as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.models.vit import RegisterViT
from dinoreg.view.sheet import sheet, tile, to_pixels

COLOURS = "magma"


@torch.no_grad()
def attention_maps(model: RegisterViT, images: Tensor, layer: int = -1) -> Tensor:
    """The attention of the class token and the registers to the patches, averaged over heads.

    images  (B, C, H, W) normalised, on the model's device
    returns (B, 1+R, H/p, W/p) float32: the share of a token's attention that a patch gets
    """
    special = 1 + model.num_registers
    weights = model.attention(images, layer).float().mean(dim=1)  # (B, T, T)
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    return weights[:, :special, special:].unflatten(-1, grid)


def token_names(num_registers: int) -> list[str]:
    return ["CLS"] + [f"register {number + 1}" for number in range(num_registers)]


def attention_sheet(
    model: RegisterViT,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    layer: int = -1,
    height: int = 120,
) -> Image.Image:
    """One row per image: the picture, then the map of the class token and of each register (1 + 1 + R tiles).

    Every map is scaled to its own brightest patch.
    """
    pixels = to_pixels(images, mean, std)
    maps = attention_maps(model, images, layer).cpu().numpy()
    rows = []
    for picture, tokens in zip(pixels, maps):
        first = tile(picture, height)
        rows.append([first] + [tile(colour_map(each), height, first.width, smooth=False) for each in tokens])
    return sheet(rows, ["image", *token_names(model.num_registers)])


def colour_map(values: np.ndarray) -> np.ndarray:
    """values (h, w), at least 0 -> uint8 (h, w, 3), black at 0 and brightest at the maximum."""
    top = float(values.max())
    shares = values / top if top > 0 else np.zeros_like(values)
    return (matplotlib.colormaps[COLOURS](shares)[..., :3] * 255).round().astype(np.uint8)
