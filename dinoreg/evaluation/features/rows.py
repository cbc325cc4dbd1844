"""Rows computed from the images of a source, in a memory-mapped file that is filled in order and resumed."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.features.images import load_batches
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.json_files import read_json


def require_finite(tokens: Tensor, names: Sequence[str], encoder: Encoder) -> None:
    """RunError naming the first image whose tokens (B, ...) are not all finite."""
    bad = (~torch.isfinite(tokens).flatten(1).all(dim=1)).nonzero()
    if len(bad):
        raise RunError(f"{names[int(bad[0])]}: its feature is not finite ({encoder.name})")


def extract_rows(
    context: Context,
    path: Path,
    encoder: Encoder,
    source: Source,
    load: Callable[[int], np.ndarray],
    compute: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    what: str,
    flush_every: int,
    note: Mapping[str, Any] | None = None,
    advice: str = "",
) -> np.ndarray:
    """What `compute` gives for every image of a source: (images, ...) of `features_dtype`, memory-mapped and
    read only.

    path         of the .npy file; a .json beside it holds `note` and how far the extraction is
    load         image -> (h, w, 3) uint8, all of one size; runs ahead in threads
    compute      batch (b, 3, h, w) of `batch_size` images -> (b, ...), one row for each image
    what         is shown beside the progress
    flush_every  rows between two notes of how far the extraction is
    advice       behind the message that the disk is full

    An extraction that was stopped goes on where it was. RunError naming the first image whose row is not finite, or
    for want of space.
    """
    noted = path.with_suffix(".json")
    done = flushed = _rows_done(path, noted)
    rows: np.ndarray | None = np.load(path, mmap_mode="r+") if done else None
    left = -(-(len(source) - done) // batch_size)
    batches = load_batches(load, range(done, len(source)), batch_size, context.workers)
    for images in context.progress(batches, left, f"{what} ({encoder.name})") if left else ():
        values = compute(images)
        require_finite(values, [source.name(done + place) for place in range(len(values))], encoder)
        if rows is None:
            shape = (len(source), *values.shape[1:])
            rows = _create(path, shape, np.dtype(context.features_dtype), what, advice)
        rows[done : done + len(values)] = values.cpu().numpy()
        done += len(values)
        if done - flushed >= flush_every or done == len(source):
            rows.flush()  # type: ignore[attr-defined]
            write_atomic(noted, json.dumps({**(note or {}), "done": done}) + "\n")
            flushed = done
    return np.load(path, mmap_mode="r")


def _rows_done(path: Path, noted: Path) -> int:
    try:
        done = int(read_json(noted)["done"])
        return done if 0 <= done <= len(np.load(path, mmap_mode="r")) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype, what: str, advice: str) -> np.ndarray:
    needed = int(np.prod(shape)) * dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        # A mapped file takes its space page by page, and a full disk would end the process without a word.
        if free < needed:
            sizes = f"need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
            raise RunError(f"{path.parent}: the {what} {sizes}{advice and f'; {advice}'}")
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    except OSError as error:
        size = f"{needed / 2**30:.1f} GiB of {what}"
        raise RunError(f"{path.parent}: cannot keep {size} ({error.strerror})") from None
