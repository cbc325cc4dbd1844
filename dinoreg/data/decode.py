"""From the bytes of an image file to its pixels on the scale of bytes, 0 to 255, whatever the file turns out to be.

JPEG is the quick path (torchvision's decoder, or Pillow's at a reduced DCT scale); other pictures of eight bits go
through Pillow, deeper ones through `scientific`. A file is believed by its first bytes, never by its name. What is done
to the unusual ones: EXIF orientation is applied; alpha is composited on white; palettes and CMYK become RGB; pixels of
more than eight bits become floats by the range of their data set (`value_range`); of an animation the first frame
counts, and as many pages of one size as there are channels are these channels. A truncated file is bad, never padded
with grey.
"""

from __future__ import annotations

import importlib.util
import io
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinoreg.data import scientific
from dinoreg.data.value_range import BadImage, RawPixels, ValueRange, check_size, to_byte_scale

if TYPE_CHECKING:  # imported where pixels are computed: sources and datasets are opened, and refused, without torch
    from torch import Tensor

MAX_PIXELS = 200_000_000  # Pillow refuses more than 178,956,970 in any case
MIN_SIDE = 2  # pixels; below this there is nothing to crop
_LARGE = 1 << 25  # pixels
_one_large = threading.Lock()
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # no format that runs a program
ORIENTATION_TAG, _BITS_PER_SAMPLE = 0x0112, 258  # of TIFF, and the first of EXIF, too
_GREY, _RGB = 1, 3  # modes of image::decode_jpeg
# What Pillow says of metadata, which do not make a picture bad, and of sizes, which are limited here.
warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read|Image size", module=r"PIL\.")


@cache
def _load_image_operators() -> None:
    """Load torchvision's image operators without torchvision, whose models take as long to import as torch itself."""
    import torch

    found = importlib.util.find_spec("torchvision")
    for library in Path(found.origin).parent.glob("image*.so") if found is not None and found.origin else ():
        with suppress(OSError):
            torch.ops.load_library(str(library))
            return
    import torchvision  # noqa: F401 (where its library has another name)


@cache
def _jpeg_operator() -> Callable[[Tensor, int], Tensor] | None:
    """torchvision's JPEG decoder (encoded bytes, mode -> (C, H, W) uint8), or None where there is no such operator.

    The operator and not torchvision.io.decode_jpeg around it, which is deprecated since torchvision 0.29.
    """
    import torch

    _load_image_operators()
    return getattr(torch.ops.image, "decode_jpeg", None)  # None: a torchvision built without libjpeg


@contextmanager
def alone_if_large(data: bytes | np.ndarray | RawPixels) -> Iterator[None]:
    """A context in which no other picture of more than `_LARGE` pixels is decoded by this process.

    Decoding takes some ten bytes a pixel for a while, and as many threads as look at pictures could each have one.
    """
    pixels = len(data)  # where other readers know it, which do not compress
    # Pixels that are here already are no picture's file.
    with suppress(Exception), Image.open(io.BytesIO(data), formats=_FORMATS) as image:  # type: ignore[arg-type]
        pixels = image.width * image.height
    with _one_large if pixels > _LARGE else nullcontext():
        yield


