"""What the batches of a run look like: order, copies, pixels and masks, for the diagnoses of `health`.

Nothing is measured that would slow a step: numbers of images and masks are on the host, files are compared while the
first images are read, and of the pixels of a step one sum over a few of them is taken.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinoreg.data.loader import Batch
from dinoreg.distributed.process_group import Ranks
from dinoreg.runtime.device import per_channel

_EVERY = 7  # pixels of a crop that are looked at in each step, along both sides
_LIMIT = 1 / 512  # of the range of values: nearer to black or white is at its end


class DataWatch:
    """Follows the batches of this process; `summarise` is called by all processes together.

    mean, std  by which crops are normalised, one number or one for each channel, on a range of 0 to 1
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], ranks: Ranks) -> None:
        self.mean, self.std, self.ranks = mean, std, ranks
        self._known: dict[int, int] = {}  # checksum of a file: the first image that had it
        self._compared = self._copies = 0
        self._last: Tensor | None = None  # of the step before
        self._clear()

    def _clear(self) -> None:
        self._sums: list[Tensor] = []
        self._neighbours = self._pairs = self._hidden = self._patches = 0

    def observe(self, batch: Batch) -> None:
        """Add one batch; does not wait for the device."""
        ids = batch.sample_ids
        self._neighbours += int(np.count_nonzero(np.diff(ids) == 1))
        self._pairs += len(ids) - 1
        self._hidden += int(batch.hidden.sum())
        self._patches += int(np.count_nonzero(batch.hidden)) * batch.mask.shape[1]
        for number, checksum in zip(ids.tolist(), batch.checksums.tolist()):
            self._copies += self._known.setdefault(checksum, number) != number
            self._compared += 1
        self._sums.append(batch.global_crops[:, 0, ::_EVERY, ::_EVERY].sum())

    def summarise(self, batch: Batch) -> dict[str, float]:
        """What was seen since the last call, and the pixels of `batch`; waits for the device.

        returns  in_order, the share of images drawn right after the one before them in the data; copies, the share of
                 the first images whose file is that of another; stale_steps, steps whose pixels are those of the step
                 before, on the process `stale_rank` that has most; masked, the share of patches hidden in crops with
                 hidden ones; pixel_mean, of the normalised channel that is farthest from 0; pixel_low
                 and pixel_high, the darkest and the brightest value on a range of 0 to 1; pixel_limits, the share of
                 values at either end of it. Pixels are those of rank 0
        """
        crops = batch.global_crops
        sums = torch.stack([*([] if self._last is None else [self._last]), *self._sums])
        self._last = self._sums[-1]
        stale = (sums[1:] == sums[:-1]).sum()
        shares = [self._neighbours / max(1, self._pairs), self._copies / max(1, self._compared)]
        own = torch.cat([stale[None].float(), torch.tensor(shares).to(stale.device)])[None]
        steps, in_order, copies = self.ranks.gather_rows(own).T.tolist()
        mean, std = (per_channel(values, crops.device) for values in (self.mean, self.std))
        # The crops take as much memory as they are: limits are normalised, and not the crops put back.
        at_limits = ((crops < (_LIMIT - mean) / std) | (crops > (1 - _LIMIT - mean) / std)).sum() / crops.numel()
        low, high = (ends[:, None, None] * std + mean for ends in (crops.amin((0, 2, 3)), crops.amax((0, 2, 3))))
        means = crops.mean(dim=(0, 2, 3))
        pixels = torch.stack([means[means.abs().argmax()], low.min(), high.max(), at_limits])
        masked = self._hidden / max(1, self._patches)
        self._clear()
        return {
            "in_order": sum(in_order) / len(in_order),
            "copies": sum(copies) / len(copies),
            "stale_steps": max(steps),
            "stale_rank": steps.index(max(steps)),
            "masked": masked,
            **dict(zip(("pixel_mean", "pixel_low", "pixel_high", "pixel_limits"), pixels.tolist())),
        }
