"""Images as an evaluation sees them, against torchvision's evaluation transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photograph
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from dinoreg.data.center_crop import center_crop, center_crops
from dinoreg.data.open import open_source


def torchvision_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.CenterCrop(size)(resize(image))


def pixels(height: int, width: int, channels: int = 3) -> torch.Tensor:
    image = torch.from_numpy(np.array(photograph(height * width, height, width))).permute(2, 0, 1)
    return image[[0] * channels] if channels != 3 else image


@pytest.mark.parametrize(
    ("height", "width"),
    [(48, 48), (24, 24), (61, 90), (90, 61), (37, 200), (53, 54), (24, 31), (10, 17), (25, 24), (97, 151)],
)
def test_a_centre_crop_equals_torchvisions_resize_and_centre_crop(height: int, width: int) -> None:
    for channels in (1, 3):
        image = pixels(height, width, channels)
        crop = center_crop(image, 24)
        assert crop.shape == (channels, 24, 24)
        assert crop.dtype == torch.uint8
        assert torch.equal(crop, torchvision_crop(image, 24))


def test_every_aspect_of_a_small_image_is_cropped_where_torchvision_crops_it() -> None:
    for width in range(16, 60):
        image = pixels(16, width)
        assert torch.equal(center_crop(image, 8), torchvision_crop(image, 8)), width
        assert torch.equal(center_crop(image.mT, 8), torchvision_crop(image.mT, 8)), width


def test_pixels_with_channels_innermost_give_the_same_crop() -> None:
    image = pixels(61, 90)
    innermost = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(center_crop(innermost, 24), center_crop(image.contiguous(), 24))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = pixels(24, 24)
    assert torch.equal(center_crop(image, 24), image)
    wide = pixels(24, 31)
    assert torch.equal(center_crop(wide, 24), wide[:, :, 4:28])  # 3.5 pixels to each side: rounded to even


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
        assert torch.equal(row, torchvision_crop(image, 16))


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
