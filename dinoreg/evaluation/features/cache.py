"""Frozen features, extracted once: a memory-mapped file per (weights, images, crop, blocks), whole or resumable.

A row holds the class token after each of the asked blocks and, last, the mean patch token: (slots, D).
The file's key is a hash over everything that shapes its numbers, so that another model, image or crop never meets it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.features.images import still_batches
from dinoreg.evaluation.features.rows import Progress, extract_rows

FLUSH_ROWS = 4096  # rows written between notes of how far the extraction is


@dataclass(frozen=True)
class Features:
    """Rows on disk, read where they are asked for.

    rows  (n, slots, D) float32 or float16, memory-mapped and read only
    """

    rows: np.ndarray
    slots: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def cls(self, block: int = -1) -> Tensor:
        """Class tokens (n, D) of the type on disk; `block` counts the asked blocks from the end."""
        num_blocks = sum(name.startswith("cls") for name in self.slots)
        return self.tensor([num_blocks + block])

    def tensor(self, slots: Sequence[int]) -> Tensor:
        """Some slots side by side, (n, len(slots) D) of the type on disk; no copy where it is all of one slot."""
        n, _, dim = self.rows.shape
        if len(slots) == self.rows.shape[1] and list(slots) == list(range(len(slots))):
            chosen = self.rows.reshape(n, -1)
        elif len(slots) == 1:
            chosen = self.rows[:, slots[0]]
        else:
            chosen = self.rows[:, list(slots)].reshape(n, len(slots) * dim)
        return _tensor(chosen)


class FeatureStore:
    """The folder of cached features of one evaluation.

    dtype  "float32", or "float16" for half the disk: 3 decimal digits, which moves scores by hundredths of a percent
    """

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        batch_size: int = 64,
        workers: int = 0,
        progress: Progress = lambda items, _total, _what: iter(items),
    ) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.batch_size, self.workers, self.progress = batch_size, workers, progress

    def extract(
        self,
        encoder: Encoder,
        source: Source,
        transform: Callable[[Image.Image], np.ndarray],
        blocks: Sequence[int] = (-1,),
        mean_patch: bool = False,
        what: str = "features",
    ) -> Features:
        """The features of every image of a source, in order; from disk where they are, else extracted and kept.

        transform   RGB image -> (h, w, 3) uint8; its repr is part of the key
        blocks      whose class tokens are wanted, ascending, from 0 or from the end
        mean_patch  append the mean patch token of the last of them, where the encoder's has the class token's width

        An extraction that was stopped goes on where it was. Raises RunError naming the first image whose feature is
        not finite, UserError naming an image that cannot be read.
        """
        mean_patch = mean_patch and encoder.pools
        numbers = [encoder.block(each) for each in blocks]
        slots = (*(f"cls{number}" for number in numbers), *(("mean",) if mean_patch else ()))
        key = {
            "weights": encoder.identity,
            "images": source.stamp(),
            "count": len(source),
            "crop": repr(transform),
            "slots": slots,
            "dtype": self.dtype.name,
            "precision": str(encoder.dtype).removeprefix("torch."),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        rows = extract_rows(
            self.folder / f"{name}.npy",
            encoder,
            source,
            partial(still_batches, source, transform, self.batch_size, self.workers),
            lambda images: self._values(encoder, images, numbers, mean_patch),
            batch_size=self.batch_size,
            dtype=self.dtype,
            progress=self.progress,
            what=what,
            flush_every=FLUSH_ROWS,
            note=key,
        )
        return Features(rows, slots)

    @torch.no_grad()
    def _values(self, encoder: Encoder, images: Tensor, blocks: Sequence[int], mean_patch: bool) -> Tensor:
        """(b, slots, D) float32 on the CPU."""
        layers = encoder.layers(images, blocks)
        found = [tokens.cls for tokens in layers]
        if mean_patch:
            found.append(layers[-1].patches.mean(dim=1))
        return torch.stack(found, dim=1).float().cpu()


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory; torch warns about memory that it may not write to, and nothing does."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.asarray(array))
