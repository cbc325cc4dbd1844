"""The three leading principal components of patch tokens as red, green and blue (DINOv2 paper, figure 1).

One basis is shared by a set of images, so that one colour means the same thing in all of them; kept in a file, it is
shared by several checkpoints. As in the paper, the first component can set the foreground apart, whose colours then
come from a basis of its own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import RunError, UserError, reworded
from dinoreg.runtime.regular_files import open_regular
from dinoreg.visualize.attention import chosen_layers
from dinoreg.visualize.gallery import GREY, ModelGallery, map_row, sheet, tile
from dinoreg.visualize.subject import safe_name

FORMAT = "dinoreg-patch-basis"


class PatchBasis(NamedTuple):
    """Mean and axes of a set of patch tokens, and each component's range from no to full colour; float32, CPU."""

    mean: Tensor  # (D,)
    axes: Tensor  # (D, 3) orthonormal, most variance first
    low: Tensor  # (3,)
    high: Tensor  # (3,)


class Foreground(NamedTuple):
    """The split of patches into foreground (first component above a threshold) and background; float32, CPU."""

    mean: Tensor  # (D,)
    axis: Tensor  # (D,) of length one, pointing at the foreground
    threshold: Tensor  # ()


@torch.no_grad()
def patch_basis(patches: Tensor, margin: float = 0.01) -> PatchBasis:
    """Fit the basis on patches (..., N, D), float32 on the CPU.

    Each axis points where its largest entry is positive, so the same tokens always get the same colours.

    margin  share of the patches in [0, 0.5) whose colours saturate at either end
    """
    x = patches.detach().flatten(0, -2).double().cpu()  # (n, D)
    mean, components = _components(x, 3)
    axes = x.new_zeros(x.shape[1], 3)
    signs = components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    axes[:, : components.shape[1]] = components * signs
    shares = torch.tensor([margin, 1 - margin], dtype=x.dtype)
    low, high = ((x - mean) @ axes).quantile(shares, dim=0)
    return PatchBasis(mean.float(), axes.float(), low.float(), high.float())


