from __future__ import annotations

import io
import struct
import warnings
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
import torchvision
from PIL import Image, ImageOps

from dinoreg.data import decode as decode_module
from dinoreg.data.decode import BadImage, EncodedImage, decode
from dinoreg.data.value_range import ValueRange

PHOTO = Image.fromarray(skimage.data.astronaut()).crop((60, 10, 260, 160))  # 200 x 150


def encoded(image: Image.Image = PHOTO, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(data: bytes, **options: Any) -> np.ndarray:
    return decode(data, **options).permute(1, 2, 0).numpy()


def close(a: np.ndarray, b: np.ndarray, levels: float) -> bool:
    return bool(a.shape == b.shape and np.abs(a.astype(float) - b.astype(float)).mean() <= levels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_give_their_exact_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = EncodedImage(encoded(kind=kind, **options))
    assert (image.format, image.height, image.width) == (kind, 150, 200)
    assert np.array_equal(image.pixels().permute(1, 2, 0).numpy(), np.asarray(PHOTO))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}])
def test_jpeg_equals_pillows_decoding(options: dict[str, Any]) -> None:
    data = encoded(**options)
    assert close(array(data), np.asarray(Image.open(io.BytesIO(data))), 0.5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_jpeg_has_the_pixels_of_torchvisions_decoder(kind: str, channels: int) -> None:
    data = encoded(PHOTO.convert(kind))
    mode = torchvision.io.ImageReadMode.RGB if channels == 3 else torchvision.io.ImageReadMode.GRAY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and for that reason not what we call
        expected = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    assert decode_module._jpeg_operator() is not None
    assert torch.equal(decode(data, channels), expected)


def test_without_torchvisions_decoder_or_with_another_one_jpegs_go_through_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = decode_module._jpeg_operator.__wrapped__
    assert find() is not None
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace())
    assert find() is None
    data = encoded()
    # One that takes other arguments raises what torch does.
    for operator in (None, lambda *arguments: torch.ops.aten.relu(*arguments)):
        monkeypatch.setattr(decode_module, "_jpeg_operator", lambda operator=operator: operator)
        assert np.array_equal(array(data), np.asarray(Image.open(io.BytesIO(data))))
        assert close(array(data, in_channels=1), np.asarray(PHOTO.convert("L"))[..., None], 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind=kind, exif=exif)
    image = EncodedImage(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (image.height, image.width) == expected.shape[:2]
    assert close(image.pixels().permute(1, 2, 0).numpy(), expected, 0.5)


def test_orientation_and_reduction_go_together() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(exif=exif)
    reduced = EncodedImage(data).pixels(2).permute(1, 2, 0).numpy()
    full = Image.fromarray(array(data)).resize((75, 100), Image.Resampling.BOX)
    assert close(reduced, np.asarray(full), 3)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_is_the_small_picture(reduction: int) -> None:
    data = encoded()
    reduced = EncodedImage(data).pixels(reduction).permute(1, 2, 0).numpy()
    size = (-(-200 // reduction), -(-150 // reduction))
    assert close(reduced, np.asarray(PHOTO.resize(size, Image.Resampling.BOX)), 6)


def test_cmyk_grey_palette_and_one_bit_become_rgb() -> None:
    grey = PHOTO.convert("L")
    assert close(array(encoded(PHOTO.convert("CMYK"))), np.asarray(PHOTO), 4)
    assert close(array(encoded(grey)), np.asarray(grey.convert("RGB")), 3)
    assert np.array_equal(array(encoded(grey, "PNG")), np.asarray(grey.convert("RGB")))
    palette = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(array(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert np.array_equal(array(encoded(PHOTO.convert("1"), "PNG")), np.asarray(PHOTO.convert("1").convert("RGB")))


def test_alpha_is_composited_on_white() -> None:
    image = PHOTO.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    alpha = np.asarray(image)[..., 3:] / 255
    expected = np.asarray(PHOTO) * alpha + 255 * (1 - alpha)
    assert close(array(encoded(image, "PNG")), expected, 1)
    clear = Image.new("P", (4, 4), 0)
    assert (array(encoded(clear, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_pixels_keep_their_whole_range(kind: str) -> None:
    deep = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    pixels = array(encoded(Image.fromarray(deep), kind))
    expected = np.rint(deep / 257.0)
    assert np.abs(pixels - expected[:, :, None]).max() <= 1
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_float_tiff_is_of_0_to_1_or_needs_a_range() -> None:
    unit = np.random.default_rng(0).random((9, 11), dtype=np.float32)
    wide = encoded(Image.fromarray(np.linspace(-50, 3000, 99).reshape(9, 11).astype(np.float32)), "TIFF")
    assert np.abs(array(encoded(Image.fromarray(unit), "TIFF"))[..., 0] - unit * 255).max() <= 1e-4
    with pytest.raises(BadImage, match=r"from -50 to 3000: data.range="):
        decode(wide)
    pixels = array(wide, value_range=ValueRange((-50,), (3000,)))[..., 0]
    assert np.abs(pixels.ravel() - np.linspace(0, 255, 99)).max() < 1e-3


def test_many_band_tiff_gives_its_bands_in_either_planar_order() -> None:
    bands = np.random.default_rng(0).integers(0, 65536, (10, 12, 6), dtype=np.uint16)
    for stored, options in (
        (bands, {"planarconfig": "contig"}),
        (bands.transpose(2, 0, 1), {"planarconfig": "separate"}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, np.ascontiguousarray(stored), photometric="minisblack", **options)
        pixels = array(file.getvalue(), in_channels=6)
        assert np.abs(pixels - bands / 257.0).max() <= 0.51
        with pytest.raises(BadImage, match="channels, expected 5"):
            decode(file.getvalue(), in_channels=5)


@pytest.mark.parametrize("kind", ["contig", "separate", "pages"])
def test_three_bands_of_16_bits_are_three_channels_however_they_are_stored(kind: str) -> None:
    bands, file = np.random.default_rng(0).integers(0, 65536, (10, 12, 3), dtype=np.uint16), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        if kind == "pages":
            for band in bands.transpose(2, 0, 1):
                writer.write(band, photometric="minisblack", metadata=None)
        else:
            stored = bands if kind == "contig" else bands.transpose(2, 0, 1)
            writer.write(np.ascontiguousarray(stored), photometric="minisblack", planarconfig=kind)
    np.testing.assert_allclose(array(file.getvalue()), bands / 257.0, atol=1e-3)


def test_one_channel_is_luma_whatever_the_format() -> None:
    expected = np.asarray(PHOTO.convert("L"))[..., None]
    assert close(array(encoded(kind="PNG"), in_channels=1), expected, 0.01)
    assert close(array(encoded(quality=95), in_channels=1), expected, 2)
    assert close(array(np.asarray(PHOTO), in_channels=1), expected, 0.6)


def test_an_animation_gives_its_first_frame() -> None:
    other = Image.new("RGB", PHOTO.size)
    data = encoded(kind="WEBP", save_all=True, append_images=[other], lossless=True)
    assert np.array_equal(array(data), np.asarray(PHOTO))


def test_a_truncated_file_is_bad_whatever_its_format() -> None:
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF"):
        data = encoded(kind=kind)
        for share in (0.02, 0.5, 0.9, 0.99):
            with pytest.raises(BadImage):
                decode(data[: int(len(data) * share)])
    progressive = encoded(progressive=True)
    with pytest.raises(BadImage, match="truncated"):
        EncodedImage(progressive[: len(progressive) // 2]).pixels(2)


def test_what_is_no_image_is_bad_with_a_short_reason() -> None:
    for data, reason in (
        (b"", "empty"),
        (b"just some text\n" * 20, "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (np.random.default_rng(0).bytes(500), "not an image"),
    ):
        with pytest.raises(BadImage, match=reason) as caught:
            decode(data)
        assert "\n" not in str(caught.value)


def test_a_random_flip_of_bytes_never_raises_anything_but_bad_image() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "BMP", "WEBP"):
        data = np.frombuffer(encoded(PHOTO.resize((24, 20)), kind), dtype=np.uint8)
        outcomes = set()
        for _ in range(40):
            broken = data.copy()
            broken[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
            try:
                outcomes.add(tuple(decode(broken.tobytes(), max_pixels=10_000).shape[:1]))
            except BadImage:
                outcomes.add("bad")
        assert outcomes <= {(3,), "bad"}


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 12_000, 9_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="12000x9000 pixels, more than the limit of 100000000"):
        EncodedImage(bomb, max_pixels=100_000_000)
    with pytest.raises(BadImage, match="200x150 pixels"):
        EncodedImage(encoded(), max_pixels=29_999)


def test_an_image_of_one_pixel_is_too_small_to_crop() -> None:
    with pytest.raises(BadImage, match="1x1 pixels"):
        EncodedImage(encoded(Image.new("RGB", (1, 1)), "PNG"))


def test_the_header_of_a_jpeg_is_read_without_decoding() -> None:
    for picture, components in ((PHOTO, 3), (PHOTO.convert("L"), 1), (PHOTO.convert("CMYK"), 4)):
        whole = encoded(picture, progressive=True)
        image = EncodedImage(whole[: len(whole) // 2])  # what is cut off is found out when it is decoded
        assert (image.height, image.width, image.components, image.orientation) == (150, 200, components, 1)


def test_orientations_that_do_not_exist_and_broken_metadata_leave_a_picture_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    data = encoded(exif=exif)
    for odd in (
        data,
        encoded(kind="PNG", exif=exif),
        data.replace(b"MM\0*", b"XX\0*"),
        data.replace(b"MM\0*", b"MM\0\0"),
    ):
        image = EncodedImage(odd)
        assert (image.height, image.width, image.orientation) == (150, 200, 1)


def test_decoded_pixels_have_their_channels_innermost() -> None:
    for data in (encoded(), encoded(kind="PNG"), np.asarray(PHOTO)):
        assert decode(data).permute(1, 2, 0).is_contiguous()
        assert decode(data).dtype == torch.uint8
