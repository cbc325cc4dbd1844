"""From the bytes of an image file to uint8 pixels, whatever the file turns out to be.

JPEG is the quick path (torchvision's decoder, or Pillow's at a reduced DCT scale); everything else goes
through Pillow, multi-band TIFF through tifffile. A file is believed by its first bytes, never by its name.
What is done to the unusual ones: EXIF orientation is applied; alpha is composited on white; palettes and
CMYK become RGB; 16-bit pixels keep their full range as 8 bits (65535 -> 255); float pixels in 0..1 are
scaled by 255, others from their least to their greatest value; of an animation the first frame counts. A
truncated file is bad, never padded with grey.
"""

import importlib.util
import io
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 200_000_000  # Pillow refuses formats other than JPEG above 178,956,970 in any case
MIN_SIDE = 2  # pixels; below this there is nothing to crop
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # no format that runs a program
_START_OF_FRAME = frozenset({0xC0, 0xC1, 0xC2})  # the baseline, extended and progressive Huffman codings
_ORIENTATION_TAG = 0x0112
_GREY, _RGB = 1, 3  # modes of image::decode_jpeg


def _load_image_operators() -> None:
    """Load torchvision's image operators without torchvision, whose models take as long to import as torch itself."""
    found = importlib.util.find_spec("torchvision")
    for library in Path(found.origin).parent.glob("image*.so") if found is not None and found.origin else ():
        with suppress(OSError):
            torch.ops.load_library(str(library))
            return
    import torchvision  # noqa: F401 (where its library has another name)


def _find_jpeg_operator() -> Callable[[Tensor, int], Tensor] | None:
    """torchvision's JPEG decoder (encoded bytes, mode -> (C, H, W) uint8), or None where there is no such operator.

    The operator and not torchvision.io.decode_jpeg around it, which is deprecated since torchvision 0.29.
    """
    try:
        operator = torch.ops.image.decode_jpeg
        arguments = operator.default._schema.arguments
    except AttributeError:  # a torchvision without it, or built without libjpeg
        return None
    needed = [str(argument.type) for argument in arguments if not argument.has_default_value()]
    return operator if needed == ["Tensor", "int"] else None


_load_image_operators()
_decode_jpeg = _find_jpeg_operator()


class BadImage(Exception):
    """A file that cannot be used as an image. `str(error)` is the reason, without the file's name."""


