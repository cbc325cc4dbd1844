"""Positions by matrix products are those of PyTorch's bicubic kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinoreg.export.onnx_graph import resample_in_graph, resampling_matrix
from dinoreg.models.vit import resample_positions

GRIDS = [(16, 16), (5, 9), (37, 37), (1, 2)]
TARGETS = [(7, 7), (16, 16), (1, 2), (33, 40), (37, 16), (5, 9), (74, 3), (37, 37), (100, 2)]


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1), (False, 0.0), (True, 0.1)])
def test_the_matrices_equal_the_kernels_of_pytorch(antialias: bool, offset: float) -> None:
    for grid in GRIDS:
        for target in TARGETS:
            positions = torch.randn(1, grid[0] * grid[1], 3)
            expected = resample_positions(positions, grid, target, antialias, offset)
            found = resample_in_graph(positions.reshape(*grid, 3), target, antialias, offset)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=f"{grid} -> {target}")


@pytest.mark.parametrize("antialias", [True, False])
def test_one_extent_alone_equals_interpolation_of_the_identity(antialias: bool) -> None:
    for grid, target in ((16, 7), (7, 16), (37, 23), (14, 14)):
        identity = torch.eye(grid)[None, None]  # rows are samples; resample along them only
        expected = F.interpolate(identity, size=(target, grid), mode="bicubic", antialias=antialias)[0, 0]
        torch.testing.assert_close(resampling_matrix(target, grid, antialias), expected, rtol=0, atol=2e-6)


def test_a_grid_of_one_column_equals_the_kernel_too() -> None:
    # PyTorch's antialiased kernel gives wrong rows where the width is one, so height and width change places for it.
    positions = torch.randn(16, 16, 3)
    for target in ((33, 1), (5, 1), (1, 1)):
        image = positions.double().permute(2, 1, 0)[None]
        turned = F.interpolate(image, size=target[::-1], mode="bicubic", antialias=True)[0]  # (3, width, height)
        expected = turned.permute(2, 1, 0).reshape(1, -1, 3)
        found = resample_in_graph(positions, target, antialias=True)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_at_the_native_grid_positions_are_untouched_bit_for_bit(offset: float) -> None:
    positions = torch.randn(5, 9, 4)
    found = resample_in_graph(positions, (5, 9), antialias=not offset, offset=offset)
    assert torch.equal(found, positions.reshape(1, 45, 4))
