"""Frozen features, extracted once: a file per (weights, images, crop, blocks), whole or resumable, with its checksum.

A row holds the class token after each of the chosen blocks and, last, the mean patch token: (slots, D).
The file's key is a hash over everything that shapes its numbers: it is never read for another model, image or crop.
What a file holds beyond what is wanted, slots of other protocols or images of other folds, is passed over: protocols
that want much come before those that want a part of it.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dinoreg.checkpoint.atomic import part_name, write_atomic
from dinoreg.data.source import ChosenSource, Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.evaluation.features.images import Picture, read_picture, stack_images
from dinoreg.runtime.digest import blocks
from dinoreg.runtime.errors import RunError, reworded
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.regular_files import open_regular

FLUSH_BYTES = 1 << 26  # written between notes of how far the extraction is, unless they take SAVE_SECONDS


def extract_features(
    context: Context,
    encoder: Encoder,
    source: Source,
    transform: Callable[[Picture], np.ndarray],
    blocks: Sequence[int] = (-1,),
    mean_patch: bool = False,
    what: str = "features",
) -> np.ndarray:
    """The features of every image of a source, in order; read from the cache where they are in it, else extracted.

    transform   picture -> (h, w, C) uint8, or float32 in 0..255; its repr is part of the key
    blocks      whose class tokens are taken, ascending, from 0 or from the end
    mean_patch  append the mean patch token of the last of them, where the encoder's has the class token's width
    what        description of the work, beside the progress
    returns     (n, slots, D) of the context's `features_dtype`, memory-mapped and read only

    An interrupted extraction resumes; of images that several folds choose from, all are extracted, once. Raises
    RunError naming the first image whose feature is not finite, or where the disk is too small; UserError naming an
    image that cannot be read.
    """
    if isinstance(source, ChosenSource) and source.one_of_many:
        return extract_features(context, encoder, source.source, transform, blocks, mean_patch, what)[source.indices]
    mean_patch = mean_patch and encoder.pools
    numbers = [encoder.block(each) for each in blocks]
    wanted = [*(f"cls{number}" for number in numbers), *(("mean",) if mean_patch else ())]
    key = {
        "weights": encoder.identity,
        "images": source.stamp(),
        "count": len(source),
        "crop": repr(transform),
        "dtype": context.features_dtype,
        "precision": str(encoder.dtype).removeprefix("torch."),
        "pixels": ("as trained", source.value_range) if source.as_trained else "published",
    }
    found = _superset(context.features, _digest(key), len(source), wanted)
    if found is not None:
        return found

    def load(index: int) -> np.ndarray:
        return transform(read_picture(source, index))

    def compute(images: Tensor) -> Tensor:
        return slots(encoder, images, numbers, mean_patch)

    path, note = context.features / f"{_digest(key)}-{_digest(wanted)}.npy", {**key, "slots": wanted}
    return extract_rows(context, path, encoder, source, load, compute, what=what, note=note)


def _digest(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _superset(folder: Path, name: str, count: int, wanted: list[str]) -> np.ndarray | None:
    """The wanted slots of a file that is whole and has them side by side, (count, slots, D); None without one."""
    for noted in sorted(folder.glob(f"{name}-*.json")):
        note = read_json(noted)
        kept = note["slots"] if isinstance(note.get("slots"), list) else []
        first = kept.index(wanted[0]) if wanted[0] in kept else len(kept)
        path = noted.with_suffix(".npy")
        # A slice, unlike a list of places, stays on the disk.
        is_meant = note.get("done") == count and kept[first : first + len(wanted)] == wanted
        if is_meant and _written(path, noted, count)[0] == count:
            return np.load(path, mmap_mode="r")[:, first : first + len(wanted)]
    return None


def slots(encoder: Encoder, images: Tensor, blocks: Sequence[int], mean_patch: bool) -> Tensor:
    """Class tokens after some blocks and, with `mean_patch`, the last one's mean patch token: (b, slots, D) float32.

    images  (b, C, H, W) uint8, or float in [0, 1]
    """
    layers = encoder.layers(images, blocks)
    pooled = [layers[-1].patches.mean(dim=1)] if mean_patch else []
    return torch.stack([*(tokens.cls for tokens in layers), *pooled], dim=1)


def feature_matrix(rows: np.ndarray) -> Tensor:
    """All slots of (n, slots, D) side by side: (n, slots D) of the type on disk, in the same memory, to be read
    only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that it may not write to
        return torch.from_numpy(np.asarray(rows.reshape(len(rows), -1)))


