"""What a source of images is like: formats, sizes, bad files, duplicates, pixel statistics, the scale of its values."""

import collections
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dinoreg.config.load import Config, load_config
from dinoreg.config.view_settings import AugmentSettings
from dinoreg.data.decode import EncodedImage, alone_if_large
from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.data.value_range import BadImage, RawPixels, ValueRange, is_scaled, limits, missing_values
from dinoreg.models.registry import parse_name
from dinoreg.runtime.digest import content_digest
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel, show_progress
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.templates import render

_PERCENTILES = (0, 5, 50, 95, 100)
_LISTED = 20  # bad files and groups of duplicates shown on the console
_THREADS = 4
_VALUES = 10_000  # of a picture of more than eight bits, looked at
LOOKED_AT = 16  # pictures that are looked at before any work is done
FEW_IMAGES = 10_000  # below which public weights are the better start
LARGE = 4_000_000  # pixels of a picture that takes longer to read than a step has
_SUMMED = 1 << 20  # pixels that are summed at once, in double precision
_MEASURED = 200  # pictures that a normalisation is measured on
_OUTSIDE, _LITTLE = 0.01, 0.1  # shares of values beyond the range, and of the range in use, that are worth a warning
_BITS_APART = 4  # between pictures of different ranges: 8 bits against 12, 12 against 16


class Survey(NamedTuple):
    """What some pictures from all over a source say before any work is done.

    deep       whether they need more than eight bits
    mean, std  of each channel, of pixels in 0..1
    warnings   lines that begin with their name: values beyond the range, a range that is hardly used, pages not read
    """

    deep: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    warnings: list[str]


def survey(
    source: Source,
    in_channels: int,
    count: int = LOOKED_AT,
    whose: str = "data.range",
    key: str = "",
    what: str = "data",
) -> Survey:
    """Look at some pictures of a source as a model of `in_channels` will see them.

    count   pictures, at most
    whose   what messages call the range of the source
    key     the option that sets it; "": as `whose`
    what    the option that names the pictures
    raises  UserError, with the first reason, where none of them can be used
    """
    images = _describe_some(source, count, in_channels)
    good = [image for image in images if "bad" not in image]
    if not good:
        first, channels = images[0], {image.get("channels", in_channels) for image in images}
        hint = f"; model.in_channels={min(channels)} takes them" if channels.isdisjoint({1, 3, in_channels}) else ""
        raise UserError(
            f"{what}: none of {len(images)} pictures looked at can be used for {in_channels} channels; the first: "
            f"{first['name']}: {first['bad']}{hint}"
        )
    deep = source.value_range is not None or any(image["type"] != "uint8" for image in good)
    warnings = _of_scale(good, source.value_range, whose, key or whose)
    pages = [image["pages"] for image in good if image["pages"] > 1 and image["format"] == "TIFF"]
    if pages:
        held = f"{len(pages)} of {len(good)} pictures looked at hold {pages[0]} pages"
        warnings.append(f"pages: {held}, the first is taken; a model of {pages[0]} channels takes them as channels")
    return Survey(deep, *_mean_and_std(good), warnings)


def with_statistics(config: Config, source: Source, before: Config | None = None) -> tuple[Config, list[str]]:
    """A config with the mean and deviation of its own pictures where it has only those of RGB and other channels.

    Those of a bag of channels are of all together.

    before   of the run that is resumed, whose numbers hold; None: they are measured
    returns  the config, and a line on what was measured or []
    raises   UserError where no picture can be used
    """
    shipped, channels, given = AugmentSettings(), config.model.in_channels, config.augment
    other = config.model.crop_channels != 3
    unknown = {key for key in ("mean", "std") if other and getattr(given, key) == getattr(shipped, key)}
    if not unknown:
        return config, []
    if before is not None:
        return replace(config, augment=replace(given, **{key: getattr(before.augment, key) for key in unknown})), []
    found = survey(source, channels, _MEASURED)
    mean, std = np.array(found.mean), np.array(found.std)
    if config.model.bag_of:
        mean, std = mean.mean(keepdims=True), np.sqrt((std**2 + mean**2).mean(keepdims=True) - mean.mean() ** 2)
    values: dict[str, Any] = {key: tuple({"mean": mean, "std": std}[key].round(4).tolist()) for key in sorted(unknown)}
    if std.min() <= 0:
        raise UserError(f"augment.std: missing, and one of {channels} channels is the same everywhere")
    shown = {key: f"=[{','.join(f'{each:g}' for each in value)}]" for key, value in values.items()}
    words = " ".join(f"augment.{key}{numbers * (channels < 10)}" for key, numbers in shown.items())
    line = f"{words}: measured, as none is given for {channels} channel{'s' * (channels > 1)}; kept in config.yaml"
    return replace(config, augment=replace(given, **values)), [line]


def config_for(images: int) -> str:
    """The shipped config that so many images are meant for."""
    return "small" if images < 50_000 else "vits14_reg4"


