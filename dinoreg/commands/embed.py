"""`dinoreg embed` and `dinoreg.embed`: the features of a folder, list or archive of images, with their paths.

One batch is in memory at a time, and a killed embed resumes where it stopped (`feature_file.py`). Unreadable images are
left out, counted and listed beside the output.
"""

import contextlib
import math
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.commands.options import EmbedOptions
from dinoreg.config.option import read
from dinoreg.config.overwrite import check_folder
from dinoreg.data.center_crop import to_encoder
from dinoreg.data.decode import BadImage
from dinoreg.data.open import read_labelled
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.source import Source
from dinoreg.data.statistics import survey
from dinoreg.data.value_range import ValueRange
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.backbones.open import open_model
from dinoreg.export.feature_file import SUFFIXES, RowFile, import_pyarrow, read_rows, skipped_list
from dinoreg.runtime.errors import Interrupted, RunError, UserError, reworded
from dinoreg.runtime.parallel import parallel, show_progress
from dinoreg.runtime.printable import multiples, print_status
from dinoreg.visualize.subject import open_images


@dataclass(frozen=True, repr=False)
class Features:
    """What `dinoreg.embed` found, a row an image that could be read, in the order of the source.

    features     (n, D) for token "cls" or "mean", (n, 2D) for "cls+mean", (n, N, D) for "patches"
    paths        of the images, n of them
    labels       (n,) int64 numbers of `class_names`, -1 for none; None where the source is no labelled folder or table
    skipped      {path: reason} of the images that could not be read
    """

    features: np.ndarray
    paths: list[str]
    labels: np.ndarray | None
    class_names: list[str]
    skipped: dict[str, str]

    def __repr__(self) -> str:
        shape, classes = " x ".join(map(str, self.features.shape)), len(self.class_names)
        return f"<features {shape} of images; {classes} classes, {len(self.skipped):,} skipped>"


def embed(data: str | Path | Sequence[str], weights: Any, out: str | Path | None = None, **options: Any) -> Features:
    """The features of a folder, list or archive of images; the same as `dinoreg embed data=… weights=… key=value …`.

    data     a folder, an image, a list of paths, tars, scenes, or several of these
    weights  a run folder, a weight file or random:NAME, or a model of ours, timm or transformers
    out      also write them to this .safetensors or .parquet file, with which a stopped call goes on
    options  the command line's keys: token="cls+mean", dtype="float16", image_size=…, batch_size=…, columns=…
    returns  the arrays `.features` and `.labels`, and `.paths`, `.class_names`, `.skipped`
    raises   UserError (a ValueError) for wrong options or data and an `out` that exists, before anything is computed;
             RunError when no image can be read or a feature is not finite
    """
    model = None if isinstance(weights, (str, Path)) else weights
    with tempfile.TemporaryDirectory() as folder:
        named = {"data": data, "weights": weights if model is None else type(model).__name__}
        given, _ = read(EmbedOptions, {**named, "out": out or f"{folder}/features.safetensors", **options})
        rows = _write(given, model)
        features, paths = read_rows(rows.out)
        return Features(features, paths, *_labels(given, paths), dict(rows.skipped.values()))


def _labels(options: EmbedOptions, paths: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """(labels of the images (n,), names of the classes) of a labelled folder or table with one class a picture."""
    with contextlib.suppress(UserError):  # it holds no classes, or is something else
        found = read_labelled(str(options.data), root=options.root, columns=options.columns)
        if found.labels.ndim == 1:
            known = {found.source.name(row): label for row, label in enumerate(found.labels)}
            return np.array([known.get(path, -1) for path in paths], np.int64), found.class_names
    return None, []


def embed_command(options: EmbedOptions) -> Path:
    """Run `dinoreg embed`: write the features of all images to options.out and return its path; raises as `embed`."""
    rows = _write(options)
    left_out = f"; {len(rows.skipped):,} left out, listed in {skipped_list(rows.out)}" if rows.skipped else ""
    counts = f"{rows.count:,} images, {' x '.join(map(str, rows.shape))} numbers each{left_out}"
    print_status(f"embed by {rows.settings['weights']}: {counts}")
    return rows.out


def _write(options: EmbedOptions, model: Any = None) -> RowFile:
    """Write the features of all images to options.out; `model` stands for options.weights, which is then its name.

    raises  UserError, before anything is written, for wrong options or data and for an output that exists
            RunError when no image can be read, a feature is not finite or the disk is full
            Interrupted after Ctrl-C; the same call resumes
    """
    out = Path(options.out)
    _check_out(out, options.overwrite)
    if out.suffix == ".parquet":
        import_pyarrow(out)
    source = open_images(options.data, "data", options.columns, options.root)
    encoder = open_model(options.weights if model is None else model, options.device, options.precision).encoder
    preprocessing = encoder.preprocessing.at(options.image_size)
    given, size = ValueRange.of(options.range), preprocessing.size
    source.value_range = given or preprocessing.value_range
    whose = "the range of the weights," if given is None else "range"
    found = survey(source, encoder.in_channels, whose=whose, key="range")
    print_status(*(f"warning: {warning}" for warning in found.warnings))
    if options.image_size and options.image_size % encoder.patch_size:
        expected = multiples(options.image_size, encoder.patch_size)
        raise UserError(f"image_size={options.image_size}: expected {expected}")
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
    shape: tuple[int, ...] = ((2 if options.token == "cls+mean" else 1) * encoder.dim,)
    if options.token == "patches":
        shape = math.prod(encoder.grid(*size)), encoder.dim
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
    return rows


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise UserError(f"out={out}: expected the name of a file that ends in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise UserError(f"out={out}: is a folder, expected a file")
    if out.exists() and not overwrite:
        raise UserError(f"out={out}: is finished already; use overwrite=true to write it anew")
    for path in out.parents:
        check_folder(path, f"out={out}: {path}")


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
    returns (B, D), (B, 2D) for "cls+mean", (B, N, D) for "patches"
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