class EncodedImage:
    """An image whose size is known and whose pixels are decoded when asked for.

    height, width  pixels, after EXIF orientation
    format         "JPEG", "PNG", ... by content; "array" when it came as pixels
    mode           the file's own channels in Pillow's words ("RGB", "L", "CMYK", "I;16", ...)
    """

    def __init__(
        self, data: bytes | np.ndarray, in_channels: int = 3, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
    ) -> None:
        """Read the header. Raises BadImage when it is no image, too large, too small or of other channels."""
        self.in_channels = in_channels
        self._data = b"" if isinstance(data, np.ndarray) else data
        self._pixels: Tensor | None = None
        self._orientation = 1
        self.components = 0
        if isinstance(data, np.ndarray):
            self.format, self.mode = "array", "RGB" if data.ndim == 3 else "L"
            self._pixels = _from_array(data, in_channels)
            self.height, self.width = self._pixels.shape[1:]
        elif not data:
            raise BadImage("the file is empty")
        elif (header := jpeg_header(data)) is not None:
            height, width, self.components, self._orientation = header
            self.format, self.mode = "JPEG", {1: "L", 3: "RGB"}.get(self.components, "CMYK")
            self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)
        else:
            self._open_with_pillow(max_pixels)
        _check_size(self.height, self.width, max_pixels, min_side)

    def pixels(self, reduction: int = 1) -> Tensor:
        """Decode. Returns (in_channels, h, w) uint8, channels innermost in memory; BadImage when it fails.

        reduction  1, 2, 4 or 8; a JPEG comes with its sides divided by it (rounded up), other formats ignore
                   it
        """
        if self._pixels is not None:
            return self._pixels
        usual = self.components in (1, 3) and self.in_channels in (1, 3)
        try:
            if _decode_jpeg is not None and reduction == 1 and usual:
                # bytearray: torch warns about memory that it may not write to
                encoded = torch.frombuffer(bytearray(self._data), dtype=torch.uint8)
                with suppress(RuntimeError):  # for what this decoder refuses; Pillow has the last word
                    whole = _decode_jpeg(encoded, _RGB if self.in_channels == 3 else _GREY)
                    return _orient(whole, self._orientation)
            with Image.open(io.BytesIO(self._data), formats=("JPEG",)) as image:
                if reduction > 1:
                    mode = "L" if self.in_channels == 1 else "RGB"
                    image.draft(mode, (image.width // reduction, image.height // reduction))
                return _orient(_from_pillow(image, self.in_channels), self._orientation)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from error

    def _open_with_pillow(self, max_pixels: int) -> None:
        try:
            with Image.open(io.BytesIO(self._data), formats=_FORMATS) as image:
                self.format, self.mode = str(image.format), image.mode
                _check_size(image.height, image.width, max_pixels, 1)
                if image.format == "TIFF" and self.in_channels not in (1, 3):
                    self._pixels = _multi_band_tiff(self._data, self.in_channels)
                else:
                    orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
                    if image.format == "TIFF":
                        orientation = 1  # Pillow turns a TIFF itself while it loads
                    self._pixels = _orient(_from_pillow(image, self.in_channels), orientation)
        except BadImage:
            raise
        except Exception as error:
            if self._data[:4] in (b"II*\0", b"MM\0*") and self.in_channels not in (1, 3):
                self.format, self.mode = "TIFF", f"{self.in_channels} bands"
                self._pixels = _multi_band_tiff(self._data, self.in_channels)
            else:
                raise BadImage(_reason(error)) from error
        self.height, self.width = self._pixels.shape[1:]


def decode(data: bytes | np.ndarray, in_channels: int = 3, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a whole image. Returns (in_channels, H, W) uint8; raises BadImage when it cannot be used."""
    return EncodedImage(data, in_channels, max_pixels, min_side=1).pixels()


def jpeg_header(data: bytes) -> tuple[int, int, int, int] | None:
    """(height, width, components, orientation) of an 8-bit Huffman-coded JPEG; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    position, orientation, length = 2, 1, len(data)
    while position + 9 < length and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # padding and markers without a body
            position += 1 if marker == 0xFF else 2
            continue
        if marker in _START_OF_FRAME:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return (height, width, components, orientation) if precision == 8 and height and width else None
        if marker == 0xDA or (0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return None  # a scan before its frame, or a coding that libjpeg may not have
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + size])
        position += 2 + size
    return None


def _exif_orientation(exif: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 1
        (offset,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION_TAG and kind == 3:
                (value,) = struct.unpack_from(order + "H", exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # broken metadata does not make the pixels bad
    return 1


def _orient(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation (1..8) to (C, H, W)."""
    if orientation == 1 or not 2 <= orientation <= 8:
        return image
    pixels = image.permute(1, 2, 0)  # (H, W, C)
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    return (pixels.flip(flips) if flips else pixels).contiguous().permute(2, 0, 1)


def _check_size(height: int, width: int, max_pixels: int, min_side: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if min(height, width) < min_side:
        raise BadImage(f"{width}x{height} pixels, the shorter side is below {min_side}")


def _from_pillow(image: Image.Image, in_channels: int) -> Tensor:
    """An opened Pillow image as (in_channels, H, W) uint8; loads it, so it raises what Pillow raises."""
    image.load()
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _from_array(_to_uint8(np.asarray(image)), in_channels)
    if in_channels not in (1, 3):
        return _from_array(np.asarray(image), in_channels)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    target = "RGB" if in_channels == 3 else "L"
    if image.mode != target:
        if target == "L" and image.mode not in ("1", "RGB"):
            image = image.convert("RGB")
        image = image.convert(target)
    return _from_array(np.array(image), in_channels)


def _multi_band_tiff(data: bytes, in_channels: int) -> Tensor:
    try:
        import tifffile
    except ImportError as error:
        raise BadImage("TIFF with other than 1 or 3 channels needs the package tifffile") from error
    try:
        array: Any = tifffile.imread(io.BytesIO(data), key=0)
    except Exception as error:
        raise BadImage(_reason(error)) from error
    if array.ndim == 3 and array.shape[0] == in_channels and array.shape[2] != in_channels:
        array = array.transpose(1, 2, 0)  # planes one behind the other
    return _from_array(_to_uint8(array), in_channels)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise BadImage("pixels that are not finite")
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (array.astype(np.float32) - low) * (255.0 / max(high - low, 1e-12))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _from_array(array: np.ndarray, in_channels: int) -> Tensor:
    """(H, W) or (H, W, C) uint8 pixels as (in_channels, H, W); a grey image is repeated to three channels."""
    if array.dtype != np.uint8:
        raise BadImage(f"pixels of type {array.dtype}, expected uint8")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] == 1 and in_channels == 3:
        array = np.repeat(array, 3, axis=2)
    if array.ndim == 3 and array.shape[2] == 3 and in_channels == 1:
        grey = array @ np.array([0.299, 0.587, 0.114])
        array = np.rint(grey).astype(np.uint8)[:, :, None]
    if array.ndim != 3 or array.shape[2] != in_channels:
        channels = array.shape[2] if array.ndim == 3 else array.ndim
        raise BadImage(f"{channels} channels, expected {in_channels}")
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    return torch.from_numpy(array).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    if not text or "cannot identify image file" in text[0]:
        return "not an image in a known format"
    return text[0]