def inspect_source(
    spec: str | os.PathLike[str] | Sequence[str],
    sample: int = 1000,
    in_channels: int = 3,
    value_range: Sequence[float] | None = None,
    root: str | os.PathLike[str] | None = None,
    columns: str = "",
) -> dict[str, Any]:
    """Decode evenly spaced images of a source in full and describe them.

    sample       images decoded, at most; 0 decodes all
    in_channels  channels of the model that is to see them
    value_range  LOW,HIGH as in `data.range`; without it pixels are scaled by their types
    root, columns  of a list or table, as for `open_source`
    returns    a dict of plain values: images, looked_at, formats, modes, percentiles of height, width and
               shorter_side, small (those with one below crop_size, which with patch_size is of the config for so many
               images), large (of more than LARGE pixels), bad (name -> reason), duplicates (lists of names with equal
               contents), mean, std (per channel, of pixels in 0..1, every image weighing the same; None without
               images), types (of pixels -> images), values (least, 0.1 %, 99.9 %, greatest) and used (the share of
               their type's range) of images of more than eight bits or None, range (a suggestion for `data.range`),
               levels (different values, and how many of the 256 of bytes are left of them by the range, or None),
               bits (that the brightest values take -> images, where they are of different ranges), passed_over (files
               that are no images, by ending), pages (how many in a file -> images, where more than one), misfits
               (channels of files that are bad for `in_channels` -> images)
    raises     UserError as `open_source` does
    """
    source = open_source(spec, root=root, value_range=value_range, columns=columns)
    config, images = load_config(config_for(len(source))), _describe_some(source, sample, in_channels, "inspect")
    good = [image for image in images if "bad" not in image]
    height, width = (np.array([image[side] for image in good], dtype=np.int64) for side in ("height", "width"))
    shorter = np.minimum(height, width)
    names_of_contents = collections.defaultdict(list)
    for image in images:
        if "digest" in image:
            names_of_contents[image["digest"]].append(image["name"])
    mean, std = map(list, _mean_and_std(good)) if good else (None, None)
    return {
        "source": str(spec),
        "fingerprint": source.fingerprint(),
        "images": len(source),
        "shards": len(source.shards()),
        "looked_at": len(images),
        "formats": dict(collections.Counter(image["format"] for image in good).most_common()),
        "modes": dict(collections.Counter(image["mode"] for image in good).most_common()),
        "height": _percentiles(height),
        "width": _percentiles(width),
        "shorter_side": _percentiles(shorter),
        "crop_size": config.crops.global_size,
        "patch_size": parse_name(config.model.name)["patch_size"],
        "small": int((shorter < config.crops.global_size).sum()),
        "large": int((height * width > LARGE).sum()),
        "bad": {image["name"]: image["bad"] for image in images if "bad" in image},
        **_values(images),
        "passed_over": source.passed_over,
        "pages": dict(collections.Counter(image["pages"] for image in images if image.get("pages", 1) > 1)),
        "misfits": dict(collections.Counter(image["channels"] for image in images if _misfit(image, in_channels))),
        "duplicates": [names for names in names_of_contents.values() if len(names) > 1],
        "mean": mean,
        "std": std,
    }


def render_inspection(statistics: dict[str, Any]) -> str:
    """The result of `inspect_source` as text for the console."""
    return render("data/templates/inspection.txt.j2", listed=_LISTED, few=FEW_IMAGES, **statistics).rstrip()


def _describe_some(source: Source, count: int, in_channels: int, what: str = "") -> list[dict[str, Any]]:
    """`_describe` of evenly spaced images, `count` at most; 0: of all. With `what` it shows its progress."""
    count = len(source) if count <= 0 else min(count, len(source))
    indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    found = parallel(lambda index: _describe(source, int(index), in_channels), indices, _THREADS)
    if what:
        print_status(f"{what}: looking at {count:,} of {len(source):,} images")
        import torch  # noqa: F401 (seconds which are not the pictures')
    return list(show_progress(found, count, what, "images") if what else found)


def _describe(source: Source, index: int, in_channels: int) -> dict[str, Any]:
    """One image's "name" and "digest", with "bad", the reason, where it cannot be decoded, else with its properties."""
    image: dict[str, Any] = {"name": source.name(index)}
    try:
        data = source.read(index)
        image["digest"] = content_digest(data)
        with alone_if_large(data):
            _measure(image, EncodedImage(data, in_channels, value_range=source.value_range))
    except BadImage as error:
        image["bad"] = str(error)
    return image


