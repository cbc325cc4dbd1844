"""The three leading principal components of patch tokens as red, green and blue (DINOv2 paper, figure 1).

One basis is shared by a set of images, so that one colour means the same thing in all of them. As in the paper, the
first component can set the foreground apart, whose colours then come from a basis of its own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.visualize.attention import chosen_layers
from dinoreg.visualize.gallery import GREY, ModelGallery, map_row, sheet
from dinoreg.visualize.subject import safe_name

TILE = 120  # pixels, the height of an image in the overview
COLUMNS = 8  # images side by side in it


class PatchBasis(NamedTuple):
    """Mean and axes of a set of patch tokens, and each component's range from no to full colour; float32, CPU.

    explained  the share in [0, 1] of the variance along each axis
    """

    mean: Tensor  # (D,)
    axes: Tensor  # (D, 3) orthonormal, most variance first
    low: Tensor  # (3,)
    high: Tensor  # (3,)
    explained: Tensor  # (3,)


@torch.no_grad()
def patch_basis(patches: Tensor, margin: float = 0.01) -> PatchBasis:
    """Fit the basis on patches (..., N, D), float32 on the CPU.

    Each axis points where its largest entry is positive, so the same tokens always get the same colours.

    margin  share of the patches in [0, 0.5) whose colours saturate at either end
    """
    x = patches.detach().flatten(0, -2).double().cpu()  # (n, D)
    mean, components, explained = _components(x, 3)
    signs = components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    missing = 3 - len(explained)  # of less than three dimensions
    axes, explained = F.pad(components * signs, (0, missing)), F.pad(explained, (0, missing))
    shares = torch.tensor([margin, 1 - margin], dtype=x.dtype)
    low, high = ((x - mean) @ axes).quantile(shares, dim=0)
    return PatchBasis(*(each.float() for each in (mean, axes, low, high, explained)))


def _components(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,) of x (n, D) float64, up to `count` leading principal axes (D, k), and their shares (k,) of variance."""
    mean = x.mean(dim=0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred)
    shares = values.clamp(min=0) / values.sum().clamp(min=1e-30)
    return mean, vectors.flip(1)[:, :count], shares.flip(0)[:count]


@torch.no_grad()
def foreground_mask(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The foreground of patches (B, N, D), by the threshold of their first component that separates them best (Otsu's).

    A sign has to be chosen: the foreground is the side to which the middle of the images leans against their borders.
    The images should be of one kind; among very different ones the first component separates the images instead.

    grid     rows and columns, N = rows x columns
    returns  (B, N) bool on the CPU, True in the foreground
    """
    x = patches.detach().double().cpu()
    mean, axes, _ = _components(x.flatten(0, -2), 1)
    maps = ((x - mean) @ axes[:, 0]).unflatten(1, grid)  # (B, rows, columns)
    threshold = otsu_threshold(maps.numpy())
    height, width = grid
    border, middle = torch.ones(grid, dtype=torch.bool), torch.zeros(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    middle[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    sign = 1.0 if maps[:, middle].mean() >= maps[:, border].mean() else -1.0
    return (sign * maps > sign * threshold).flatten(1)


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold of values (any shape) with the most variance between the two groups (Otsu 1979).

    It lies midway between the largest value below and the smallest above.
    """
    ordered = np.sort(values, axis=None)
    below = np.arange(1, len(ordered) + 1)  # values up to each
    above = np.maximum(len(ordered) - below, 1)
    between = (len(ordered) * ordered.cumsum() - below * ordered.sum()) ** 2 / (below * above)
    best = int(between.argmax())
    return float(ordered[best : best + 2].mean())


def patch_colours(patches: Tensor, basis: PatchBasis) -> np.ndarray:
    """Colours uint8 (B, N, 3) of patches (B, N, D)."""
    components = (patches.detach().float().cpu() - basis.mean) @ basis.axes  # (B, N, 3)
    shares = (components - basis.low) / (basis.high - basis.low).clamp(min=1e-12)
    return (shares.clamp(0, 1) * 255).round().byte().numpy()


@torch.no_grad()
def pca_sheet(model: RegisterViT, images: Tensor, pixels: np.ndarray) -> Image.Image:
    """Images above their patches in colour; the basis is fitted on these images.

    images  (B, C, H, W) normalised, on the model's device
    pixels  (B, H, W, 3) uint8, the same images to show
    """
    patches = model(images).patches
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    return overview_sheet(pixels, patch_colours(patches, patch_basis(patches)).reshape(len(images), *grid, 3))


def overview_sheet(pictures: np.ndarray, painted: np.ndarray) -> Image.Image:
    """Images above their colours, a few side by side.

    pictures  (B, H, W, 3) uint8
    painted   (B, h, w, 3) uint8
    """
    tiles = [map_row(picture, [colours], TILE) for picture, colours in zip(pictures, painted)]
    return sheet([row for first in range(0, len(tiles), COLUMNS) for row in zip(*tiles[first : first + COLUMNS])])


# ------------------------------------------------------------------------------------------------------------
# dinoreg view pca


def view_pca(*, foreground: bool, layer: str, **request: Any) -> Path:
    """Paint the patches of some images in the colours of one shared basis; returns the page's path.

    foreground  set the foreground apart by the first component, and fit the colours on it alone
    layer       index of a block, from 0 or from the end (after the final norm in any case)
    request     weights, images and the other arguments of `ModelGallery`
    raises      UserError, before anything is written, for what does not fit or exist
    """
    gallery = ModelGallery("pca", **request)
    names, grid = gallery.pictures.names, gallery.grid
    layers = chosen_layers(layer, gallery.model.depth)
    if len(layers) != 1:
        raise UserError(f"layer={layer}: expected one block")
    tokens = (gallery.model.intermediate_tokens(each[None], layers)[0] for each in gallery.pictures.images)
    patches = torch.cat([each.patches.float().cpu() for each in tokens])
    inside = foreground_mask(patches, grid) if foreground else torch.ones(patches.shape[:2], dtype=torch.bool)
    if foreground and len(inside.unique()) < 2:  # patches that are all the same have no foreground
        raise UserError("foreground=true: the patches of these images do not differ, nothing can be set apart")
    colours = patch_basis(patches[inside])
    painted = np.where(inside[..., None], patch_colours(patches, colours), np.array(GREY, dtype=np.uint8))
    painted = painted.reshape(len(names), *grid, 3)
    parts = []
    for number, (name, pixels, patch_map) in enumerate(zip(map(Path, names), gallery.pixels, painted), 1):
        both = sheet([map_row(pixels, [patch_map], gallery.size[0])])  # each patch as many whole pixels as it covers
        parts.append(gallery.picture(f"{number:02d}-{safe_name(name.stem, 40)}", both, name.stem, name.stem))
    overview = gallery.picture("all", overview_sheet(gallery.pixels, painted), "all images above their patches")
    record = {"layer": layers[0], "explained": colours.explained.tolist()}
    share = float(inside.float().mean()) if foreground else None
    whole = int((inside.all(dim=1) | ~inside.any(dim=1)).sum()) if foreground else 0
    return gallery.finish(
        "Patch colours", record, **record, overview=overview, pictures=parts, share=share, whole=whole
    )
