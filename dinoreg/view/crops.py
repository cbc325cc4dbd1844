"""What the networks see: the augmented crops of a training batch, and the patches hidden from the student."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dinoreg.data.batches import Batch
from dinoreg.view.sheet import sheet, tile, to_pixels

HIDDEN = (128, 134, 144)


def hide(pixels: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
    """Paint the masked patches grey: pixels (H, W, 3) uint8, mask (N,) bool, True = hidden."""
    grid = mask.reshape(pixels.shape[0] // patch_size, pixels.shape[1] // patch_size)
    hidden = grid.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    return np.where(hidden[..., None], np.array(HIDDEN, dtype=np.uint8), pixels)


def crop_sheet(
    batch: Batch,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    num_images: int = 6,
    height: int = 104,
) -> Image.Image:
    """One row per image: each global crop as the teacher and as the student sees it, then the local crops.

    Crops keep their relative size: a local crop is drawn smaller than a global one.
    """
    size = batch.global_crops.shape[-2]
    images = len(batch.global_crops) // 2
    shown = range(min(num_images, images))
    views = to_pixels(batch.global_crops, mean, std)
    masks = batch.mask.cpu().numpy()
    locals_ = None if batch.local_crops is None else to_pixels(batch.local_crops, mean, std)
    num_local = 0 if locals_ is None else len(locals_) // images
    rows = []
    for image in shown:
        row = []
        for view in (image, images + image):
            row += [tile(views[view], height), tile(hide(views[view], masks[view], patch_size), height)]
        if locals_ is not None:
            small = max(1, round(height * locals_.shape[1] / size))
            row += [tile(locals_[crop * images + image], small) for crop in range(num_local)]
        rows.append(row)
    columns = ["global 1", "masked", "global 2", "masked"] + [f"local {i + 1}" for i in range(num_local)]
    return sheet(rows, columns)