class EncodedImage:
    """An image whose size is known and whose pixels are decoded when asked for.

    height, width  pixels, after EXIF orientation
    orientation    the EXIF or TIFF orientation, 1 to 8, that the file's pixels are turned by
    format         "JPEG", "PNG", ... by content; "array" when it came as pixels, "files" when each channel was one
    mode           the file's own channels in Pillow's words ("RGB", "L", "CMYK", ...), deeper ones by their type
                   ("uint16 x 3")
    pages          pictures in the file; more than one where an animation or a stack is cut to its first
    raw            the pixels as the file has them; None for a JPEG, which is decoded when asked for
    """

    def __init__(
        self,
        data: bytes | np.ndarray | RawPixels,
        in_channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        min_side: int = MIN_SIDE,
        value_range: ValueRange | None = None,
    ) -> None:
        """Read the header. Raises BadImage when it is no image, too large, too small or of other channels."""
        self.in_channels, self.value_range, self.pages = in_channels, value_range, 1
        self.components, self._orientation = 0, 1
        self._turned: int | None = None  # the orientation of a file that its reader has turned already
        self._data = data if isinstance(data, bytes) else b""
        self.raw: RawPixels | None = None
        if isinstance(data, RawPixels):
            self.format, self.raw, self.mode = "files", data, f"{data.values.dtype} x {data.values.shape[2]}"
        elif isinstance(data, np.ndarray):
            self.format, self.mode = "array", "RGB" if data.ndim == 3 else "L"
            self.raw = RawPixels(_with_channels(data))
        elif not data:
            raise BadImage("the file is empty")
        elif data[:2] == b"\xff\xd8":
            with _damage_named(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                height, width, self._orientation = image.height, image.width, _orientation(image)
                self.components = image.layers  # type: ignore[attr-defined]
            self.format, self.mode = "JPEG", {1: "L", 3: "RGB"}.get(self.components, "CMYK")
        else:
            self.raw = self._read_other(max_pixels)
        if self.raw is not None:
            height, width = self.raw.values.shape[:2]
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)
        self.orientation = self._orientation if self._turned is None else self._turned
        check_size(self.height, self.width, max_pixels, min_side)

    def checksum(self) -> int:
        """A number in 0 to 2**63 - 1 that equal files have in common."""
        data = self._data or (b"" if self.raw is None else self.raw.values.tobytes())
        return (len(data) % 2**31) << 32 | zlib.crc32(data)

    def pixels(self, reduction: int = 1) -> Tensor:
        """Decode. Returns (in_channels, h, w), channels innermost in memory; BadImage when it fails.

        uint8 where the file has eight bits and its data set no range of its own, else float32 in 0..255.

        reduction  1, 2, 4 or 8; a JPEG comes with its sides divided by it (rounded up), other formats ignore
                   it
        """
        if self.raw is not None:
            return self.oriented(self._scaled(self.raw))
        usual = self.components in (1, 3) and self.in_channels in (1, 3)
        with _damage_named():
            if reduction == 1 and usual and (decode_jpeg := _jpeg_operator()) is not None:
                import torch

                # bytearray: torch warns about memory that it may not write to
                encoded = torch.frombuffer(bytearray(self._data), dtype=torch.uint8)
                with suppress(RuntimeError):  # for what this decoder refuses; Pillow has the last word
                    whole = decode_jpeg(encoded, _RGB if self.in_channels == 3 else _GREY)
                    if self.value_range is not None:
                        whole = self._scaled(RawPixels(whole.permute(1, 2, 0).numpy()))
                    return self.oriented(whole)
            with Image.open(io.BytesIO(self._data), formats=("JPEG",)) as image:
                if reduction > 1:
                    mode = "L" if self.in_channels == 1 else "RGB"
                    image.draft(mode, (image.width // reduction, image.height // reduction))
                raw = RawPixels(_rgb_or_bands(image, self.in_channels))
            return self.oriented(self._scaled(raw))

    def upright(self) -> RawPixels:
        """The pixels of a file of one channel as they are in it, turned as its EXIF orientation says.

        raises  BadImage for several channels and for transparency
        """
        raw = self.raw or RawPixels(self.pixels().permute(1, 2, 0).numpy())
        if raw.values.shape[2] != 1 or raw.alpha is not None:
            raise BadImage(f"{self.mode}: expected one channel")
        if self.raw is None or self._orientation == 1:
            return raw
        import torch

        places = self.oriented(torch.arange(raw.values.size).view(1, *raw.values.shape[:2]))  # where each comes from
        return raw._replace(values=raw.values.ravel()[places.permute(1, 2, 0).numpy()])

    def oriented(self, pixels: Tensor) -> Tensor:
        """Pixels (C, H, W) as the file stores them, turned as its EXIF orientation says."""
        return orient(pixels, self._orientation)

    def _read_other(self, max_pixels: int) -> RawPixels:
        """Decode what is no JPEG."""
        with _damage_named():
            if scientific.is_dicom(self._data):
                self.format = "DICOM"
                raw = scientific.read_dicom(self._data, max_pixels)
            elif scientific.is_tiff(self._data) and self._is_scientific(max_pixels):
                self.format = "TIFF"
                raw, self._orientation, self.pages = scientific.read_tiff(self._data, self.in_channels, max_pixels)
            else:
                with Image.open(io.BytesIO(self._data), formats=_FORMATS) as image:
                    self.format = str(image.format)
                    check_size(image.height, image.width, max_pixels)
                    if not scientific.is_deep_png(self._data):
                        return self._read_with_pillow(image)
                _load_image_operators()
                raw = scientific.read_deep_png(self._data)
        if raw.values.dtype.kind not in "buif":
            raise BadImage(f"{raw.values.dtype} values, expected real numbers")
        self.mode = f"{raw.values.dtype} x {raw.values.shape[2]}"
        return raw

    def _is_scientific(self, max_pixels: int) -> bool:
        """Whether a TIFF is not for Pillow: more than eight bits, bands, or pages that are channels."""
        try:
            with Image.open(io.BytesIO(self._data), formats=("TIFF",)) as image:
                check_size(image.height, image.width, max_pixels)
                bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))  # type: ignore[attr-defined]
                pages = getattr(image, "n_frames", 1)
                if self.in_channels not in (1, 3):
                    return True
                if image.mode.startswith("I;16") and len(bits) == 1 and not pages == self.in_channels > 1:
                    return False
                return max(bits) > 8 or (image.mode == "L" and pages == self.in_channels > 1)
        except BadImage:
            raise
        except Exception:
            return True  # tifffile may know it

    def _read_with_pillow(self, image: Image.Image) -> RawPixels:
        self.mode, self.pages = image.mode, getattr(image, "n_frames", 1)
        orientation = _orientation(image)
        if image.format == "TIFF":  # which Pillow turns itself while it loads
            self._turned = orientation
        else:
            self._orientation = orientation
        if not image.mode.startswith("I"):
            return RawPixels(_rgb_or_bands(image, self.in_channels))
        image.load()
        self.mode = "uint16 x 1"
        values = np.asarray(image)[:, :, None].astype(np.uint16)
        return RawPixels(values, white_is_zero=scientific.white_is_zero(image))

    def _scaled(self, raw: RawPixels) -> Tensor:
        return _from_array(to_byte_scale(raw, self.value_range), self.in_channels)


