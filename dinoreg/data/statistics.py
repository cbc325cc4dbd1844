"""What a source of images is like: formats, sizes, bad files, duplicates, pixel statistics."""

import collections
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dinoreg.data.copies import content_digest
from dinoreg.data.decode import EncodedImage
from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.data.value_range import BadImage, RawPixels
from dinoreg.runtime.templates import render

_PERCENTILES = (0, 5, 50, 95, 100)
_LISTED = 20  # bad files and groups of duplicates shown on the console
_THREADS = 4
_VALUES = 10_000  # of a picture of more than eight bits, looked at


def inspect_source(
    spec: str | os.PathLike[str] | Sequence[str],
    sample: int = 1000,
    crop_size: int = 224,
    in_channels: int = 3,
    value_range: Sequence[float] | None = None,
    root: str | os.PathLike[str] | None = None,
    columns: str = "",
) -> dict[str, Any]:
    """Decode evenly spaced images of a source in full and describe them.

    sample       images decoded, at most; 0 decodes all
    crop_size    pixels; images with a shorter side below it are counted as small
    in_channels  channels of the model that is to see them
    value_range  LOW,HIGH as in `data.range`; without it pixels are scaled by their types
    root, columns  of a list or table, as for `open_source`
    returns    a dict of plain values: images, looked_at, formats, modes, percentiles of height, width and
               shorter_side, small, bad (name -> reason), duplicates (lists of names with equal contents),
               mean, std (per channel, of pixels in 0..1, every image weighing the same; None without images), types
               (of pixels -> images), values (least, 0.1 %, 99.9 %, greatest) and used (the share of their type's
               range) of images of more than eight bits or None, range (a suggestion for `data.range`, or None),
               passed_over (files that are no images, by ending), pages (how many in a file -> images, where more
               than one)
    raises     UserError as `open_source` does
    """
    source = open_source(spec, root=root, value_range=value_range, columns=columns)
    count = len(source) if sample <= 0 else min(sample, len(source))
    indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    with ThreadPoolExecutor(_THREADS) as pool:
        images = list(pool.map(lambda index: _describe(source, int(index), in_channels), indices))
    good = [image for image in images if "bad" not in image]
    height, width = (np.array([image[side] for image in good], dtype=np.int64) for side in ("height", "width"))
    shorter = np.minimum(height, width)
    names_of_contents = collections.defaultdict(list)
    for image in images:
        if "digest" in image:
            names_of_contents[image["digest"]].append(image["name"])
    mean = np.mean([image["mean"] for image in good], axis=0) if good else None
    variance = np.mean([image["mean_square"] for image in good], axis=0) - mean**2 if mean is not None else None
    return {
        "source": str(spec),
        "fingerprint": source.fingerprint(),
        "images": len(source),
        "looked_at": count,
        "formats": dict(collections.Counter(image["format"] for image in good).most_common()),
        "modes": dict(collections.Counter(image["mode"] for image in good).most_common()),
        "height": _percentiles(height),
        "width": _percentiles(width),
        "shorter_side": _percentiles(shorter),
        "crop_size": crop_size,
        "small": int((shorter < crop_size).sum()),
        "bad": {image["name"]: image["bad"] for image in images if "bad" in image},
        **_values(images),
        "passed_over": source.passed_over,
        "pages": dict(collections.Counter(image["pages"] for image in images if image.get("pages", 1) > 1)),
        "duplicates": [names for names in names_of_contents.values() if len(names) > 1],
        "mean": None if mean is None else mean.round(4).tolist(),
        "std": None if variance is None else np.sqrt(variance.clip(0)).round(4).tolist(),
    }


def render_inspection(statistics: dict[str, Any]) -> str:
    """The result of `inspect_source` as text for the console."""
    return render("data/templates/inspection.txt.j2", listed=_LISTED, **statistics).rstrip()


def _describe(source: Source, index: int, in_channels: int) -> dict[str, Any]:
    """One image's "name" and "digest", with "bad", the reason, where it cannot be decoded, else with its properties."""
    image: dict[str, Any] = {"name": source.name(index)}
    try:
        data = source.read(index)
        image["digest"] = content_digest(data)
        encoded = EncodedImage(data, in_channels, value_range=source.value_range)
        image |= {"type": "uint8", "pages": encoded.pages}
        if encoded.raw is not None and encoded.raw.values.dtype != np.uint8:
            image |= {"type": str(encoded.raw.values.dtype), "values": _sample(encoded.raw)}
        channels = encoded.pixels().flatten(1).numpy()  # (C, H * W)
    except BadImage as error:
        return {**image, "bad": str(error)}
    properties = {name: getattr(encoded, name) for name in ("format", "mode", "height", "width")}
    if channels.dtype == np.uint8:
        # Every value occurs at most 256 ways, so counting is exact and quicker than a float copy.
        shares = np.stack([np.bincount(channel, minlength=256) for channel in channels]) / channels.shape[1]
        levels = np.arange(256) / 255
        return {**image, **properties, "mean": shares @ levels, "mean_square": shares @ levels**2}
    scaled = channels.astype(np.float64) / 255
    return {**image, **properties, "mean": scaled.mean(1), "mean_square": (scaled**2).mean(1)}


def _sample(raw: RawPixels) -> np.ndarray:
    """Some values of a picture, from all over it, without those that say "not measured"."""
    values = raw.values.reshape(-1)
    values = values[:: max(1, len(values) // _VALUES)].astype(np.float64)
    measured = np.isfinite(values)
    return values[measured if raw.nodata is None else measured & (values != raw.nodata)]


def _values(images: list[dict[str, Any]]) -> dict[str, Any]:
    """What the pixels of more than eight bits are like, see `inspect_source`."""
    types = dict(collections.Counter(image["type"] for image in images if "type" in image).most_common())
    sampled = [image["values"] for image in images if len(image.get("values", ()))]
    if not sampled:
        return {"types": types, "values": None, "used": None, "range": None}
    values = np.concatenate(sampled)
    least, low, high, greatest = (float(x) for x in np.percentile(values, (0, 0.1, 99.9, 100)))
    used = None
    kinds = {kind for kind in types if kind != "uint8"}
    if len(kinds) == 1 and np.issubdtype(np.dtype(*kinds), np.unsignedinteger):
        used = (high - low) / np.iinfo(*kinds).max
    whole = all(np.issubdtype(np.dtype(kind), np.integer) for kind in kinds)
    suggested = [math.floor(low), math.ceil(high)] if whole else [float(f"{low:.4g}"), float(f"{high:.4g}")]
    return {"types": types, "values": (least, low, high, greatest), "used": used, "range": suggested}


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {f"p{p}": round(float(value)) for p, value in zip(_PERCENTILES, np.percentile(values, _PERCENTILES))}