def require_finite(tokens: Tensor, names: Sequence[str], encoder: Encoder) -> None:
    """RunError naming the first image whose tokens (B, ...) are not all finite.

    names  of the B images
    """
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
    what: str,
    batch_size: int = 0,
    note: Mapping[str, Any] | None = None,
    advice: str = "",
) -> np.ndarray:
    """What `compute` gives for every image of a source: (images, ...) of `features_dtype`, memory-mapped, read only.

    path         of the .npy file; a .json beside it holds `note` and how far the extraction is
    load         image -> (h, w, C) uint8, or float32 in 0..255, all of one size; runs ahead in threads
    compute      batch (b, C, h, w) uint8 or float32 in 0..1 -> (b, ...), a row for each image
    batch_size   images of a batch; 0: the context's
    what         is shown beside the progress
    advice       behind the message that the disk is too small
    raises       RunError naming the first image whose row is not finite, or where the disk is too small

    An interrupted extraction resumes.
    """
    noted, batch_size = path.with_suffix(".json"), batch_size or context.batch_size
    done, size, crc = _written(path, noted, len(source))
    if done == len(source):
        return np.load(path, mmap_mode="r")
    with reworded(f"{path}: the {what} cannot be written", OSError, into=RunError), contextlib.ExitStack() as stack:
        aside, file = _aside(path)
        stack.callback(_close, file)
        if aside != part_name(path):
            stack.callback(aside.unlink, missing_ok=True)
            done = size = crc = 0
        file.truncate(size)
        file.seek(size)
        first, unnoted, noted_at = done, 0, time.monotonic()
        loaded = parallel(load, range(done, len(source)), context.workers)
        batches = iter(lambda: list(islice(loaded, batch_size)), [])
        for images in context.progress(batches, -(-(len(source) - done) // batch_size), f"{what} ({encoder.name})"):
            rows = np.ascontiguousarray(compute(stack_images(images)).cpu().numpy(), dtype=context.features_dtype)
            require_finite(torch.from_numpy(rows), [source.name(done + place) for place in range(len(rows))], encoder)
            if done == first:
                _require_space(path.parent, (len(source) - done) * rows[0].nbytes, f"the {what}", advice)
            chunk = (b"" if size else _header((len(source), *rows.shape[1:]), rows.dtype)) + rows.tobytes()
            file.write(chunk)
            done, size, crc = done + len(rows), size + len(chunk), zlib.crc32(chunk, crc)
            unnoted += len(chunk)
            if unnoted >= FLUSH_BYTES or time.monotonic() - noted_at > SAVE_SECONDS or done == len(source):
                file.flush()
                os.fsync(file.fileno())
                if done == len(source):
                    os.replace(aside, path)
                if done == len(source) or aside == part_name(path):
                    state = {"done": done, "size": size, "crc32": crc}
                    write_atomic(noted, json.dumps({**(note or {}), **state}) + "\n")
                unnoted, noted_at = 0, time.monotonic()
    return np.load(path, mmap_mode="r")


def _close(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # what a full disk has refused once
        file.close()


def _written(path: Path, noted: Path, count: int) -> tuple[int, int, int]:
    """How many of `count` rows are there as they were written, the bytes of the file up to there, and their CRC-32.

    (0, 0, 0) where there are none, or the file is damaged.
    """
    note = read_json(noted)
    done, size, crc = (note.get(key) for key in ("done", "size", "crc32"))
    if not type(done) is type(size) is type(crc) is int or size < 0 or not 0 <= done <= count:
        return 0, 0, 0
    with contextlib.suppress(OSError), open_regular(path if done == count else part_name(path)) as file:
        now = os.fstat(file.fileno())
        if _checksum(Path(file.name), size, now.st_ino, now.st_mtime_ns) == crc:
            return done, size, crc
    _say_once(f"{path}: not as it was written; it is computed anew")
    return 0, 0, 0


_say_once = lru_cache(maxsize=64)(print_status)


@lru_cache(maxsize=64)
def _checksum(path: Path, size: int, inode: int, modified: int) -> int:
    """CRC-32 of the first `size` bytes of a file.

    inode, modified  of the file: while they are the same, it is read once, however many protocols ask
    """
    crc = 0
    for block in blocks(path, size=size):
        crc = zlib.crc32(block, crc)
    return crc


def _aside(path: Path) -> tuple[Path, BinaryIO]:
    """The file that becomes `path` when it is whole, open; a second process that extracts the same has one of its own.

    It is written with ordinary writes: a mapped file takes its space page by page, and a full disk ends the process
    without a word.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = part_name(path)
    # A link would lead elsewhere.
    file: BinaryIO = open(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        aside = part_name(path, str(os.getpid()))
        file = open(aside, "w+b")  # noqa: SIM115 - `extract_rows` closes them
    return aside, file


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a .npy file has before its rows."""
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _require_space(folder: Path, needed: int, what: str, advice: str) -> None:
    """RunError for a disk without room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
        raise RunError(f"{folder}: {what} {sizes}{advice and f'; {advice}'}")
