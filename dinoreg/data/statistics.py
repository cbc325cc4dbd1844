"""What a source of images is like: formats, sizes, bad files, duplicates, pixel statistics."""

import collections
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dinoreg.data.decode import BadImage, EncodedImage
from dinoreg.data.open import open_source
from dinoreg.data.source import Source

_PERCENTILES = (0, 5, 50, 95, 100)
_LISTED = 20  # bad files and groups of duplicates shown on the console


class _Look(NamedTuple):
    """What one image told."""

    name: str
    digest: bytes
    bad: str | None
    format: str = ""
    mode: str = ""
    height: int = 0
    width: int = 0
    sums: np.ndarray = np.zeros(3)  # of pixels in 0..1, per channel
    squares: np.ndarray = np.zeros(3)


def inspect_source(
    spec: str | os.PathLike[str] | Sequence[str],
    sample: int = 1000,
    crop_size: int = 224,
    in_channels: int = 3,
    root: str | os.PathLike[str] | None = None,
    workers: int = 4,
) -> dict[str, Any]:
    """Look at evenly spaced images of a source, decoding each in full.

    sample     images looked at, at most; 0 looks at all
    crop_size  pixels; images with a shorter side below it are counted as small
    returns    a dict of plain values: images, looked_at, formats, modes, percentiles of height, width and
               shorter_side, small, bad (name -> reason), duplicates (lists of names with equal contents),
               mean, std (per channel, of pixels in 0..1, every image weighing the same)
    raises     UserError as `open_source` does
    """
    source = open_source(spec, root=root)
    count = len(source) if sample <= 0 else min(sample, len(source))
    indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        looks = list(pool.map(lambda index: _look(source, int(index), in_channels), indices))
    good = [look for look in looks if look.bad is None]
    sides = np.array([(look.height, look.width) for look in good], dtype=np.int64).reshape(-1, 2)
    same = collections.defaultdict(list)
    for look in looks:
        if look.digest:
            same[look.digest].append(look.name)
    return {
        "source": str(spec),
        "fingerprint": source.fingerprint(),
        "images": len(source),
        "looked_at": count,
        "formats": dict(collections.Counter(look.format for look in good).most_common()),
        "modes": dict(collections.Counter(look.mode for look in good).most_common()),
        "height": _percentiles(sides[:, 0]),
        "width": _percentiles(sides[:, 1]),
        "shorter_side": _percentiles(sides.min(axis=1)),
        "crop_size": crop_size,
        "small": int((sides.min(axis=1) < crop_size).sum()),
        "bad": {look.name: look.bad for look in looks if look.bad is not None},
        "duplicates": [names for names in same.values() if len(names) > 1],
        **_normalisation(good),
    }


def _look(source: Source, index: int, in_channels: int) -> _Look:
    name, digest = source.name(index), b""
    try:
        data = source.read(index)
        digest = hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).digest()
        image = EncodedImage(data, in_channels)
        pixels = image.pixels().permute(1, 2, 0).numpy().reshape(-1, in_channels)  # (H*W, C)
    except BadImage as error:
        return _Look(name, digest, str(error))
    # Every value occurs at most 256 ways, so counting is exact and quicker than a float copy.
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T]) / len(pixels)
    levels = np.arange(256) / 255
    sums, squares = counts @ levels, counts @ levels**2
    return _Look(name, digest, None, image.format, image.mode, image.height, image.width, sums, squares)


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    found = np.percentile(values, _PERCENTILES)
    return {f"p{percentile}": round(float(value)) for percentile, value in zip(_PERCENTILES, found)}


def _normalisation(looks: list[_Look]) -> dict[str, list[float] | None]:
    if not looks:
        return {"mean": None, "std": None}
    mean = np.mean([look.sums for look in looks], axis=0)
    variance = np.mean([look.squares for look in looks], axis=0) - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return {"mean": [round(float(x), 4) for x in mean], "std": [round(float(x), 4) for x in std]}


def render_inspection(found: dict[str, Any]) -> str:
    """The findings of `inspect_source` as text for the console."""

    def shares(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"

    def spread(values: dict[str, int]) -> str:
        return "  ".join(f"{name} {value}" for name, value in values.items()) or "none"

    lines = [
        f"{found['source']}: {found['images']:,} images, {found['looked_at']:,} looked at",
        f"  formats       {shares(found['formats'])}",
        f"  channels      {shares(found['modes'])}",
        f"  height        {spread(found['height'])}",
        f"  width         {spread(found['width'])}",
        f"  shorter side  {spread(found['shorter_side'])}",
        f"  smaller than the {found['crop_size']}-pixel crop: {found['small']}",
    ]
    if found["mean"] is not None:
        mean, std = (",".join(f"{value:.4f}" for value in found[key]) for key in ("mean", "std"))
        lines.append(f"  normalise with augment.mean=[{mean}] augment.std=[{std}]")
    lines.append(f"  bad: {len(found['bad'])}")
    lines.extend(f"    {name}: {reason}" for name, reason in list(found["bad"].items())[:_LISTED])
    if len(found["bad"]) > _LISTED:
        lines.append(f"    and {len(found['bad']) - _LISTED} more")
    copies = sum(len(names) - 1 for names in found["duplicates"])
    lines.append(f"  duplicates: {copies}")
    lines.extend("    " + " = ".join(names) for names in found["duplicates"][:_LISTED])
    if len(found["duplicates"]) > _LISTED:
        lines.append(f"    and {len(found['duplicates']) - _LISTED} more groups")
    return "\n".join(lines)
