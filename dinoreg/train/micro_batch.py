"""Parts of a batch, for steps that take less memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dinoreg.data.loader import Batch


@dataclass
class MicroBatch(Batch):
    """A part of a batch, the batch of some of its images (b of them), and where its rows are in the whole one."""

    rows: Tensor | slice = field(kw_only=True)  # (2b,) of the whole batch's global crops
    masked_rows: Tensor | slice = field(kw_only=True)  # (m,) of the whole batch's masked patches


def micro_batches(batch: Batch, count: int) -> Iterator[MicroBatch]:
    """Cut a batch into `count` parts of equally many images, every view of an image in the same part.

    count  divides the number of images B
    """
    if count == 1:
        yield MicroBatch(**vars(batch), rows=slice(None), masked_rows=slice(None))
        return
    num_images = batch.global_crops.shape[0] // 2
    num_patches = batch.mask.shape[1]
    size = num_images // count
    crop_of_patch = batch.mask_indices // num_patches
    image_of_patch = crop_of_patch % num_images
    hidden = batch.hidden.reshape(2, count, size)  # of each part; known here, so that nobody waits
    for part in range(count):
        own = slice(part * size, (part + 1) * size)
        images = torch.arange(own.start, own.stop, device=batch.global_crops.device)
        rows = torch.cat([images, images + num_images])
        masked_rows = torch.nonzero_static(image_of_patch // size == part, size=int(hidden[:, part].sum()))[:, 0]
        own_row = image_of_patch[masked_rows] - part * size + size * (crop_of_patch[masked_rows] // num_images)
        local_crops = batch.local_crops
        if local_crops is not None:
            local_crops = local_crops.unflatten(0, (-1, num_images))[:, own].flatten(0, 1)
        yield replace(
            MicroBatch(**vars(batch), rows=rows, masked_rows=masked_rows),
            global_crops=batch.global_crops[rows],
            local_crops=local_crops,
            mask=batch.mask[rows],
            mask_indices=own_row * num_patches + batch.mask_indices[masked_rows] % num_patches,
            mask_weights=batch.mask_weights[masked_rows],
            hidden=hidden[:, part].ravel(),
            sample_ids=batch.sample_ids[own],
            clean_crops=None if batch.clean_crops is None else batch.clean_crops[rows],
            places=None if batch.places is None else batch.places[:, :, own],
        )


def restore(parts: list[Tensor], rows: list[Tensor | slice]) -> Tensor:
    """Put the rows of micro-batches back in the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat([row for row in rows if isinstance(row, Tensor)]).argsort()]
