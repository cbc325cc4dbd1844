"""`dinoreg embed`: the features of a folder, list or archive of images in one file, with their paths.

One batch is in memory at a time, and a killed embed resumes where it stopped (`feature_file.py`). Unreadable images are
left out, counted and listed beside the output.
"""

import contextlib
import math
import signal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinoreg.commands.options import EmbedOptions
from dinoreg.config.overwrite import check_folder
from dinoreg.data.center_crop import to_encoder
from dinoreg.data.decode import BadImage
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.source import Source
from dinoreg.data.statistics import survey
from dinoreg.data.value_range import ValueRange
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.backbones.open import open_encoder
from dinoreg.export.feature_file import SUFFIXES, RowFile, import_pyarrow, skipped_list
from dinoreg.runtime.device import pick_device, pick_precision
from dinoreg.runtime.errors import Interrupted, RunError, UserError, reworded
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.progress import show_progress
from dinoreg.visualize.subject import multiples, open_images


def embed(options: EmbedOptions) -> Path:
    """Write the features of all images to options.out and return its path.

    raises  UserError, before anything is written, for wrong options or data and for an output that exists
            RunError when no image can be read, a feature is not finite or the disk is full
            Interrupted after Ctrl-C; the same call resumes
    """
    out = Path(options.out)
    _check_out(out, options.overwrite)
    if out.suffix == ".parquet":
        import_pyarrow(out)
    source = open_images(options.data, "data", options.columns)
    device = pick_device(options.device)
    encoder = open_encoder(options.weights, device, pick_precision(options.precision, device)).encoder
    preprocessing = encoder.preprocessing.at(options.image_size)
    given, size = ValueRange.of(options.range), preprocessing.size
    source.value_range = given or preprocessing.value_range
    whose = "the range of the weights," if given is None else "range"
    for warning in survey(source, encoder.in_channels, whose=whose, key="range").warnings:
        print_status(f"warning: {warning}")
    if options.image_size and options.image_size % encoder.patch_size:
        raise UserError(f"image_size={options.image_size}: {multiples(options.image_size, encoder.patch_size)}")
    settings = {
        "weights": encoder.name,
        "identity": encoder.identity,
        "data": source.fingerprint(),
        "token": options.token,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "short_side": preprocessing.short_side,
        "interpolation": preprocessing.interpolation,
        "range": source.value_range,
        "precision": str(encoder.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
    }
    shape = row_shape(options.token, encoder, size)
    with reworded(f"out={out}: cannot be written", OSError, into=RunError):
        rows = RowFile(out, settings, shape, options.dtype, len(source), restart=options.overwrite)
        with contextlib.closing(rows):
            try:
                _extract(rows, source, encoder, preprocessing, options)
            except KeyboardInterrupt:
                rows.note()
                done = f"interrupted after {rows.next:,} of {len(source):,} images; the same command goes on"
                raise Interrupted(done, signal.SIGINT) from None
        if not rows.count:
            name, reason = rows.skipped[0]
            raise RunError(f"data: none of the {len(source):,} images could be read; the first: {name}: {reason}")
        names = (source.name(index) for index in range(len(source)) if index not in rows.skipped)
        rows.finish(names, {**settings, "patch_size": encoder.patch_size, "skipped": len(rows.skipped)})
    left_out = f"; {len(rows.skipped):,} left out, listed in {skipped_list(out)}" if rows.skipped else ""
    counts = f"{rows.count:,} images, {' x '.join(map(str, shape))} numbers each{left_out}"
    print_status(f"embed by {encoder.name}: {counts}")
    return out


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise UserError(f"out={out}: expected the name of a file that ends in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise UserError(f"out={out}: is a folder, expected a file")
    if out.exists() and not overwrite:
        raise UserError(f"out={out}: is finished already; use overwrite=true to write it anew")
    for path in out.parents:
        check_folder(path, f"out={out}: {path}")


def row_shape(token: str, encoder: Encoder, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of one image's features: (D,), (2D,) for token "cls+mean", (N, D) for "patches".

    size  (height, width) of the image in pixels
    """
    if token == "patches":
        return math.prod(encoder.grid(*size)), encoder.dim
    return ((2 if token == "cls+mean" else 1) * encoder.dim,)


def _extract(
    rows: RowFile, source: Source, encoder: Encoder, preprocessing: Preprocessing, options: EmbedOptions
) -> None:
    """Append all features. Batches are cut by source index, readable or not, so that a resumed file is identical."""

    def read(index: int) -> Tensor | str:
        try:
            return preprocessing.crop(source.decode(index, encoder.in_channels))
        except BadImage as error:
            return str(error)

    total, start = len(source), rows.next
    if start:
        print_status(f"embed: going on after {start:,} of {total:,} images")
    images = show_progress(parallel(read, range(start, total), options.workers), total - start, "embed", "images")
    for first in range(start, total, options.batch_size):
        batch = range(first, min(first + options.batch_size, total))
        readable: dict[int, Tensor] = {}
        for index, image in zip(batch, images):
            if isinstance(image, str):
                rows.skip(index, source.name(index), image)
            else:
                readable[index] = image
        if readable:
            values = features(encoder, to_encoder(list(readable.values())), options.token, options.dtype)
            _check_finite(values, source, list(readable), options.dtype)
            rows.append(values)
        rows.reached(batch.stop)


def features(encoder: Encoder, images: Tensor, token: str, dtype: str = "float32") -> np.ndarray:
    """Features of a batch, from the tokens after the final norm.

    images  (B, C, H, W) uint8, or float32 in 0..1
    token   "cls" | "mean" (of the patches) | "cls+mean" | "patches"
    dtype   "float32" | "float16"; too large numbers become infinite
    returns (B, *row_shape)
    """
    tokens = encoder.tokens(images)
    if token == "patches":
        values = tokens.patches
    else:
        parts = {"cls": tokens.cls, "mean": tokens.patches.mean(dim=1)}
        values = torch.cat([parts[name] for name in token.split("+")], dim=1)
    with np.errstate(over="ignore"):  # what does not fit into float16 is found below, with its name
        return values.cpu().numpy().astype(dtype)


def _check_finite(values: np.ndarray, source: Source, indices: list[int], dtype: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if len(bad):
        hint = "; dtype=float32 holds larger numbers" if dtype == "float16" else ""
        raise RunError(f"{source.name(indices[int(bad[0])])}: its feature is not finite{hint}")
