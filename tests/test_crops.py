from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from dinoreg.config.view_settings import CropSettings
from dinoreg.data.crops import (
    NUMBERS_PER_VIEW,
    cut_crop,
    place_boxes,
    reduce_box,
    reduction_for,
    relative_boxes,
)

SETTINGS = CropSettings(num_local=3)


def make_crops(image: torch.Tensor, boxes: list[tuple[int, int, int, int]], out: torch.Tensor) -> None:
    """Cut `boxes` of one image (C, H, W) uint8 into `out` (n, h, w, C) uint8, contiguous."""
    for row, box in zip(out.permute(0, 3, 1, 2).split(1), boxes):
        cut_crop(image, box, row)


def boxes_of(count: int, height: int, width: int, settings: CropSettings = SETTINGS) -> np.ndarray:
    numbers = np.random.default_rng(0).random((count, 2 + settings.num_local, NUMBERS_PER_VIEW))
    relative = relative_boxes(numbers, settings)
    return np.array([place_boxes(row, height, width, settings.ratio) for row in relative])


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_crops_equal_pillows_bicubic_resize_of_the_same_box(name: str) -> None:
    photo = getattr(skimage.data, name)()
    image = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)
    for size, which in ((224, slice(0, 2)), (98, slice(2, 5))):
        boxes = [tuple(box) for box in boxes_of(1, *photo.shape[:2])[0, which].tolist()]
        out = torch.zeros(len(boxes), size, size, 3, dtype=torch.uint8)
        make_crops(image, boxes, out)
        for crop, (top, left, height, width) in zip(out.numpy(), boxes):
            area = (left, top, left + width, top + height)
            pillow = np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BICUBIC, box=area))
            error = np.mean((crop.astype(float) - pillow.astype(float)) ** 2)
            assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 55


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_any_number_of_channels_and_any_layout_gives_the_same_crop(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (31, 47, channels), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    box = (3, 5, 20, 29)
    inner, outer = (torch.zeros(1, 16, 16, channels, dtype=torch.uint8) for _ in range(2))
    make_crops(image, [box], inner)
    make_crops(image.contiguous(), [box], outer)
    expected = torch.nn.functional.interpolate(
        image[None, :, 3:23, 5:34].float(), size=(16, 16), mode="bicubic", antialias=True
    )
    assert torch.equal(inner, outer)
    difference = (inner[0].permute(2, 0, 1).float() - expected[0].clamp(0, 255)).abs()
    assert difference.max() <= 1


def test_boxes_lie_inside_the_image_and_have_the_stated_areas_and_ratios() -> None:
    boxes = boxes_of(2000, 375, 500).astype(float)
    top, left, height, width = np.moveaxis(boxes, -1, 0)
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 375
    assert (left + width).max() <= 500
    area, ratio = height * width / (375 * 500), width / height
    for views, (low, high) in ((area[:, :2], SETTINGS.global_scale), (area[:, 2:], SETTINGS.local_scale)):
        assert views.min() >= low * 0.98
        assert views.max() <= high * 1.02
    assert abs(area[:, 2:].mean() - 0.185) < 0.005  # uniform in area: no local box is ever refused
    assert ratio.min() >= 0.73
    assert ratio.max() <= 1.37
    assert abs(np.log(ratio[:, 2:]).mean()) < 0.01


def test_boxes_have_the_distribution_of_torchvisions_random_resized_crop() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    photo = torch.empty(3, 200, 300)
    theirs = np.array([RandomResizedCrop.get_params(photo, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = boxes_of(2000, 200, 300)[:, :2].reshape(-1, 4)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=3)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), atol=3)


def test_an_image_too_long_for_any_box_gets_the_central_one() -> None:
    settings = CropSettings(num_local=0, global_scale=(0.9, 1.0))
    boxes = boxes_of(4, 20, 600, settings)
    assert (boxes == (0, (600 - 27) // 2, 20, 27)).all()
    assert (boxes_of(4, 600, 20, settings) == ((600 - 27) // 2, 0, 27, 20)).all()
    assert (boxes_of(4, 1, 1) == (0, 0, 1, 1)).all()


def test_a_jpeg_is_reduced_only_as_far_as_every_crop_keeps_its_pixels() -> None:
    assert reduction_for([(0, 0, 448, 500), (0, 0, 196, 300)], [224, 98]) == 2
    assert reduction_for([(0, 0, 448, 500), (0, 0, 195, 300)], [224, 98]) == 1
    assert reduction_for([(0, 0, 900, 900)], [224]) == 4
    assert reduction_for([(0, 0, 9000, 9000)], [224]) == 8
    assert reduction_for([(0, 0, 100, 100)], [224]) == 1


def test_a_reduced_box_covers_the_same_part_and_stays_inside() -> None:
    assert reduce_box((10, 20, 400, 301), 2, 250, 251) == (5, 10, 200, 150)
    for box in ((0, 0, 1, 1), (599, 799, 1, 1), (0, 0, 600, 800), (597, 3, 3, 797)):
        top, left, height, width = reduce_box(box, 8, 75, 100)
        assert height >= 1
        assert width >= 1
        assert 0 <= top <= 75 - height
        assert 0 <= left <= 100 - width
