from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import photograph
from PIL import Image

from dinoreg.data import decode, statistics
from dinoreg.data.statistics import inspect_source, render_inspection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    sizes = [(36, 60), (50, 50), (90, 70)]
    for index, (height, width) in enumerate(sizes):
        photograph(index, height, width).save(root / f"{index}.png")
    photograph(5, 64, 64).convert("L").save(root / "grey.jpg")
    shutil.copy(root / "1.png", root / "copy of 1.png")
    (root / "text.jpg").write_text("hello")
    return root


def test_formats_sizes_bad_files_and_duplicates_are_found(folder: Path) -> None:
    found = inspect_source(folder)
    assert (found["images"], found["looked_at"]) == (6, 6)
    assert found["formats"] == {"PNG": 4, "JPEG": 1}
    assert found["modes"] == {"RGB": 4, "L": 1}
    assert found["shorter_side"] == {"p0": 36, "p5": 39, "p50": 50, "p95": 69, "p100": 70}
    assert found["height"]["p100"] == 90
    assert (found["crop_size"], found["small"]) == (40, 1)  # those of the config `small`
    assert found["bad"] == {str(folder / "text.jpg"): "not an image in a known format"}
    assert found["duplicates"] == [[str(folder / "1.png"), str(folder / "copy of 1.png")]]


def test_pixel_statistics_equal_those_of_all_pixels_together(tmp_path: Path) -> None:
    pixels = []
    for index in range(3):
        image = photograph(index, 30, 20)
        image.save(tmp_path / f"{index}.png")
        pixels.append(np.asarray(image).reshape(-1, 3) / 255)
    found = inspect_source(tmp_path)
    np.testing.assert_allclose(found["mean"], np.concatenate(pixels).mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found["std"], np.concatenate(pixels).std(axis=0), atol=1e-4)


def test_a_sample_is_spread_over_the_source() -> None:
    found = inspect_source("scenes:count=1000,size=16", sample=4)
    assert (found["images"], found["looked_at"]) == (1000, 4)
    assert found["formats"] == {"array": 4}


def test_the_text_names_every_finding(folder: Path) -> None:
    text = render_inspection(inspect_source(folder))
    for part in (
        "6 images",
        "PNG 4, JPEG 1",
        "RGB 4, L 1",
        "text.jpg: not an image",
        "duplicates: 1",
        "augment.mean=[",
    ):
        assert part in text
    assert "smaller than the 40-pixel crop: 1" in text


def test_a_folder_of_bad_files_alone_is_described_too(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    found = inspect_source(tmp_path)
    assert found["mean"] is None
    assert "bad: 1" in render_inspection(found)


def test_a_picture_is_summed_in_parts_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_SUMMED", 7)
    values = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = inspect_source(tmp_path)
    np.testing.assert_allclose(found["mean"], values.mean((0, 1)) / 255, atol=6e-5)  # four decimals
    np.testing.assert_allclose(found["std"], values.std((0, 1)) / 255, atol=6e-5)


def test_enormous_pictures_are_looked_at_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working, most = [], []

    class Watched(statistics.EncodedImage):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            working.append(1)
            most.append(len(working))
            time.sleep(0.02)
            super().__init__(*arguments, **options)
            working.pop()

    monkeypatch.setattr(statistics, "EncodedImage", Watched)
    for number in range(6):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
    inspect_source(tmp_path)
    assert max(most) > 1
    monkeypatch.setattr(decode, "_LARGE", 1000)
    most.clear()
    inspect_source(tmp_path)
    assert max(most) == 1
