"""Masks as files and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoreg.evaluation.dense.pictures import coloured, palette
from dinoreg.evaluation.readers.pixel_maps import read_mask
from dinoreg.runtime.errors import UserError


def test_the_palettes_colours_are_distinct_also_from_black_and_always_the_same() -> None:
    colours = palette(150).astype(int)
    assert colours.shape == (150, 3)
    with_black = np.concatenate([colours, np.zeros((1, 3), dtype=int)])
    apart = np.abs(with_black[:, None] - with_black[None]).sum(axis=2) + 999 * np.eye(151, dtype=int)
    assert apart.min() >= 19  # one step of the grid of colours
    few = np.concatenate([palette(6).astype(int), np.zeros((1, 3), dtype=int)])
    assert (np.abs(few[:, None] - few[None]).sum(axis=2) + 999 * np.eye(7)).min() > 100
    assert np.array_equal(palette(150), colours)
    assert np.array_equal(palette(20), colours[:20])


def test_masks_are_coloured_by_class_and_ignored_pixels_are_black() -> None:
    shown = coloured(np.array([[0, 2, 255]], dtype=np.uint8), 3)
    assert shown.tolist() == [[palette(3)[0].tolist(), palette(3)[2].tolist(), [0, 0, 0]]]


def test_masks_keep_their_numbers_whatever_kind_of_png_they_are(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 200], [7, 7, 0]], dtype=np.uint8)
    grey = Image.fromarray(numbers)
    grey.save(tmp_path / "grey.png")
    indexed = grey.copy()
    indexed.putpalette([value for k in range(256) for value in (255 - k, k, 3)])
    indexed.save(tmp_path / "palette.png")
    Image.fromarray(numbers.astype(np.uint16) + 300).save(tmp_path / "deep.png")
    for name, first in (("grey", 0), ("palette", 0), ("deep", 300)):
        found = read_mask(tmp_path / f"{name}.png", range(first, first + 201), first - 1, "own")
        assert found.dtype == np.uint8
        assert found.tolist() == numbers.tolist()


def test_a_mask_that_is_not_one_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("L", (2, 3)).save(tmp_path / "good.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    for name, message in (
        ("none.png", r"own: .*none\.png cannot be read as a mask \(No such file"),
        ("colour.png", r"own: .*colour\.png is a picture in colour \(RGB\), expected a palette or grey PNG"),
        ("torn.png", r"own: .*torn\.png cannot be read as a mask"),
        ("good.png", r"own: .*good\.png has the value 0, expected 1\.\.2 or 255"),
    ):
        with pytest.raises(UserError, match=message):
            read_mask(tmp_path / name, range(1, 3), 255, "own")