def _components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and up to `count` leading principal axes (D, k) of x (n, D) float64."""
    mean = x.mean(dim=0)
    centred = x - mean
    if len(x) <= x.shape[1]:
        _, _, components = torch.linalg.svd(centred, full_matrices=False)
        return mean, components[:count].mT
    _, vectors = torch.linalg.eigh(centred.mT @ centred)  # far quicker where there are many patches
    return mean, vectors.flip(1)[:, :count]


@torch.no_grad()
def foreground_of(patches: Tensor, grid: tuple[int, int]) -> Foreground:
    """The split of patches (B, N, D) by their first component, at the threshold that separates them best (Otsu's).

    A sign has to be chosen: the foreground is the side to which the middle of the images leans against their borders.
    The images should be of one kind; among very different ones the first component separates the images instead.

    grid  rows and columns, N = rows x columns
    """
    x = patches.detach().flatten(0, -2).double().cpu()
    mean, axes = _components(x, 1)
    values = (x - mean) @ axes[:, 0]
    threshold = otsu_threshold(values.numpy())
    height, width = grid
    border, middle = torch.ones(grid, dtype=torch.bool), torch.zeros(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    middle[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    maps = values.reshape(-1, *grid)
    sign = 1.0 if maps[:, middle].mean() >= maps[:, border].mean() else -1.0
    return Foreground(mean.float(), (sign * axes[:, 0]).float(), torch.tensor(sign * threshold).float())


def foreground_mask(patches: Tensor, foreground: Foreground) -> Tensor:
    """(B, N) bool on the CPU of patches (B, N, D), True in the foreground."""
    return (patches.detach().float().cpu() - foreground.mean) @ foreground.axis > foreground.threshold


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """The threshold of values (n,) with the most variance between the two groups (Otsu 1979); in a gap, its middle.

    bins  of the histogram that it is searched in
    """
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    mean_above = (np.cumsum((counts * centres)[::-1]) / np.maximum(above[::-1], 1))[::-1]
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2.0
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1 + best].mean())


def patch_colours(patches: Tensor, basis: PatchBasis) -> np.ndarray:
    """Colours uint8 (B, N, 3) of patches (B, N, D)."""
    components = (patches.detach().float().cpu() - basis.mean) @ basis.axes  # (B, N, 3)
    shares = (components - basis.low) / (basis.high - basis.low).clamp(min=1e-12)
    return (shares.clamp(0, 1) * 255).round().byte().numpy()


@torch.no_grad()
def pca_sheet(model: RegisterViT, images: Tensor, pixels: np.ndarray, height: int = 120) -> Image.Image:
    """Images above their patches in colour, one column each; the basis is fitted on these images.

    images  (B, C, H, W) normalised, on the model's device
    pixels  (B, H, W, 3) uint8, the same images to show
    height  of a tile in pixels
    """
    patches = model(images).patches
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    colours = patch_colours(patches, patch_basis(patches)).reshape(len(images), *grid, 3)
    return overview_sheet(pixels, colours, len(images), height)


# ------------------------------------------------------------------------------------------------------------
# A basis in a file


def write_basis(path: Path, basis: PatchBasis, foreground: Foreground | None, source: str) -> None:
    """Save a basis, so that other images or checkpoints get the same colours; RunError where that fails.

    source  what it was fitted on, in words
    """
    tensors = {f"basis.{name}": each.contiguous() for name, each in basis._asdict().items()}
    if foreground is not None:
        tensors |= {f"foreground.{name}": each.contiguous() for name, each in foreground._asdict().items()}
    with reworded(f"basis={path}: cannot be written", OSError, into=RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, {"format": FORMAT, "fitted_on": source}))


def read_basis(path: Path, dim: int, with_foreground: bool) -> tuple[PatchBasis, Foreground | None, str]:
    """(basis, foreground or None, what it was fitted on, in words) from a file.

    dim              D of the model
    with_foreground  whether a foreground is expected
    raises           UserError for a file that is no basis, or that does not fit `dim` or `with_foreground`
    """
    whole = reworded(f"basis={path}: not a whole safetensors file", SafetensorError, OSError, ValueError)
    with whole, open_regular(path), safe_open(path, framework="pt") as file:
        stated = file.metadata() or {}
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    shapes: dict[str, Any] = {"basis.mean": (dim,), "basis.axes": (dim, 3), "basis.low": (3,), "basis.high": (3,)}
    has_foreground = any(key.startswith("foreground.") for key in tensors)
    if has_foreground:
        shapes |= {"foreground.mean": (dim,), "foreground.axis": (dim,), "foreground.threshold": ()}
    if stated.get("format") != FORMAT or tensors.keys() != shapes.keys():
        raise UserError(f"basis={path}: not a colour basis; dinoreg view pca basis=FILE writes one where FILE is not")
    for key, shape in shapes.items():
        found = tuple(tensors[key].shape)
        if found != shape or not tensors[key].isfinite().all():
            raise UserError(f"basis={path}: {key} is {found}, expected finite numbers {shape} for a width of {dim}")
    if has_foreground != with_foreground:
        fitted = str(has_foreground).lower()
        raise UserError(f"basis={path}: was fitted with foreground={fitted}; use the same, or another file")
    values = [tensors[key] for key in shapes]
    split = Foreground(*values[4:]) if has_foreground else None
    return PatchBasis(*values[:4]), split, stated.get("fitted_on", "")


# ------------------------------------------------------------------------------------------------------------
# dinoreg view pca


def view_pca(*, foreground: bool, basis: str | None, layer: str, **request: Any) -> Path:
    """Paint the patches of some images in the colours of one shared basis; returns the page's path.

    foreground  set the foreground apart by the first component, and fit the colours on it alone
    basis       a file: its basis is used where it exists, else the fitted one is saved in it
    layer       index of a block, from 0 or from the end (after the final norm in any case)
    request     weights, images and the other arguments of `ModelGallery`
    raises      UserError, before anything is written, for what does not fit or exist
    """
    gallery = ModelGallery("pca", **request)
    model, names, grid = gallery.model, gallery.pictures.names, gallery.grid
    layers = chosen_layers(layer, model.depth)
    if len(layers) != 1:
        raise UserError(f"layer={layer}: expected one block")
    file = Path(basis) if basis else None
    known = read_basis(file, model.dim, foreground) if file is not None and file.exists() else None
    tokens = (model.intermediate_tokens(each[None], layers)[0] for each in gallery.pictures.images)
    patches = torch.cat([each.patches.float().cpu() for each in tokens])
    fitted_on = f"{gallery.subject.name}, {len(names)} images"
    colours, split, origin = known or (*_fit(patches, grid, foreground), fitted_on)
    inside = torch.ones(patches.shape[:2], dtype=torch.bool) if split is None else foreground_mask(patches, split)
    painted = np.where(inside[..., None], patch_colours(patches, colours), np.array(GREY, dtype=np.uint8))
    painted = painted.reshape(len(names), *grid, 3)
    parts = []
    for number, (name, pixels, patch_map) in enumerate(zip(map(Path, names), gallery.pixels, painted), 1):
        both = sheet([map_row(pixels, [patch_map], gallery.size[0])])  # each patch as many whole pixels as it covers
        parts.append(gallery.picture(f"{number:02d}-{safe_name(name.stem, 40)}", both, name.stem, name.stem))
    overview = gallery.picture("all", overview_sheet(gallery.pixels, painted), "all images above their patches")
    if file is not None and known is None:
        write_basis(file, colours, split, origin)
    record = {"layer": layers[0], "basis": origin, "explained": explained_shares(patches[inside], colours)}
    share = float(inside.float().mean()) if foreground else None
    whole = int((inside.all(dim=1) | ~inside.any(dim=1)).sum()) if foreground else 0
    values = {"overview": overview, "pictures": parts, "share": share, "whole": whole, "known": known is not None}
    return gallery.finish("Patch colours", record, **record, **values)


def _fit(patches: Tensor, grid: tuple[int, int], foreground: bool) -> tuple[PatchBasis, Foreground | None]:
    if not foreground:
        return patch_basis(patches), None
    split = foreground_of(patches, grid)
    inside = patches[foreground_mask(patches, split)]
    if not len(inside):  # patches that are all the same have no foreground
        raise UserError("foreground=true: the patches of these images do not differ, nothing can be set apart")
    return patch_basis(inside), split


def explained_shares(patches: Tensor, basis: PatchBasis) -> list[float]:
    """The share in [0, 1] of the variance of patches (..., D) along each of the three axes of the basis."""
    x = patches.flatten(0, -2).double()
    x = x - x.mean(dim=0)
    total = float(x.square().sum())
    return [float(each) / total if total else 0.0 for each in (x @ basis.axes.double()).square().sum(dim=0)]


def overview_sheet(pictures: np.ndarray, painted: np.ndarray, columns: int = 6, height: int = 150) -> Image.Image:
    """Images above their colours, a few side by side.

    pictures  (B, H, W, 3) uint8
    painted   (B, h, w, 3) uint8
    columns   images in a row
    height    of a tile in pixels
    """
    rows = []
    for first in range(0, len(pictures), columns):
        above = [tile(each, height) for each in pictures[first : first + columns]]
        below = [tile(each, height, above[0].width, smooth=False) for each in painted[first : first + columns]]
        rows += [above, below]
    return sheet(rows)
