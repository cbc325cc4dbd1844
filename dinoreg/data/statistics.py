"""What a source of images is like: formats, sizes, bad files, duplicates, pixel statistics."""

import collections
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dinoreg.data.decode import BadImage, EncodedImage
from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.runtime.templates import render

_PERCENTILES = (0, 5, 50, 95, 100)
_LISTED = 20  # bad files and groups of duplicates shown on the console
_THREADS = 4


def inspect_source(
    spec: str | os.PathLike[str] | Sequence[str], sample: int = 1000, crop_size: int = 224
) -> dict[str, Any]:
    """Decode evenly spaced images of a source in full and describe them.

    sample     images decoded, at most; 0 decodes all
    crop_size  pixels; images with a shorter side below it are counted as small
    returns    a dict of plain values: images, looked_at, formats, modes, percentiles of height, width and
               shorter_side, small, bad (name -> reason), duplicates (lists of names with equal contents),
               mean, std (per channel, of pixels in 0..1, every image weighing the same; None without images)
    raises     UserError as `open_source` does
    """
    source = open_source(spec)
    count = len(source) if sample <= 0 else min(sample, len(source))
    indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    with ThreadPoolExecutor(_THREADS) as pool:
        images = list(pool.map(lambda index: _describe(source, int(index)), indices))
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
        "duplicates": [names for names in names_of_contents.values() if len(names) > 1],
        "mean": None if mean is None else mean.round(4).tolist(),
        "std": None if variance is None else np.sqrt(variance.clip(0)).round(4).tolist(),
    }


def render_inspection(statistics: dict[str, Any]) -> str:
    """The result of `inspect_source` as text for the console."""
    return render("data/templates/inspection.txt.j2", listed=_LISTED, **statistics).rstrip()


def _describe(source: Source, index: int) -> dict[str, Any]:
    """One image's "name" and "digest", with "bad", the reason, where it cannot be decoded, else with its properties."""
    image: dict[str, Any] = {"name": source.name(index)}
    try:
        data = source.read(index)
        image["digest"] = hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).digest()
        encoded = EncodedImage(data)
        channels = encoded.pixels().flatten(1).numpy()  # (C, H * W)
    except BadImage as error:
        return {**image, "bad": str(error)}
    # Every value occurs at most 256 ways, so counting is exact and quicker than a float copy.
    shares = np.stack([np.bincount(channel, minlength=256) for channel in channels]) / channels.shape[1]
    levels = np.arange(256) / 255
    properties = {name: getattr(encoded, name) for name in ("format", "mode", "height", "width")}
    return {**image, **properties, "mean": shares @ levels, "mean_square": shares @ levels**2}


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {f"p{p}": round(float(value)) for p, value in zip(_PERCENTILES, np.percentile(values, _PERCENTILES))}
