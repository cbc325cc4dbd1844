"""The part of a picture that a model sees, against the transforms of torchvision and transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import photograph
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import dinoreg.data.center_crop as module
from dinoreg.data.center_crop import center_crop, center_crops
from dinoreg.data.open import open_source

SHAPES = [(48, 48), (24, 24), (61, 90), (90, 61), (37, 200), (53, 54), (24, 31), (10, 17), (25, 24), (97, 151)]


def torchvision_resize(image: torch.Tensor, size: int) -> torch.Tensor:
    return v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True)(image)


def torchvision_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    return v2.CenterCrop(size)(torchvision_resize(image, size))


def transformers_crop(image: torch.Tensor, size: int, short_side: int | None = None) -> torch.Tensor:
    """Its image processor's arithmetic, written out: the rest is halved and rounded down."""
    resized = torchvision_resize(image, short_side or size)
    top, left = (int((side - size) / 2.0) for side in resized.shape[1:])
    return resized[:, top : top + size, left : left + size]


def pixels(height: int, width: int, channels: int = 3) -> torch.Tensor:
    image = torch.from_numpy(np.array(photograph(height * width, height, width))).permute(2, 0, 1)
    return image[[0] * channels] if channels != 3 else image


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_a_centre_crop_is_that_of_transformers(height: int, width: int) -> None:
    for channels in (1, 3):
        for short_side in (None, 27, 35):
            image = pixels(height, width, channels)
            crop = center_crop(image, 24, short_side)
            assert crop.shape == (channels, 24, 24)
            assert crop.dtype == torch.uint8
            assert torch.equal(crop, transformers_crop(image, 24, short_side))


def test_every_aspect_of_a_small_image_is_cropped_where_the_libraries_crop_it() -> None:
    differ = 0
    for width in range(16, 60):
        image = pixels(16, width)
        for each in (image, image.mT):
            crop = center_crop(each, 8)
            assert torch.equal(crop, transformers_crop(each, 8)), width
            differ += not torch.equal(crop, torchvision_crop(each, 8))
    assert differ  # the libraries do not agree where three pixels in four are over


def test_a_crop_that_is_no_square_is_covered_and_central() -> None:
    image = pixels(50, 70)
    for shape in ((16, 64), (64, 16), (50, 70)):
        assert center_crop(image, shape).shape == (3, *shape)
        assert center_crop(image, shape, 2 * min(shape)).shape == (3, *shape)
    assert (center_crop(image, (50, 70)) == image).all()
    assert (center_crop(image, (50, 20)) == image[:, :, 25:45]).all()


@pytest.mark.parametrize(
    ("height", "width", "size", "short_side"),
    [
        (40, 600, 24, None),
        (600, 40, 24, 27),
        (7, 301, 64, None),
        (33, 5000, 32, 37),
        (3, 90, (16, 48), None),
        (16, 400, 16, None),
        (1, 300, 8, None),
        (2, 400, 60, None),
    ],
)
def test_of_a_long_picture_the_crop_alone_is_computed_and_equals_that_of_the_whole(
    height: int, width: int, size: Any, short_side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = 255 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    crop, deep = center_crop(noise.byte(), size, short_side), center_crop(noise.float(), size, short_side)
    monkeypatch.setattr(module, "MAX_ASPECT", math.inf)
    difference = (crop.int() - center_crop(noise.byte(), size, short_side).int()).abs()
    assert difference.max() <= 2  # one level for each axis: PyTorch's weights of bytes have 16 bits
    assert (difference > 0).float().mean() < 0.02
    torch.testing.assert_close(deep.double(), center_crop(noise, size, short_side), atol=1e-3, rtol=0)
    assert crop.shape == (3, *((size, size) if isinstance(size, int) else size))


def test_a_strip_of_a_million_pixels_takes_no_more_memory_than_its_crop() -> None:
    strip = torch.zeros(3, 2, 1_000_000, dtype=torch.uint8)  # the whole at this size would take 400 GB
    strip[:, :, 499_990:500_010] = 255
    for image in (strip, strip.mT, strip.float()):
        assert (center_crop(image, 518).round() == 255).all()


def test_pixels_with_channels_innermost_give_the_same_crop() -> None:
    image = pixels(61, 90)
    innermost = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(center_crop(innermost, 24), center_crop(image.contiguous(), 24))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = pixels(24, 24)
    assert torch.equal(center_crop(image, 24), image)
    wide = pixels(24, 31)
    assert torch.equal(center_crop(wide, 24), wide[:, :, 3:27])  # 3.5 pixels to each side


def test_still_images_keep_the_order_asked_for_and_leave_out_what_cannot_be_read(tmp_path: Path) -> None:
    for index in range(4):
        photograph(index, 40, 50).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "4.png").write_bytes(b"")
    source = open_source(tmp_path)
    images, kept = center_crops(source, [3, 1, 0, 4], 16)
    assert kept == [3, 0]
    for row, index in zip(images, kept):
        image = torch.from_numpy(np.array(Image.open(tmp_path / f"{index}.png"))).permute(2, 0, 1)
        assert torch.equal(row, transformers_crop(image, 16))


def test_a_file_that_has_gone_is_left_out_too(tmp_path: Path) -> None:
    for index in range(2):
        photograph(index, 40, 50).save(tmp_path / f"{index}.png")
    source = open_source(tmp_path)
    (tmp_path / "0.png").unlink()
    assert center_crops(source, [0, 1], 16)[1] == [1]


def test_no_readable_image_gives_an_empty_stack_of_the_right_shape(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    images, kept = center_crops(open_source(tmp_path), [0], 16, in_channels=1)
    assert images.shape == (0, 1, 16, 16)
    assert images.dtype == torch.uint8
    assert kept == []
