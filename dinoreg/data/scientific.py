"""Pictures that Pillow cannot read or would cut to eight bits: PNG of 16 bits, TIFF of any type and layout, DICOM."""

import io
from typing import Any

import numpy as np
from PIL import Image

from dinoreg.data.value_range import BadImage, RawPixels, check_size

_PHOTOMETRIC, _ORIENTATION, _GDAL_NODATA = 262, 274, 42113  # tags of TIFF
_WHITE_IS_ZERO = 0
_ALPHA = (1, 2)  # TIFF's ExtraSamples: associated (premultiplied), unassociated
_PNG_UNCHANGED = 0


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are a DICOM file, by its preamble (PS3.10, 7.1)."""
    return data[128:132] == b"DICM"


def is_tiff(data: bytes) -> bool:
    """Whether the bytes are a TIFF or BigTIFF, of either byte order."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_deep_png(data: bytes) -> bool:
    """Whether it is a PNG of 16 bits per sample, which Pillow reads as 8 bits where it has more than one channel."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24:25] == b"\x10"


def read_deep_png(data: bytes) -> RawPixels:
    """A PNG of 16 bits with 1 to 4 channels; the last of 2 or 4 is its transparency."""
    import torch

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    values = torch.ops.image.decode_png(encoded, _PNG_UNCHANGED, False).permute(1, 2, 0).numpy()
    if values.shape[2] in (2, 4):
        return RawPixels(values[:, :, :-1], values[:, :, -1] / np.float32(65535))
    return RawPixels(values)


def read_tiff(data: bytes, in_channels: int, max_pixels: int) -> tuple[RawPixels, int, int]:
    """A TIFF through tifffile: any type, bands as samples, planes or pages.

    returns pixels, EXIF orientation (1..8), and how many pages the file has that are no channels
    raises BadImage where tifffile (or what it needs for a compression) is not installed, and where the pages are
           neither the channels of one picture nor a first picture of that many channels
    """
    try:
        import tifffile
    except ImportError:
        raise BadImage("a TIFF of this type needs the package tifffile") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        check_size(page.imagelength, page.imagewidth, max_pixels)
        values = _channels_last(page.asarray(), page, in_channels)
        pages = len(file.pages)
        if values.shape[2] == 1 and in_channels > 1 and (in_channels != 3 or pages == 3):
            values, pages = _pages_as_channels(file, in_channels), 1
        nodata = page.tags.get(_GDAL_NODATA)
        white_is_zero = page.photometric == _WHITE_IS_ZERO
        alpha = None
        if page.extrasamples and int(page.extrasamples[0]) in _ALPHA and values.shape[2] == in_channels + 1:
            limit = np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else 1.0
            values, alpha = values[:, :, :-1], values[:, :, -1].astype(np.float32) / np.float32(limit)
        missing = None if nodata is None else _number(nodata.value)
        orientation = page.tags.get(_ORIENTATION)
        turned = 1 if orientation is None else int(orientation.value)
        return RawPixels(values, alpha, white_is_zero, missing), turned, pages


def _channels_last(values: np.ndarray, page: Any, in_channels: int) -> np.ndarray:
    if values.ndim == 2:
        return values[:, :, None]
    if values.ndim != 3:
        raise BadImage(f"a TIFF page of {values.ndim} dimensions, expected 2 or 3")
    planar = page.axes.startswith("S") or (values.shape[0] == in_channels and values.shape[2] != in_channels)
    return values.transpose(1, 2, 0) if planar else values


def _pages_as_channels(file: Any, in_channels: int) -> np.ndarray:
    """One page for each channel, as microscopes write them (ImageJ, OME, or plain pages): (H, W, C)."""
    pages = [page.asarray() for page in file.pages]
    shapes = {page.shape for page in pages}
    if len(pages) == 1 and len(file.series) and len(file.series[0].shape) == 3:  # ImageJ's contiguous planes
        planes = file.series[0].asarray()
        pages, shapes = list(planes), {planes.shape[1:]}
    if len(pages) != in_channels or len(shapes) != 1:
        sizes = "of one size" if len(shapes) == 1 else "of different sizes"
        raise BadImage(f"{len(pages)} pages of one channel, {sizes}; expected {in_channels} channels")
    return np.stack(pages, axis=2)


def read_dicom(data: bytes, max_pixels: int) -> RawPixels:
    """A DICOM picture through pydicom, in the units of its rescale slope and intercept (Hounsfield for CT).

    Its own window, where it has one, says what is black and white, unless the data set has a range; of several frames
    the first counts. Raises BadImage where pydicom, or what it needs for a compression, is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, convert_color_space
    except ImportError:
        raise BadImage("a DICOM file needs the package pydicom") from None
    file = pydicom.dcmread(io.BytesIO(data))
    check_size(int(file.Rows), int(file.Columns), max_pixels)
    values = file.pixel_array
    if int(file.get("NumberOfFrames", 1) or 1) > 1:
        values = values[0]
    kind = str(file.PhotometricInterpretation)
    if int(file.SamplesPerPixel) == 3:
        if kind.startswith("YBR"):
            values = convert_color_space(values, kind, "RGB")
        return RawPixels(values)
    values = apply_modality_lut(values, file)
    slope, intercept = float(file.get("RescaleSlope", 1) or 1), float(file.get("RescaleIntercept", 0) or 0)
    bits, signed = int(file.BitsStored), bool(int(file.PixelRepresentation))
    lowest = -(2 ** (bits - 1)) if signed else 0
    limits = (lowest * slope + intercept, (lowest + 2**bits - 1) * slope + intercept)
    width, centre = _first(file.get("WindowWidth")), _first(file.get("WindowCenter"))
    if width is not None and centre is not None and width > 1:  # DICOM PS3.3, C.11.2.1.2.1
        limits = (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
    return RawPixels(values[:, :, None], None, kind == "MONOCHROME1", None, limits)


def white_is_zero(image: Image.Image) -> bool:
    """Whether an opened TIFF says that 0 is white; Pillow turns such pixels itself, but only those of up to 8 bits."""
    return image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO  # type: ignore[attr-defined]


def _first(value: Any) -> float | None:
    """The first number of a DICOM element, None where it is absent or empty."""
    numbers = np.ravel([] if value is None or value == "" else value)
    return float(numbers[0]) if len(numbers) else None


def _number(text: Any) -> float | None:
    try:
        return float(str(text).strip().rstrip("\0"))
    except ValueError:
        return None
