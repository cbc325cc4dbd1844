"""Odd files have the pixels that they stand for, in every consumer."""

import numpy as np
import pytest
import torch
from zoo import zoo

from dinoreg.data.decode import decode
from dinoreg.data.value_range import ValueRange

ZOO = zoo()


def value_range(limits: tuple[float, float] | None) -> ValueRange | None:
    return None if limits is None else ValueRange((limits[0],), (limits[1],))


@pytest.mark.parametrize("name", ZOO)
def test_a_file_has_the_pixels_that_it_stands_for(name: str) -> None:
    animal = ZOO[name]
    pixels = decode(animal.data, animal.in_channels, value_range=value_range(animal.value_range))
    found = pixels.permute(1, 2, 0).double().numpy()
    assert found.shape == animal.pixels.shape
    assert np.abs(found - animal.pixels).max() <= animal.tolerance
    assert pixels.dtype in (torch.uint8, torch.float32)
