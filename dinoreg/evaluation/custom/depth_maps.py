"""Own depth: the unit of its files, which the user says, and its range, which is measured on the training part.

Whole numbers say nothing of their unit (millimetres, 1/256 m as in KITTI, …), so they need `own.depth_unit`; floats are
metres unless it says otherwise. 0, what is not finite, and the largest 16-bit number are unknown.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinoreg.evaluation.custom.pairs import Pairs, survey, training_length, turned
from dinoreg.evaluation.data import Data, DepthMaps
from dinoreg.evaluation.options import DepthOptions
from dinoreg.evaluation.readers.pixel_maps import UNREADABLE, PixelFile, read_pixels
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.regular_files import load_array

PUBLISHED = DepthOptions()
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}  # in metres
UNIT = "m, cm, mm, or a part of a metre such as 0.0002 or 1/256"
NOT_DEPTH = "disparity is not depth, focal length x baseline / disparity is"
SAMPLED = 2_000_000  # depths of a split that its range is measured by, at most
PLAUSIBLE = (1.0, 1000.0)  # metres; largest depth of floats whose unit is not given
ONE_OUTLIER, FAR = 0.999, 2.0  # a largest depth beyond FAR times this quantile is no limit


class Known(NamedTuple):
    """What is known of one depth map, in the units of its file.

    whole   whether it holds whole numbers
    share   of its pixels that are known
    low, high  of the known ones; infinite the wrong way round where there are none
    sample  (k,) known ones, evenly spaced
    """

    whole: bool
    share: float
    low: float
    high: float
    sample: np.ndarray


def depths(root: Path, pairs: Pairs, variant: str, options: Mapping[str, Any], warnings: Sequence[str] = ()) -> Data:
    """The pairs as images with depth maps in metres, once all of them have been looked at.

    variant  how they were split, in words
    options   "depth_unit": of the files; "" where it is not known
    warnings  that there are already
    raises   UserError for maps that cannot be read or do not fit their pictures, whole numbers without a unit, negative
             depths, and a split in which nothing is known or all is equally far
    """
    unit = _unit(options["depth_unit"])
    each = max(SAMPLED // max(len(images) for images, _ in pairs.values()), 16)
    seen = survey(pairs, read_depth, partial(_known, sampled=each), "depth maps")
    low, high = _range(root, seen.found, unit)
    metres = unit or 1.0
    samples = {split: np.concatenate([one.sample for one in found]) * metres for split, found in seen.found.items()}
    limit, warnings = high * metres, [*warnings, *seen.warnings]
    usual = float(np.quantile(samples["train"], ONE_OUTLIER))
    if limit > FAR * usual:
        farthest = f"up to {limit:.3g} m; depth.max_depth={_above(limit):g} counts them"
        limit = usual
        warnings.append(
            f"stray depth: 0.1% of the known depths lie beyond {_above(limit):g} m and are not counted, {farthest}"
        )
    if unit is None and not PLAUSIBLE[0] < limit <= PLAUSIBLE[1]:
        what = f"{low:.3g} to {high:.3g}, were read as metres; own.depth_unit={UNIT} says what they are"
        warnings.append(f"unit of depth: floats, {what} ({NOT_DEPTH})")
    for split, found in seen.found.items():
        if empty := sum(one.share == 0 for one in found):
            warnings.append(f"unknown depth: in {empty:,} of {len(found):,} depth maps of {split} no pixel is known")
    splits = {}
    for split, (images, truths) in pairs.items():

        def depth(index: int, split: str = split, truths: Any = truths) -> np.ndarray:
            values = known_depth(read_depth(Path(truths.name(index))).values) * np.float32(metres)
            return turned(values, int(seen.turns[split][index]))

        splits[split] = DepthMaps(images, depth, f"{truths.stamp()} {metres} {seen.turns[split].tolist()}")
    set_by_data: dict[str, float] = {"max_depth": _above(limit), "min_depth": min(PUBLISHED.min_depth, limit / 1000)}
    set_by_data |= training_length(len(seen.found["train"]), PUBLISHED.steps, PUBLISHED.batch_size)
    extra = {"warnings": warnings, "samples": samples}
    return Data(splits, (), variant, extra, options=lambda side: {**set_by_data, "min_size": side})


def read_depth(path: Path) -> PixelFile:
    """The numbers (H, W) of a depth file as they are; UserError for one that cannot be read or has no single number for
    each pixel."""
    with reworded(f"{path}: cannot be read as a depth map", *UNREADABLE):
        numbers = path.suffix.lower() == ".npy"
        pixels = PixelFile(load_array(path), "", "npy") if numbers else read_pixels(path)
    values = pixels.values
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiu" or pixels.mode == "P":
        what = f"a picture of mode {pixels.mode}" if pixels.mode else f"{values.dtype} {values.shape}"
        raise UserError(f"{path}: holds {what}, expected a depth (height, width) for each pixel; {NOT_DEPTH}")
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if known.min(initial=0) < 0:
        raise UserError(f"{path}: holds a depth of {known.min():g}, expected 0 (unknown) or more")
    return pixels._replace(values=values)


def known_depth(values: np.ndarray) -> np.ndarray:
    """Depths as float32, 0 where unknown: not finite, or the largest number of 16 and more bits."""
    if values.dtype.kind == "f":
        return np.where(np.isfinite(values), values, 0).astype(np.float32)
    largest = np.iinfo(values.dtype).max if values.dtype.itemsize > 1 else -1
    return np.where(values == largest, 0, values).astype(np.float32)


def _known(_path: Path, pixels: PixelFile, sampled: int) -> Known:
    depth = known_depth(pixels.values)
    known = depth[depth > 0]
    chosen = known[np.linspace(0, len(known) - 1, min(len(known), sampled)).astype(int)]
    low, high = float(known.min(initial=math.inf)), float(known.max(initial=-math.inf))
    return Known(pixels.values.dtype.kind != "f", len(known) / max(depth.size, 1), low, high, chosen)


def _range(root: Path, found: Mapping[str, Sequence[Known]], unit: float | None) -> tuple[float, float]:
    """Least and largest known depth of training, in the units of the files; UserError where they are no depth."""
    for split, maps in found.items():
        if not any(one.share for one in maps):
            raise UserError(f"{root}: no pixel of the depth maps of {split} is known (0 and NaN are unknown)")
    low, high = min(one.low for one in found["train"]), max(one.high for one in found["train"])
    if low == high:
        raise UserError(f"{root}: every known pixel of train has the depth {low:g}, so that there is nothing to learn")
    if unit is None and any(one.whole for maps in found.values() for one in maps):
        readings = {"mm": 0.001, "1/256": 1 / 256}
        words = [f"{name} ({low * value:.3g} to {high * value:.3g} m)" for name, value in readings.items()]
        what = f"depth files hold whole numbers from {low:g} to {high:g}, whose unit they do not say"
        hint = f"own.depth_unit={words[0]}, {words[1]}, as KITTI has it, or another part of a metre"
        raise UserError(f"{root}: {what}; expected {hint}; {NOT_DEPTH}")
    return low, high


def _unit(text: str) -> float | None:
    """Metres of `own.depth_unit`, None for ""; UserError for what is no unit."""
    if not text or text in UNITS:
        return UNITS.get(text)
    match = re.fullmatch(r"(?:1\s*/\s*(?P<of>\d+(?:\.\d+)?)|(?P<part>[\d.]+(?:e-?\d+)?))", text.lower())
    try:
        value = 0.0 if match is None else 1 / float(match["of"]) if match["of"] else float(match["part"])
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(f"own.depth_unit={text}: expected {UNIT}")
    return value


def _above(depth: float) -> float:
    """The next number of two digits above a depth."""
    step = 10.0 ** (math.floor(math.log10(depth)) - 1)
    return float(f"{(math.floor(depth / step * (1 + 1e-6)) + 1) * step:.3g}")
