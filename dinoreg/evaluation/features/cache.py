"""Frozen features, extracted once: a file per (weights, images, crop, blocks), whole or resumable, with its checksum.

A row holds the class token after each of the chosen blocks and, last, the mean patch token: (slots, D).
The file's key is a hash over everything that shapes its numbers: it is never read for another model, image or crop.
What a file holds beyond what is wanted, slots of other protocols or images of other folds, is passed over: protocols
that want much come before those that want a part of it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dinoreg.checkpoint.atomic import part_name, reason, write_atomic
from dinoreg.data.source import ChosenSource, Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.evaluation.features.images import Picture, read_picture, stack_images
from dinoreg.runtime.digest import blocks
from dinoreg.runtime.errors import RunError
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
        if is_meant and _rows_done(path, noted, count)[0] == count:
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
    advice       behind the message that the disk is full
    raises       RunError naming the first image whose row is not finite, or where the disk is too small

    An interrupted extraction resumes.
    """
    noted, batch_size = path.with_suffix(".json"), batch_size or context.batch_size
    done, crc = _rows_done(path, noted, len(source))
    if done == len(source):
        return np.load(path, mmap_mode="r")
    with _in_words(f"{path}: the {what} cannot be written", advice), contextlib.ExitStack() as stack:
        aside, file = _aside(path)
        stack.callback(_close, file)
        if aside != part_name(path):
            stack.callback(aside.unlink, missing_ok=True)
            done = crc = 0
        unnoted, noted_at, left = 0, time.monotonic(), -(-(len(source) - done) // batch_size)
        loaded = parallel(load, range(done, len(source)), context.workers)
        batches = iter(lambda: list(islice(loaded, batch_size)), [])
        for images in context.progress(batches, left, f"{what} ({encoder.name})"):
            rows = np.ascontiguousarray(compute(stack_images(images)).cpu().numpy(), dtype=context.features_dtype)
            require_finite(torch.from_numpy(rows), [source.name(done + place) for place in range(len(rows))], encoder)
            if file.tell() == 0:
                _begin(file, (len(source), *rows.shape[1:]), rows.dtype, done, path.parent, f"the {what}", advice)
            file.write(rows.data)
            done, crc, unnoted = done + len(rows), zlib.crc32(rows.data, crc), unnoted + rows.nbytes
            if unnoted >= FLUSH_BYTES or time.monotonic() - noted_at > SAVE_SECONDS or done == len(source):
                file.flush()
                os.fsync(file.fileno())
                if done == len(source):
                    os.replace(aside, path)
                if done == len(source) or aside == part_name(path):
                    write_atomic(noted, json.dumps({**(note or {}), "done": done, "crc32": crc}) + "\n")
                unnoted, noted_at = 0, time.monotonic()
    return np.load(path, mmap_mode="r")


@contextlib.contextmanager
def _in_words(trouble: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{trouble} ({reason(error)}){advice and f'; {advice}'}") from error


def _close(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # what a full disk has refused once
        file.close()


def _rows_done(path: Path, noted: Path, count: int) -> tuple[int, int]:
    """How many of `count` rows are there as they were written, and their CRC-32; (0, 0) where the file is damaged."""
    note = read_json(noted)
    done, expected = note.get("done"), note.get("crc32")
    if type(done) is not int or type(expected) is not int:
        return 0, 0
    with (
        contextlib.suppress(OSError, ValueError, SyntaxError, tokenize.TokenError),
        open_regular(path if done == count else part_name(path)) as file,
    ):
        shape, dtype = _read_header(file)
        start, size, now = file.tell(), done * int(np.prod(shape[1:])) * dtype.itemsize, os.fstat(file.fileno())
        whole = dtype.kind == "f" and 0 <= done <= count == shape[0]
        if whole and _checksum(Path(file.name), start, size, dtype.str, now.st_ino, now.st_mtime_ns) == expected:
            return done, expected
    _say_once(f"{path}: not as it was written; it is computed anew")
    return 0, 0


_say_once = lru_cache(maxsize=64)(print_status)


@lru_cache(maxsize=64)
def _checksum(path: Path, start: int, size: int, dtype: str, inode: int, modified: int) -> int | None:
    """CRC-32 of the floats in `size` bytes from `start`; None where not all are finite.

    inode, modified  of the file: while they are the same, it is read once, however many protocols ask
    """
    crc = 0
    for block in blocks(path, start, size):
        if not np.isfinite(np.frombuffer(block, dtype)).all():
            return None
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


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the .npy file at whose beginning `file` stands, which is left at its first row."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _begin(
    file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, done: int, folder: Path, what: str, advice: str
) -> None:
    """Write or pass over the header, and go to where row `done` is to be written; RunError for too small a disk."""
    row = int(np.prod(shape[1:])) * dtype.itemsize
    needed, free = (shape[0] - done) * row, shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
        raise RunError(f"{folder}: {what} {sizes}{advice and f'; {advice}'}")
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.truncate(file.tell() + done * row)
    file.seek(0, os.SEEK_END)