def decode(
    data: bytes | np.ndarray | RawPixels | Image.Image,
    in_channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> Tensor:
    """Decode a whole image. Returns (in_channels, H, W) on the scale of bytes, see `EncodedImage.pixels`.

    data    of a file, pixels (H, W) or (H, W, C) of any real type, or a Pillow image
    raises BadImage when it cannot be used
    """
    if isinstance(data, Image.Image):
        with _damage_named():
            deep = data.mode[0] in "IF"  # its modes of more than eight bits
            data.load()  # before the orientation is read: of a TIFF Pillow applies it here
            raw = RawPixels(_with_channels(np.asarray(data)) if deep else _rgb_or_bands(data, in_channels))
            pixels = _from_array(to_byte_scale(raw, value_range), in_channels)
            return orient(pixels, _orientation(data))
    return EncodedImage(data, in_channels, max_pixels, min_side=1, value_range=value_range).pixels()


def read_bands(files: Sequence[tuple[str, bytes]], max_pixels: int = MAX_PIXELS) -> RawPixels:
    """Files of one channel each as one picture, its channels in their order; colour of eight bits counts as grey.

    files   (name, content) of each
    raises  BadImage, naming the file, for one that cannot be read, is too large or has several channels, for one of
            another size or type than the first, and where all take more than a picture in colour may
    """
    bands, kinds = [], []
    for name, data in files:
        try:
            with alone_if_large(data):
                band = EncodedImage(data, 1, max_pixels, min_side=1).upright()
            height, width, _ = band.values.shape
            if len(files) * height * width > 3 * max_pixels:
                raise BadImage(f"{len(files)} x {width}x{height} pixels, more than 3 x the limit of {max_pixels}")
            bands.append(band)
            kinds.append(f"{width}x{height} {band.values.dtype}{', 0 is white' * band.white_is_zero}")
            if kinds[-1] != kinds[0]:
                raise BadImage(f"{kinds[-1]}, the first channel is {kinds[0]}")
        except BadImage as error:
            raise BadImage(f"{name}: {error}") from None
    values = np.concatenate([each.values for each in bands], axis=2)
    nodata = next((each.nodata for each in bands if each.nodata is not None), None)
    window = bands[0].own_range if len({each.own_range for each in bands}) == 1 else None
    return bands[0]._replace(values=values, nodata=nodata, own_range=window)


def pillow_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Pillow's convert("RGB") of a whole file, as the reference trains and published numbers were measured.

    EXIF orientation is not applied, alpha is dropped, more than eight bits are cut off. Raises BadImage.
    """
    with _damage_named(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        check_size(image.height, image.width, max_pixels)
        return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened Pillow image, 1 to 8; broken metadata do not make the pixels bad."""
    with suppress(Exception):
        if (stated := int(image.getexif().get(ORIENTATION_TAG, 1))) in range(1, 9):
            return stated
    return 1


def orient(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) turned and mirrored as an EXIF orientation (1..8) says."""
    if not 2 <= orientation <= 8:
        return image
    pixels = image.permute(1, 2, 0)  # (H, W, C)
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    return (pixels.flip(flips) if flips else pixels).contiguous().permute(2, 0, 1)


def _rgb_or_bands(image: Image.Image, in_channels: int) -> np.ndarray:
    """An opened Pillow image of eight bits as (H, W, C); loads it, so it raises what Pillow raises."""
    image.load()
    mode = image.mode
    if in_channels not in (1, 3):
        return _with_channels(np.asarray(image))
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    target = "RGB" if in_channels == 3 else "L"
    if image.mode != target:
        if target == "L" and image.mode not in ("1", "RGB"):
            image = image.convert("RGB")
        image = image.convert(target)
    return _with_channels(np.array(image))


def _with_channels(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (H, W, C)."""
    return array if array.ndim == 3 else array[:, :, None]


def _from_array(array: np.ndarray, in_channels: int) -> Tensor:
    """(H, W, C) as (in_channels, H, W), type kept; grey is repeated to three channels, colour becomes luma for one."""
    import torch

    if array.shape[2] == 1 and in_channels == 3:
        array = np.repeat(array, 3, axis=2)
    elif array.shape[2] == 3 and in_channels == 1:
        grey = array @ np.array([0.299, 0.587, 0.114])
        array = (np.rint(grey) if array.dtype == np.uint8 else grey).astype(array.dtype)[:, :, None]
    if array.shape[2] != in_channels:
        raise BadImage(f"{array.shape[2]} channels, expected {in_channels}")
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    return torch.from_numpy(array).permute(2, 0, 1)


@contextmanager
def _damage_named() -> Iterator[None]:
    """Context in which what a library raises for damaged bytes, of whatever kind, is a BadImage in one line."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        known = text and "cannot identify image file" not in text[0]
        raise BadImage(text[0] if known else "not an image in a known format") from error