def _measure(image: dict[str, Any], encoded: EncodedImage) -> None:
    """Add the properties of a picture to `image`, those of its file first; BadImage when it cannot be decoded."""
    raw, value_range = encoded.raw, encoded.value_range
    image |= {"type": "uint8", "pages": encoded.pages, "channels": encoded.components}
    if raw is not None:
        image |= {"type": str(raw.values.dtype), "channels": raw.values.shape[2]}
        sampled = _sample(raw)  # (n, C)
        if raw.values.dtype != np.uint8:
            image["values"] = sampled[np.isfinite(sampled)]
    pixels = encoded.pixels().permute(1, 2, 0).flatten(0, 1).numpy()  # (H * W, C), channels innermost in memory
    image |= {name: getattr(encoded, name) for name in ("format", "mode", "height", "width")}
    windowed = raw is not None and raw.own_range is not None and value_range is None
    if raw is not None and is_scaled(raw.values.dtype, value_range) and not windowed:
        low, high = limits(raw, value_range, missing_values(raw.values, raw.nodata))
        image["places"] = ((sampled - low) / (np.asarray(high, dtype=np.float64) - low))[np.isfinite(sampled)]
    parts = [pixels[first : first + _SUMMED] for first in range(0, len(pixels), _SUMMED)]
    sums = [(part.sum(0), (part**2).sum(0)) for part in (each / np.float64(255) for each in parts)]
    image["mean"], image["mean_square"] = np.sum(sums, axis=0) / len(pixels)


def _mean_and_std(good: Sequence[dict[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel over described images, every image weighing the same."""
    mean = np.mean([image["mean"] for image in good], axis=0)
    variance = np.mean([image["mean_square"] for image in good], axis=0) - mean**2
    return tuple(mean.round(4).tolist()), tuple(np.sqrt(variance.clip(0)).round(4).tolist())


def _misfit(image: dict[str, Any], in_channels: int) -> bool:
    """Whether an image is bad for want, or for too many, of channels."""
    channels = image.get("channels", in_channels)
    return "bad" in image and channels != in_channels and not {channels, in_channels} <= {1, 3}


def _sample(raw: RawPixels) -> np.ndarray:
    """(n, C) float64 of some pixels from all over a picture, NaN where they say "not measured"."""
    values = raw.values.reshape(-1, raw.values.shape[2])
    values = values[:: max(1, values.size // _VALUES)]
    return np.where(missing_values(values, raw.nodata), np.nan, values.astype(np.float64))


def _of_scale(good: Sequence[dict[str, Any]], value_range: ValueRange | None, whose: str, key: str) -> list[str]:
    """Warnings where values and the range that scales them are of different scales; bytes as they are have none."""
    places = [image["places"] for image in good if len(image.get("places", ()))]
    if not places:
        return []
    share = np.concatenate(places)
    outside, (low, high) = float(((share < 0) | (share > 1)).mean()), np.percentile(share, (0.1, 99.9))
    found = _values(list(good))
    numbers = () if value_range is None else tuple(zip(*value_range))
    words = f"{whose} {','.join(f'{each:g}' for pair in numbers for each in pair)}" if numbers else "their type's range"
    reach = "" if found["values"] is None else f": they reach from {found['values'][0]:g} to {found['values'][3]:g}"
    if numbers and outside > _OUTSIDE:
        return [
            f"beyond the range: {100 * outside:.1f} % of the pixel values lie outside of {words} and are cut off{reach}"
        ]
    if high - low < _LITTLE and found["range"] is not None:
        better = f"{key}=[{','.join(f'{each:g}' for each in found['range'])}] would use all of it"
        return [f"range hardly used: the pixel values use {100 * (high - low):.1f} % of {words}{reach}; {better}"]
    return []


def _values(images: list[dict[str, Any]]) -> dict[str, Any]:
    """What the pixels of more than eight bits are like, see `inspect_source`."""
    types = dict(collections.Counter(image["type"] for image in images if "type" in image).most_common())
    sampled = [image["values"] for image in images if len(image.get("values", ()))]
    if not sampled:
        return {"types": types, "values": None, "used": None, "range": None, "levels": None, "bits": {}}
    tops = [math.ceil(math.log2(max(float(np.percentile(each, 99.9)), 0) + 1)) for each in sampled]
    bits = dict(sorted(collections.Counter(tops).items())) if max(tops) - min(tops) >= _BITS_APART else {}
    shares = [image["places"] for image in images if len(image.get("places", ()))]
    bytes_left = len(np.unique((255 * np.concatenate(shares)).clip(0, 255).round())) if shares else None
    values = np.concatenate(sampled)
    least, low, high, greatest = (float(x) for x in np.percentile(values, (0, 0.1, 99.9, 100)))
    used = None
    kinds = {kind for kind in types if kind != "uint8"}
    if len(kinds) == 1 and np.issubdtype(np.dtype(*kinds), np.unsignedinteger):
        used = (high - low) / np.iinfo(*kinds).max
    whole = all(np.issubdtype(np.dtype(kind), np.integer) for kind in kinds)
    suggested = [math.floor(low), math.ceil(high)] if whole else [float(f"{low:.4g}"), float(f"{high:.4g}")]
    return {
        "types": types,
        "values": (least, low, high, greatest),
        "used": used,
        "range": suggested,
        "levels": (len(np.unique(values)), bytes_left),
        "bits": bits,
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {f"p{p}": round(float(value)) for p, value in zip(_PERCENTILES, np.percentile(values, _PERCENTILES))}
