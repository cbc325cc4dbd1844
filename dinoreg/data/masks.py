"""Which patches of a global crop the student does not see (iBOT section 3, BEiT's block-wise masking).

Half of the crops get a mask of overlapping rectangles, the others none. The hidden share is stratified
over the masked crops of a step, so every batch has light and heavy masks. All draws are keyed by (seed,
step, crop): a process that needs some crops of a step computes the masks of these only.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dinoreg.config.view_settings import MaskSettings
from dinoreg.data.rng import generator
from dinoreg.runtime.errors import UserError

_TRIES = 10  # rectangles tried before a mask is left short of its target
_STREAM = 0x6D61736B73  # names this use of the seed, "masks"
_ASSIGNMENT = 1 << 63  # the crop number, out of reach of real ones, under which the assignment is drawn


def block_masks(
    seed: int,
    step: int,
    num_crops: int,
    grid: tuple[int, int],
    settings: MaskSettings,
    first: int = 0,
    count: int | None = None,
    process: int = 0,
) -> np.ndarray:
    """Masks for the crops first..first+count of a step that has num_crops global crops over all processes.

    seed, step    >= 0; with the crop's number and `process` they determine its mask
    grid          (rows, columns) of patches, N = rows * columns
    settings      .probability: int(num_crops * probability) crops, drawn at random, get a mask; the others get none
                  .ratio: range of the hidden share: masked crop i of n draws from the i-th of n equal parts of it
                  .min_patches: smallest rectangle; a rectangle that completes a mask may be smaller
                  .by_process: what a caller means by the step's crops, those of one process
                  .aspect: rectangles are between `aspect` and 1 / `aspect` times as high as wide
    process       whose crops the step's are, where each process draws masks for its own alone
    returns       (count, N) bool, True = hidden; at most int(N * share) in a crop, a few less where no
                  further rectangle fits
    """
    height, width = grid
    if height < 1 or width < 1:
        raise UserError(f"mask grid is {grid}; expected at least one row and one column of patches")
    count = num_crops - first if count is None else count
    if not 0 <= first <= first + count <= num_crops:
        raise UserError(f"mask rows {first} to {first + count} asked for; the step has {num_crops} crops")
    # The n equal ranges of the hidden share lie between n + 1 edges, one range for each of the n masked crops.
    # Crop c draws from range stratum[c]; a number from n up leaves it unmasked.
    edges = np.linspace(*settings.ratio, int(num_crops * settings.probability) + 1)
    stratum = generator(seed, _STREAM, _ASSIGNMENT, step, process).permutation(num_crops)
    masks = np.zeros((count, height, width), dtype=bool)
    for row, mask in enumerate(masks):
        i = stratum[first + row]
        if i < len(edges) - 1:
            rng = generator(seed, _STREAM, first + row, step, process)
            share = edges[i] + (edges[i + 1] - edges[i]) * rng.random()
            _hide_blocks(mask, int(height * width * share), settings, rng)
    return masks.reshape(count, height * width)


def _hide_blocks(mask: np.ndarray, target: int, settings: MaskSettings, rng: np.random.Generator) -> None:
    """Hide rectangles of `mask` (rows, columns) up to `target` cells or until ten tries in a row fail."""
    height, width = mask.shape
    min_patches, log_aspect = settings.min_patches, math.log(settings.aspect)
    max_patches = height // 2 * width  # that one rectangle may add
    hidden = 0
    while hidden < target:
        room = min(target - hidden, max_patches)
        for _ in range(_TRIES):
            u_area, u_aspect, u_top, u_left = rng.random(4).tolist()
            # With less room than min_patches the range runs downwards: smaller rectangles complete the mask.
            area = min_patches + (room - min_patches) * u_area
            half_log = (0.5 - u_aspect) * log_aspect  # log of the square root of height / width
            side = math.sqrt(area)
            h, w = round(side * math.exp(half_log)), round(side * math.exp(-half_log))
            if h >= height or w >= width:
                continue
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            box = mask[top : top + h, left : left + w]
            new = h * w - int(np.count_nonzero(box))
            if 0 < new <= room:
                box[...] = True
                hidden += new
                break
        else:
            return


def mask_tensors(mask: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """The masked patches as a list, for gathering tokens and for the patch loss.

    mask     (C, N) bool   on the CPU, where counting the masked patches stalls no device
    returns  indices (M,) int64 into the C*N flattened patches, rising; weights (M,) float32, 1 / (number of
             masked patches of that crop), so that the weights of a masked crop sum to 1. M may be 0
    """
    hidden = torch.as_tensor(mask)
    counts = hidden.sum(dim=-1, dtype=torch.int64)  # (C,)
    indices = hidden.flatten().nonzero().squeeze(-1)
    weights = counts.clamp_min(1).float().reciprocal().repeat_interleave(counts)
    return indices, weights
