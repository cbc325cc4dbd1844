"""Which values of a pixel are black and which are white: pixels of any type on the scale of bytes, 0 to 255.

Eight-bit pixels stay as they are. Deeper ones become float32, so that no level is lost, by one range for the whole
data set (`data.range`), never by the least and greatest value of each picture: pictures of one set then compare.
Without a range an unsigned type stands for its own (65535 is white), and floats for 0 to 1; whatever else needs one.
Bytes keep their scale beside deeper pictures: a range that goes beyond 255 is not meant for them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1 << 22  # values that are scaled at once, in double precision


class BadImage(Exception):
    """A file that cannot be used as an image. `str(error)` is the reason, without the file's name."""


def check_size(height: int, width: int, max_pixels: int, min_side: int = 1) -> None:
    """Raise BadImage for more than `max_pixels` pixels, or a shorter side of less than `min_side`."""
    if height * width > max_pixels:
        raise BadImage(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if min(height, width) < min_side:
        raise BadImage(f"{width}x{height} pixels, the shorter side is below {min_side}")


class ValueRange(NamedTuple):
    """The values that become 0 and 255; one of each, or one for every channel."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, numbers: Sequence[float] | None) -> "ValueRange | None":
        """From LOW,HIGH, or LOW,HIGH,LOW,HIGH,... for each channel, as `data.range` is written."""
        return None if numbers is None else cls(tuple(numbers[::2]), tuple(numbers[1::2]))


class RawPixels(NamedTuple):
    """Pixels as a file has them.

    values          (H, W, C) of any real type
    alpha           (H, W) in 0..1, or None where nothing is transparent
    white_is_zero   whether the least value is white (TIFF's PhotometricInterpretation 0, DICOM's MONOCHROME1)
    nodata          a value that says "not measured", besides NaN; such pixels become black
    own_range       the range that the file itself declares (a DICOM window); a data set's goes before it
    """

    values: np.ndarray
    alpha: np.ndarray | None = None
    white_is_zero: bool = False
    nodata: float | None = None
    own_range: tuple[float, float] | None = None

    def tobytes(self) -> bytes:
        """The values' bytes, as an array has them."""
        return self.values.tobytes()


def to_byte_scale(raw: RawPixels, value_range: ValueRange | None) -> np.ndarray:
    """(H, W, C) on the scale of bytes: uint8 as they are where nothing is to be scaled, else float32 in 0..255.

    raises BadImage where neither the type nor a range says what is black and what is white
    """
    values = raw.values
    if not is_scaled(values.dtype, value_range) and raw.nodata is None:
        pixels = 255 - values if raw.white_is_zero else values
    else:
        missing = missing_values(values, raw.nodata)
        low, high = limits(raw, value_range, missing)
        pixels, scale = np.empty(values.shape, np.float32), 255.0 / (np.asarray(high, dtype=np.float64) - low)
        rows = max(1, _AT_ONCE // max(1, values[:1].size))
        for first in range(0, len(values), rows):
            part = slice(first, first + rows)
            pixels[part] = ((values[part].astype(np.float64) - low) * scale).clip(0.0, 255.0)
        if raw.white_is_zero:
            pixels = np.float32(255.0) - pixels
        pixels[missing] = 0.0
    if raw.alpha is None:
        return pixels
    alpha = raw.alpha[:, :, None].astype(np.float32)
    return pixels * alpha + np.float32(255.0) * (1 - alpha)  # on white


def is_scaled(dtype: np.dtype, value_range: ValueRange | None) -> bool:
    """Whether pixels of a type are scaled: all but bytes, and bytes by a range that is meant for them."""
    return dtype != np.uint8 or (value_range is not None and max(value_range.high) <= 255)


def missing_values(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Where values of any shape say "not measured": bool of that shape."""
    missing = ~np.isfinite(values)
    return missing if nodata is None else missing | (values == nodata)


def limits(
    raw: RawPixels, value_range: ValueRange | None, missing: np.ndarray
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """The values that become black and white, one of each or one for every channel; BadImage where nothing says it.

    missing  (H, W, C) bool, see `missing_values`
    """
    if value_range is not None:
        channels = raw.values.shape[2]
        for name, numbers in zip(("low", "high"), value_range):
            if len(numbers) not in (1, channels):
                raise BadImage(f"{channels} channels, but data.range has {len(numbers)} {name} values")
        return np.array(value_range.low), np.array(value_range.high)
    if raw.own_range is not None:
        return raw.own_range
    kind = raw.values.dtype
    if kind == np.bool_:
        return 0.0, 1.0
    if np.issubdtype(kind, np.unsignedinteger):
        return 0.0, float(np.iinfo(kind).max)
    measured = raw.values[~missing]
    low, high = (float(measured.min()), float(measured.max())) if measured.size else (0.0, 1.0)
    if np.issubdtype(kind, np.floating) and low >= 0 and high <= 1:
        return 0.0, 1.0
    raise BadImage(
        f"{kind} values from {low:g} to {high:g}: data.range=[LOW,HIGH] has to say which are black and white "
        "(dinoreg inspect measures it)"
    )
