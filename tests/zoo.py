"""Odd picture files as people have them, each with the pixels that it stands for.

One small picture is written in each way. What has to come out is worked out here from the picture itself (or, for a
lossy JPEG, from Pillow's decoding of the same file without its tags), never by dinoreg's decoder.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

HEIGHT, WIDTH = 24, 36
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
# No symmetry, every channel another: a wrong turn, order or inversion shows.
RED, GREEN, BLUE = COLUMNS * 7, ROWS * 10, (ROWS * 3 + COLUMNS * 2 + 40)
PICTURE = np.stack([RED, GREEN, BLUE], axis=-1).astype(np.uint8)
GREY = PICTURE[..., 0]
ALPHA = ((ROWS + COLUMNS) * 4).astype(np.uint8)
# The same with the levels that 16 bits have: most of them are no multiples of 257.
DEEP = (PICTURE.astype(np.uint16) * 256 + (ROWS * 37 + COLUMNS * 11)[..., None] % 256).astype(np.uint16)
TWELVE = (DEEP[..., 0] >> 4).astype(np.uint16)  # twelve bits in sixteen


class Animal(NamedTuple):
    """A file, the (H, W, C) pixels on the scale of bytes that it stands for, and how they are read.

    tolerance    levels by which a pixel may differ
    in_channels  of the model
    value_range  of the data set: (low, high), or None
    """

    data: bytes
    pixels: np.ndarray
    tolerance: float = 0.0
    in_channels: int = 3
    value_range: tuple[float, float] | None = None


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=-1)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    return pixels * share + 255 * (1 - share)


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((values.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255


def pillow(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits: (H, W, C) uint16."""
    height, width, channels = values.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rgba() -> np.ndarray:
    return np.dstack([PICTURE, ALPHA])


def palette(image: np.ndarray) -> Image.Image:
    """Few colours, so that a palette holds them all."""
    return Image.fromarray(image // 64 * 64).quantize(256, dither=Image.Dither.NONE)


def turned_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def stored_for(orientation: int, upright: np.ndarray) -> np.ndarray:
    """How a camera stores the picture that its tag turns upright (EXIF 2.32, 4.6.5 A)."""
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),  # "rotate 90 clockwise to view": stored turned the other way
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    return np.ascontiguousarray(undo[orientation](upright))


def jpegs() -> dict[str, Animal]:
    """JPEGs: their pixels are Pillow's own decoding of the same coefficients without tags."""
    found = {}
    for name, image, options in (
        ("colour", Image.fromarray(PICTURE), {}),
        ("444", Image.fromarray(PICTURE), {"subsampling": 0, "quality": 95}),
        ("411", Image.fromarray(PICTURE), {"subsampling": "4:1:1"}),
        ("progressive", Image.fromarray(PICTURE), {"progressive": True}),
        ("grey", Image.fromarray(GREY), {}),
        ("cmyk", Image.fromarray(PICTURE).convert("CMYK"), {"quality": 95}),
    ):
        data = pillow(image, "JPEG", **options)
        found[f"{name}.jpg"] = Animal(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 4)
    for orientation in range(2, 9):
        stored = stored_for(orientation, PICTURE)
        options = {"quality": 98, "subsampling": 0}
        data = pillow(stored, "JPEG", exif=turned_exif(orientation), **options)
        found[f"turned_{orientation}.jpg"] = Animal(data, PICTURE, 6)
    two = Image.fromarray(PICTURE), Image.fromarray(PICTURE[::-1].copy())
    data = pillow(two[0], "MPO", save_all=True, append_images=[two[1]], quality=98, subsampling=0)
    found["stereo.mpo"] = Animal(data, PICTURE, 6)
    return found


