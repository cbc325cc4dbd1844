"""Truths of pictures that EXIF turns lie over the upright picture, whichever way they were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_picture, to_array
from dinoreg.runtime.errors import UserError

UPRIGHT = (20, 28)  # height, width that a viewer shows
# numpy's way from the upright picture to the one that is stored under an orientation
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def planted(height: int, width: int) -> np.ndarray:
    """A mask without any symmetry."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[2:9, 3:8] = mask[4:7, 8:17] = 1
    return mask


def save(values: np.ndarray, path: Path, orientation: int = 1, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(values))
    if path.suffix == ".tif":
        picture.save(path, tiffinfo={274: orientation}, **options)
    else:
        picture.save(path, exif=exif, **options)


def pair(
    folder: Path, number: int, orientation: int, drawn_on: str, size: tuple[int, int] = UPRIGHT, tag: int = 1,
    ending: str = ".png",
) -> None:  # fmt: skip
    """A picture stored under an orientation, bright where its mask is 1; the mask as shown, or as stored."""
    split, mask = ("test" if number == 1 else "train"), planted(*size)
    bright = np.repeat((mask * 200)[..., None], 3, axis=2)
    save(STORED[orientation](bright), folder / "images" / split / f"{number}{ending}", orientation)
    drawn = mask if drawn_on == "shown" else STORED[orientation](mask)
    save(drawn, folder / "masks" / split / f"{number}.png", tag)


def read(folder: Path) -> Data:
    return own_benchmark(folder, {}).tasks[0].read(folder, {})


def lie_over_each_other(data: Data, split: str, index: int) -> bool:
    pixels = to_array(read_picture(data.splits[split].source, index))[..., 0]
    mask = data.splits[split].mask(index)
    return mask.shape == pixels.shape and np.array_equal(mask == 1, pixels > 100)


def unclear(data: Data) -> list[str]:
    """Its warnings on truths that could lie either way; the pictures are copies of each other, which is said too."""
    return [each for each in data.extra["warnings"] if each.startswith("turned pictures")]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on", ["shown", "stored"])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_a_truth_lies_over_its_upright_picture(tmp_path: Path, orientation: int, drawn_on: str, ending: str) -> None:
    pair(tmp_path, 0, orientation, drawn_on, ending=ending)
    pair(tmp_path, 1, orientation, drawn_on, ending=ending)
    # Of half turns and mirrors the size says nothing: a picture on its side shows how the masks were drawn.
    pair(tmp_path, 2, 6, drawn_on)
    data = read(tmp_path)
    assert lie_over_each_other(data, "test", 0)
    assert all(lie_over_each_other(data, "train", index) for index in (0, 1))
    assert len(unclear(data)) == (orientation in (2, 3, 4))


@pytest.mark.parametrize("drawn_on", ["shown", "stored"])
def test_of_a_square_picture_the_truths_own_tag_decides(tmp_path: Path, drawn_on: str) -> None:
    for number in range(2):
        pair(tmp_path, number, 6, drawn_on, size=(28, 28), tag=6 if drawn_on == "stored" else 1)
    data = read(tmp_path)
    assert lie_over_each_other(data, "test", 0)
    said = "turned pictures: 2 are turned by EXIF, which keeps their size: their masks were taken to lie upright"
    assert unclear(data) == ([said] if drawn_on == "shown" else [])


def test_a_tag_that_was_copied_to_an_upright_truth_turns_nothing(tmp_path: Path) -> None:
    for number in range(2):
        pair(tmp_path, number, 6, "shown", tag=6)
    assert lie_over_each_other(read(tmp_path), "test", 0)


def test_depth_is_turned_alike(tmp_path: Path) -> None:
    for split in ("train", "test"):
        mask = planted(*UPRIGHT)
        save(STORED[8](np.repeat((mask * 200)[..., None], 3, axis=2)), tmp_path / "images" / split / "0.jpg", 8)
        (tmp_path / "depth" / split).mkdir(parents=True)
        np.save(tmp_path / "depth" / split / "0.npy", STORED[8](1.0 + mask))
    assert np.array_equal(read(tmp_path).splits["test"].depth(0), 1.0 + planted(*UPRIGHT))


def test_a_truth_of_neither_size_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        pair(tmp_path, number, 6, "shown")
    save(planted(20, 27), tmp_path / "masks" / "test" / "1.png")
    with pytest.raises(UserError, match=r"1\.png: is 27 x 20 pixels, its image 1\.png is 28 x 20, turned upright"):
        read(tmp_path)
