"""A picture that is thousands of times longer than wide costs no consumer more than its own pixels and its crop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional._geometry as torchvision_geometry
from PIL import Image

from dinoreg.data.center_crop import center_crops
from dinoreg.data.open import open_source
from dinoreg.data.source import PathSource
from dinoreg.evaluation.data import DepthMaps, Segmented
from dinoreg.evaluation.dense import depth_images
from dinoreg.evaluation.dense.pictures import draw_boxes, widened
from dinoreg.evaluation.features.images import CentreCrop, read_picture, shown
from dinoreg.evaluation.protocols import segmentation
from dinoreg.evaluation.protocols.classification import framed
from dinoreg.evaluation.protocols.linear import random_resized_crop
from dinoreg.visualize.gallery import tile

SHORT, LONG, SIZE = 20, 60_000, 224
MOST = SHORT * LONG  # pixels, those of the picture itself; the enlarged whole would have 672,000 x 224


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of pixels of the largest picture that anything has resized one to."""
    seen = [0]
    resize, interpolate = Image.Image.resize, F.interpolate

    def counted(image: Image.Image, size: Any, *arguments: Any, **options: Any) -> Image.Image:
        seen[0] = max(seen[0], int(size[0]) * int(size[1]))
        assert seen[0] <= MOST
        return resize(image, size, *arguments, **options)

    def interpolated(x: torch.Tensor, size: Any = None, *arguments: Any, **options: Any) -> torch.Tensor:
        height, width = (size, size) if isinstance(size, int) else size
        seen[0] = max(seen[0], int(height) * int(width))
        assert seen[0] <= MOST
        return interpolate(x, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    monkeypatch.setattr(F, "interpolate", interpolated)
    monkeypatch.setattr(torchvision_geometry, "interpolate", interpolated)
    yield seen
    assert seen[0] > 0


@pytest.fixture(params=["wide", "high"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> PathSource:
    noise = np.random.default_rng(0).integers(0, 256, (SHORT, LONG, 3), dtype=np.uint8)
    Image.fromarray(noise if request.param == "wide" else noise.transpose(1, 0, 2)).save(tmp_path / "strip.png")
    found = open_source(tmp_path)
    assert isinstance(found, PathSource)
    return found


@pytest.mark.parametrize("own", [True, False])
def test_no_consumer_enlarges_the_whole(own: bool, source: PathSource, largest: list[int]) -> None:
    source.as_trained = own
    rng, picture = np.random.default_rng(0), read_picture(source, 0)
    assert CentreCrop(SIZE, SIZE)(picture).shape == CentreCrop(256, SIZE)(picture).shape == (SIZE, SIZE, 3)
    assert random_resized_crop(picture, SIZE, rng).shape == (SIZE, SIZE, 3)
    image = shown(picture)
    framed(image, 96, 4, (0, 0, 0))
    widened(image)
    tile(np.asarray(image), 96)
    draw_boxes(image, np.zeros((0, 4)), (0, 0, 0))
    mask = np.zeros((image.height, image.width), np.uint8)
    segmented = Segmented(source, lambda _: mask, 2)
    segmentation.training_crop(*segmentation.read_pair(segmented, 0), SIZE, [0] * 3, rng)
    depths = DepthMaps(source, lambda _: mask + np.float32(1))
    read, metres = depth_images.read_pair(depths, 0)
    depth_images.training_crop(depth_images.as_seen(read, 640), metres, (SIZE, SIZE), None, rng)


def test_own_pictures_are_cropped_before_they_are_resized(source: PathSource, largest: list[int]) -> None:
    images, _ = center_crops(source, [0], SIZE)
    assert images.shape == (1, 3, SIZE, SIZE)
    largest[0] = 1  # nothing but the window was computed


@pytest.mark.parametrize("resize", [96, 110, 128])
def test_the_crop_of_a_strip_is_that_of_the_whole(resize: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (24, 24 * 40, 3), dtype=np.uint8)
    for pixels in (noise, noise.transpose(1, 0, 2), np.kron(noise, np.ones((5, 5, 1), np.uint8))[:, ::2]):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        scale = resize / min(image.size)
        whole = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = round((whole.width - 96) / 2), round((whole.height - 96) / 2)
        expected = np.asarray(whole.crop((left, top, left + 96, top + 96)))
        np.testing.assert_array_equal(CentreCrop(resize, 96)(image), expected)