def eight_bits() -> dict[str, Animal]:
    few = np.asarray(palette(PICTURE).convert("RGB"))
    two = ((ROWS // 6 + COLUMNS // 6) % 2 * 255).astype(np.uint8)
    clear = palette(PICTURE)
    index = int(np.asarray(clear)[0, 0])
    hidden = np.asarray(clear) == index
    see_through = np.where(hidden[..., None], 255, few)
    other = Image.fromarray(PICTURE[::-1].copy())
    key = tuple(int(value) for value in PICTURE[5, 7])
    keyed = np.where((key == PICTURE).all(-1)[..., None], 255, PICTURE)
    text = f"P3 {WIDTH} {HEIGHT} 255\n{' '.join(map(str, PICTURE.ravel()))}\n"
    return {
        "rgb.png": Animal(pillow(PICTURE, "PNG"), PICTURE),
        "grey.png": Animal(pillow(GREY, "PNG"), grey(GREY)),
        "palette.png": Animal(pillow(palette(PICTURE), "PNG"), few),
        "palette_clear.png": Animal(pillow(clear, "PNG", transparency=index), see_through),
        "colour_key.png": Animal(pillow(PICTURE, "PNG", transparency=key), keyed),
        "rgba.png": Animal(pillow(rgba(), "PNG"), on_white(PICTURE, ALPHA), 1),
        "grey_alpha.png": Animal(
            pillow(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "PNG"),
            on_white(grey(GREY), ALPHA),
            1,
        ),
        "one_bit.png": Animal(pillow(Image.fromarray(two).convert("1"), "PNG"), grey(two)),
        "turned.png": Animal(pillow(stored_for(6, PICTURE), "PNG", exif=turned_exif(6)), PICTURE),
        "rgb.bmp": Animal(pillow(PICTURE, "BMP"), PICTURE),
        "palette.bmp": Animal(pillow(palette(PICTURE), "BMP"), few),
        "rgb.gif": Animal(pillow(palette(PICTURE), "GIF"), few),
        "clear.gif": Animal(pillow(clear, "GIF", transparency=index), see_through),
        "moving.gif": Animal(pillow(palette(PICTURE), "GIF", save_all=True, append_images=[other.quantize()]), few),
        "rgb.webp": Animal(pillow(PICTURE, "WEBP", lossless=True), PICTURE),
        "rgba.webp": Animal(pillow(rgba(), "WEBP", lossless=True, exact=True), on_white(PICTURE, ALPHA), 1),
        "turned.webp": Animal(pillow(stored_for(8, PICTURE), "WEBP", lossless=True, exif=turned_exif(8)), PICTURE),
        "rgb.ppm": Animal(pillow(PICTURE, "PPM"), PICTURE),
        "grey.pgm": Animal(pillow(GREY, "PPM"), grey(GREY)),
        "one_bit.pbm": Animal(pillow(Image.fromarray(two).convert("1"), "PPM"), grey(two)),
        "text.pnm": Animal(text.encode(), PICTURE),
        "rgb.tif": Animal(pillow(PICTURE, "TIFF"), PICTURE),
        "lzw.tif": Animal(pillow(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE),
        "jpeg.tif": Animal(pillow(PICTURE, "TIFF", compression="jpeg", quality=98), PICTURE, 24),
        "tiled.tif": Animal(tiff(PICTURE, tile=(16, 16), compression="zlib"), PICTURE),
        "planar.tif": Animal(tiff(np.moveaxis(PICTURE, -1, 0), photometric="rgb", planarconfig="separate"), PICTURE),
        "big_endian.tif": Animal(tiff(PICTURE, byteorder=">"), PICTURE),
        "bigtiff.tif": Animal(tiff(PICTURE, bigtiff=True), PICTURE),
        "white_is_zero.tif": Animal(tiff(255 - GREY, photometric="miniswhite"), grey(GREY)),
        "cmyk.tif": Animal(
            pillow(Image.fromarray(PICTURE).convert("CMYK"), "TIFF"),
            np.asarray(Image.fromarray(PICTURE).convert("CMYK").convert("RGB")),
        ),
        "rgba.tif": Animal(tiff(rgba(), photometric="rgb", extrasamples=["unassalpha"]), on_white(PICTURE, ALPHA), 1),
        "turned.tif": Animal(tiff(stored_for(6, PICTURE), extratags=[(274, "H", 1, 6, True)]), PICTURE),
        "pages.tif": Animal(pillow(PICTURE, "TIFF", save_all=True, append_images=[other]), PICTURE),
    }


def deep() -> dict[str, Animal]:
    """More than eight bits: without a range the type's own, else that of the data set; floats, no level lost."""
    sixteen = DEEP / 257.0
    alpha16 = (ALPHA.astype(np.uint16) * 257)[..., None]
    hounsfield = (TWELVE.astype(np.int32) - 1024).astype(np.int16)
    # A slice of the same scan without air: the same tissue has to have the same grey.
    bone = hounsfield.clip(8, None)
    reflectance = (TWELVE.astype(np.float32) * 0.8 + 200).astype(np.float32)
    holed = reflectance.copy()
    holed[3:6, 4:9] = -9999
    full = stretched(reflectance, 200, 3000)
    nothing = full.copy()
    nothing[3:6, 4:9] = 0
    nan = reflectance.copy()
    nan[3:6, 4:9] = np.nan
    unit = DEEP.astype(np.float32) / 65535
    pgm = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP[..., 0].astype(">u2").tobytes()
    tolerance = 1e-3
    return {
        "grey16.png": Animal(png16(DEEP[..., :1]), grey(sixteen[..., 0]), tolerance),
        "rgb16.png": Animal(png16(DEEP), sixteen, tolerance),
        "rgba16.png": Animal(png16(np.dstack([DEEP, alpha16])), on_white(sixteen, ALPHA), tolerance),
        "grey_alpha16.png": Animal(
            png16(np.dstack([DEEP[..., :1], alpha16])), on_white(grey(sixteen[..., 0]), ALPHA), tolerance
        ),
        "grey16.pgm": Animal(pgm, grey(sixteen[..., 0]), tolerance),
        "twelve_in_sixteen.png": Animal(
            png16(TWELVE[..., None]), grey(stretched(TWELVE, 0, 4095)), tolerance, 3, (0, 4095)
        ),
        "grey16.tif": Animal(tiff(DEEP[..., 0], photometric="minisblack"), grey(sixteen[..., 0]), tolerance),
        "grey16_lzw.tif": Animal(
            pillow(DEEP[..., 0], "TIFF", compression="tiff_lzw"), grey(sixteen[..., 0]), tolerance
        ),
        "grey16_big.tif": Animal(
            tiff(DEEP[..., 0], photometric="minisblack", byteorder=">"), grey(sixteen[..., 0]), tolerance
        ),
        "grey16_white_is_zero.tif": Animal(
            tiff(65535 - DEEP[..., 0], photometric="miniswhite"), grey(sixteen[..., 0]), tolerance
        ),
        "rgb16.tif": Animal(tiff(DEEP, photometric="rgb"), sixteen, tolerance),
        "rgb16_turned.tif": Animal(
            tiff(stored_for(6, DEEP), photometric="rgb", extratags=[(274, "H", 1, 6, True)]), sixteen, tolerance
        ),
        "uint32.tif": Animal(
            tiff(DEEP[..., 0].astype(np.uint32) * 65537, photometric="minisblack"), grey(sixteen[..., 0]), tolerance
        ),
        "ct_air.tif": Animal(
            tiff(hounsfield, photometric="minisblack"),
            grey(stretched(hounsfield, -1024, 2048)),
            tolerance,
            3,
            (-1024, 2048),
        ),
        "ct_bone.tif": Animal(
            tiff(bone, photometric="minisblack"), grey(stretched(bone, -1024, 2048)), tolerance, 3, (-1024, 2048)
        ),
        "float_unit.tif": Animal(tiff(unit[..., 0], photometric="minisblack"), grey(sixteen[..., 0]), tolerance),
        "float_rgb.tif": Animal(tiff(unit, photometric="rgb"), sixteen, tolerance),
        "double_unit.tif": Animal(
            tiff((DEEP[..., 0] / 65535).astype(np.float64), photometric="minisblack"), grey(sixteen[..., 0]), tolerance
        ),
        "reflectance.tif": Animal(tiff(reflectance, photometric="minisblack"), grey(full), tolerance, 3, (200, 3000)),
        "reflectance_nodata.tif": Animal(
            tiff(holed, photometric="minisblack", extratags=[(42113, "s", 0, "-9999", True)]),
            grey(nothing),
            tolerance,
            3,
            (200, 3000),
        ),
        "reflectance_nan.tif": Animal(tiff(nan, photometric="minisblack"), grey(nothing), tolerance, 3, (200, 3000)),
    }


def channels() -> dict[str, Animal]:
    """Five channels as microscopes and satellites write them."""
    planes = np.stack([(DEEP[..., 0] + 4001 * number) % 60000 for number in range(5)]).astype(np.uint16)
    pixels = np.moveaxis(planes, 0, -1) / 257.0
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for plane in planes:
            writer.write(plane, contiguous=False, photometric="minisblack")
    written = {
        "pages5.tif": file.getvalue(),
        "imagej5.tif": tiff(planes, imagej=True, metadata={"axes": "CYX"}),
        "ome5.tif": tiff(planes, ome=True, metadata={"axes": "CYX"}, photometric="minisblack"),
        "planar5.tif": tiff(planes, photometric="minisblack", planarconfig="separate"),
        "contiguous5.tif": tiff(np.moveaxis(planes, 0, -1), photometric="minisblack", planarconfig="contig"),
    }
    found = {name: Animal(data, pixels, 1e-3, 5) for name, data in written.items()}
    luma = PICTURE @ np.array([0.299, 0.587, 0.114])
    found["rgb_for_one.png"] = Animal(pillow(PICTURE, "PNG"), luma[..., None], 1, 1)
    found["grey_for_one.png"] = Animal(pillow(GREY, "PNG"), GREY[..., None], 0, 1)
    found["grey16_for_one.png"] = Animal(png16(DEEP[..., :1]), DEEP[..., :1] / 257.0, 1e-3, 1)
    return found


def dicom(values: np.ndarray, photometric: str, bits: int, **elements: Any) -> bytes:
    """A DICOM file of one picture, (H, W) or (H, W, 3)."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 1 if values.ndim == 2 else 3
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated, data.BitsStored, data.HighBit = values.dtype.itemsize * 8, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def medical() -> dict[str, Animal]:
    """DICOM: twelve bits, white as zero, a rescale to Hounsfield units, a window, colour."""
    whole = grey(stretched(TWELVE, 0, 4095))
    hounsfield = TWELVE.astype(np.float64) - 1024
    # Window centre 40, width 400: black up to 39.5 - 199.5, white from 39.5 + 199.5 (DICOM PS3.3, C.11.2.1.2).
    window = grey(stretched(hounsfield, -160, 239))
    scale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    return {
        "twelve.dcm": Animal(dicom(TWELVE, "MONOCHROME2", 12), whole, 1e-3),
        "white_is_zero.dcm": Animal(dicom(4095 - TWELVE, "MONOCHROME1", 12), whole, 1e-3),
        "rgb.dcm": Animal(dicom(PICTURE, "RGB", 8), PICTURE),
        "ct_window.dcm": Animal(
            dicom(TWELVE, "MONOCHROME2", 12, WindowCenter=40, WindowWidth=400, **scale), window, 1e-3
        ),
        "ct_range.dcm": Animal(
            dicom(TWELVE, "MONOCHROME2", 12, WindowCenter=40, WindowWidth=400, **scale),
            grey(stretched(hounsfield, -1024, 2048)),
            1e-3,
            3,
            (-1024, 2048),
        ),
        "ct_signed.dcm": Animal(
            dicom(hounsfield.astype(np.int16), "MONOCHROME2", 16),
            grey(stretched(hounsfield, -1024, 2048)),
            1e-3,
            3,
            (-1024, 2048),
        ),
    }


def zoo() -> dict[str, Animal]:
    """Every file by its name."""
    return {**eight_bits(), **jpegs(), **deep(), **channels(), **medical()}


def write_planes(path: Path, planes: np.ndarray) -> None:
    """(C, H, W) uint16 as a PNG of one channel or a TIFF of planes; the ending is added to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(planes) == 1:
        Image.fromarray(planes[0]).save(path.with_suffix(".png"))
    else:
        tifffile.imwrite(path.with_suffix(".tif"), planes, photometric="minisblack", planarconfig="separate")
