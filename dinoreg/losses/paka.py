"""Patch-level kernel alignment (PaKA, arXiv 2509.05606): patches relate to one another as they do in another crop.

The student sees a local crop, the teacher a global one in which it lies, undistorted. What is aligned are the kernels
of their patches at the same places, and not the features. A departure from the paper: no head stands before the
kernels, and the crops are those of the other losses, of which only pairs that overlap as much as the paper's count.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_OVERLAP = 0.9  # share of a local crop that lies in the global one


def paka_loss(patches: Tensor, anchors: Tensor, places: Tensor, num_pairs: Tensor) -> Tensor:
    """The mean of `cka_distance` over the pairs of a local and a global crop that overlap.

    patches    (L·B·N, D)       all patches of L local crops of B images, crop-major, of the student, after the final
                                norm; only they get a gradient
    anchors    (2B, M, D)       of the global crops, rows of view 1 first, of the teacher
    places     (2, L, B, 2, 3)  where the local crops lie in the global ones, see `data.crops.places`
    num_pairs  ()               divisor. For a part of a batch: the mean number of pairs of all parts, so that the mean
                                over the parts is the loss of the batch
    returns    ()               float32 (float64 for float64 patches); in [0, 1], 0 without pairs
    """
    with torch.autocast(patches.device.type, enabled=False):
        local = patches.unflatten(0, (places.shape[1] * places.shape[2], -1))  # (L·B, N, D)
        sums = []
        for view, seen in enumerate(anchors.detach().chunk(2)):
            there, inside = read_at(seen, places[view], round(local.shape[1] ** 0.5))
            sums.append((cka_distance(local, there, inside) * overlapping(places[view]).flatten()).sum())
        return torch.stack(sums).sum() / num_pairs.clamp(min=1e-6)


def overlapping(places: Tensor) -> Tensor:
    """Whether at least `LEAST_OVERLAP` of a crop's area lies in the other crop.

    places   (..., 2, 3)
    returns  (...) bool
    """
    centre, half = places[..., 2], places[..., :2].abs().sum(dim=-1)  # boxes stay upright: turns are by quarters
    shared = (centre + half).clamp(max=1) - (centre - half).clamp(min=-1)
    return (shared.clamp(min=0) / (2 * half)).prod(dim=-1) >= LEAST_OVERLAP


def read_at(patches: Tensor, places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Patches of square crops, read bilinearly at the centres of the patches of other crops of the same image.

    patches  (B, M, D)
    places   (L, B, 2, 3)      where L other crops of each image lie in it
    side                       patches a side of these other crops
    returns  (L·B, side², D)   float32; beyond a crop's border the nearest place in it
             (L·B, side²) bool, whether a centre is in the crop
    """
    crops, images = places.shape[:2]
    grid = F.affine_grid(places.flatten(0, 1), [crops * images, 1, side, side], align_corners=False)
    inside = (grid.abs() <= 1).all(dim=-1).flatten(1)
    grid = grid.unflatten(0, (crops, images)).transpose(0, 1).flatten(1, 2)  # (B, L·side, side, 2)
    square = patches.float().mT.unflatten(2, (round(patches.shape[1] ** 0.5), -1))  # (B, D, m, m)
    read = F.grid_sample(square, grid, padding_mode="border", align_corners=False)  # (B, D, L·side, side)
    return read.unflatten(2, (crops, side)).permute(2, 0, 3, 4, 1).flatten(0, 1).flatten(1, 2), inside


def cka_distance(patches: Tensor, anchors: Tensor, inside: Tensor) -> Tensor:
    """One minus the centred kernel alignment of two sets of patches, the cosine of their centred linear kernels.

    patches  (n, N, D)    only they get a gradient
    anchors  (n, N, D')   at the same places
    inside   (n, N) bool  the places that count
    returns  (n,)         float32 (float64 for float64 patches); in [0, 1], 1 where a kernel is zero
    """
    dtype, kernels = torch.promote_types(patches.dtype, torch.float32), []
    weight = inside[..., None].to(dtype)
    for tokens in (patches, anchors.detach()):
        counted = tokens.to(dtype) * weight
        mean = counted.sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        centred = counted - mean * weight
        kernels.append((centred @ centred.mT).flatten(1))  # H X Xᵀ H
    own, held = kernels
    return 1 - F.cosine_similarity(own, held)
