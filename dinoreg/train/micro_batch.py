"""Parts of a batch, for steps that take less memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoreg.data.loader import Batch


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch: the global and local crops of some images (b of them), and where its rows are in the batch."""

    global_crops: Tensor  # (2b, C, H, W)
    local_crops: Tensor | None  # (L·b, C, h, w)
    mask: Tensor  # (2b, N)
    mask_indices: Tensor  # (m,) into 2b·N
    mask_weights: Tensor  # (m,)
    rows: Tensor | slice  # (2b,) rows of the whole batch's global crops
    masked_rows: Tensor | slice  # (m,) rows of the whole batch's masked patches
    images: np.ndarray  # (b,) int64, their numbers in the data
    clean_crops: Tensor | None = None  # (2b, C, H', W'), see `Batch`
    places: Tensor | None = None  # (2, L, b, 2, 3), see `Batch`


def micro_batches(batch: Batch, count: int) -> Iterator[MicroBatch]:
    """Cut a batch into `count` parts of equally many images, every view of an image in the same part.

    count  divides the number of images B
    """
    if count == 1:
        tensors = (batch.global_crops, batch.local_crops, batch.mask, batch.mask_indices, batch.mask_weights)
        yield MicroBatch(*tensors, slice(None), slice(None), batch.sample_ids, batch.clean_crops, batch.places)
        return
    num_images = batch.global_crops.shape[0] // 2
    num_patches = batch.mask.shape[1]
    size = num_images // count
    crop_of_patch = batch.mask_indices // num_patches
    image_of_patch = crop_of_patch % num_images
    hidden = batch.hidden.reshape(2, count, size).sum(axis=(0, 2))  # of each part; known here, so that nobody waits
    for part in range(count):
        own = slice(part * size, (part + 1) * size)
        images = torch.arange(own.start, own.stop, device=batch.global_crops.device)
        rows = torch.cat([images, images + num_images])
        masked_rows = torch.nonzero_static(image_of_patch // size == part, size=int(hidden[part]))[:, 0]
        own_row = image_of_patch[masked_rows] - part * size + size * (crop_of_patch[masked_rows] // num_images)
        local_crops = None
        if batch.local_crops is not None:
            local_crops = batch.local_crops.unflatten(0, (-1, num_images))[:, own].flatten(0, 1)
        yield MicroBatch(
            batch.global_crops[rows],
            local_crops,
            batch.mask[rows],
            own_row * num_patches + batch.mask_indices[masked_rows] % num_patches,
            batch.mask_weights[masked_rows],
            rows,
            masked_rows,
            batch.sample_ids[own],
            None if batch.clean_crops is None else batch.clean_crops[rows],
            None if batch.places is None else batch.places[:, :, own],
        )


def restore(parts: list[Tensor], rows: list[Tensor | slice]) -> Tensor:
    """Put the rows of micro-batches back in the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat([row for row in rows if isinstance(row, Tensor)]).argsort()]
