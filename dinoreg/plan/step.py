"""One training step outside of a run, on random pixels and masks, for tracing and for measuring."""

import numpy as np
import torch
from torch import Tensor

from dinoreg.config.load import Config
from dinoreg.config.view_settings import CropSettings
from dinoreg.data.loader import Batch
from dinoreg.data.masks import block_masks, mask_tensors
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState
from dinoreg.train.step import train_step
from dinoreg.train.tutor import Tutor, as_cut

NOW = Now(lr=1e-5, last_layer_lr=1e-5, weight_decay=0.04, momentum=0.99, teacher_temp=0.05, gram=True)


def take_step(state: TrainState, batch: Batch) -> None:
    """Take one training step on a batch, as a run would."""
    train_step(state, batch, NOW)


def random_batch(config: Config, patch_size: int, device: torch.device, tutor: Tutor | None = None) -> Batch:
    """A batch of config.batch_size images of random pixels, with masks drawn as in a run of one process.

    patch_size  pixels; it divides crops.global_size
    tutor       of the run, which may see larger crops
    """
    crops, patch_size = as_cut(tutor, config.crops, patch_size)
    grid = (crops.global_size // patch_size,) * 2
    hidden = block_masks(0, 0, 2 * config.batch_size, grid, config.mask)
    indices, weights = mask_tensors(hidden)
    mask, counts = torch.from_numpy(hidden).to(device), hidden.sum(axis=1)
    return masked_batch(config, crops, mask, indices.to(device), weights.to(device), counts)


def masked_batch(
    config: Config, crops: CropSettings, mask: Tensor, indices: Tensor, weights: Tensor, hidden: np.ndarray
) -> Batch:
    """A batch of random pixels with given masks.

    crops    as they are cut, see `as_cut`
    mask     (2B, N) bool   B = config.batch_size
    indices  (M,) int64     of the masked patches among 2B * N
    weights  (M,)           of the masked patches, see `Batch`
    hidden   (2B,) int64    masked patches of each crop
    """
    count, clean_size = config.batch_size, config.loss.clean_size(crops.global_size)
    related = config.loss.paka_weight > 0

    def pixels(rows: int, size: int) -> Tensor:
        return torch.randn(rows, config.model.crop_channels, size, size, device=mask.device)

    return Batch(
        global_crops=pixels(2 * count, crops.global_size),
        local_crops=pixels(crops.num_local * count, crops.local_size) if crops.num_local else None,
        mask=mask,
        mask_indices=indices,
        mask_weights=weights,
        hidden=hidden,
        sample_ids=np.arange(count),
        position=count,
        data_time=0.0,
        clean_crops=pixels(2 * count, clean_size) if clean_size else None,
        places=torch.eye(2, 3, device=mask.device).repeat(2, crops.num_local, count, 1, 1) if related else None,
    )
