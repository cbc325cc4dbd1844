"""Frozen features, extracted once: a memory-mapped file per (weights, images, crop, blocks), whole or resumable.

A row holds the class token after each of the asked blocks and, last, the mean patch token: (slots, D).
The file's key is a hash over everything that shapes its numbers, so that another model, image or crop never meets it.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.evaluation.features.rows import extract_rows

FLUSH_ROWS = 4096  # rows written between notes of how far the extraction is


def extract_features(
    context: Context,
    encoder: Encoder,
    source: Source,
    transform: Callable[[Image.Image], np.ndarray],
    blocks: Sequence[int] = (-1,),
    mean_patch: bool = False,
    what: str = "features",
) -> np.ndarray:
    """The features of every image of a source, in order; from disk where they are, else extracted and kept.

    transform   RGB image -> (h, w, 3) uint8; its repr is part of the key
    blocks      whose class tokens are wanted, ascending, from 0 or from the end
    mean_patch  append the mean patch token of the last of them, where the encoder's has the class token's width
    returns     (n, slots, D) of the context's `features_dtype`, memory-mapped and read only

    An extraction that was stopped goes on where it was. Raises RunError naming the first image whose feature is
    not finite, UserError naming an image that cannot be read.
    """
    mean_patch = mean_patch and encoder.pools
    numbers = [encoder.block(each) for each in blocks]
    key = {
        "weights": encoder.identity,
        "images": source.stamp(),
        "count": len(source),
        "crop": repr(transform),
        "slots": (*(f"cls{number}" for number in numbers), *(("mean",) if mean_patch else ())),
        "dtype": context.features_dtype,
        "precision": str(encoder.dtype).removeprefix("torch."),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return extract_rows(
        context,
        context.features / f"{name}.npy",
        encoder,
        source,
        lambda index: transform(read_rgb(source, index)),
        lambda images: slots(encoder, images, numbers, mean_patch),
        batch_size=context.batch_size,
        what=what,
        flush_every=FLUSH_ROWS,
        note=key,
    )


def slots(encoder: Encoder, images: Tensor, blocks: Sequence[int], mean_patch: bool) -> Tensor:
    """Class tokens after some blocks and, if wanted, the last one's mean patch token: (b, slots, D) float32."""
    layers = encoder.layers(images, blocks)
    pooled = [layers[-1].patches.mean(dim=1)] if mean_patch else []
    return torch.stack([*(tokens.cls for tokens in layers), *pooled], dim=1)


def feature_matrix(rows: np.ndarray) -> Tensor:
    """All slots side by side, (n, slots D) of the type on disk; over the array's own memory, which is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that it may not write to
        return torch.from_numpy(np.asarray(rows.reshape(len(rows), -1)))
