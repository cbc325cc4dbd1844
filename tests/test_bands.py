"""Pictures each channel of which is a file of its own, by a table with a column of paths for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
import torch
from PIL import Image
from small_runs import tiny_model, write_run
from zoo import stored_for, turned_exif

import dinoreg
from dinoreg.commands.main import main
from dinoreg.config.schema import DataConfig
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.data.decode import BadImage
from dinoreg.data.loader import BatchLoader, Views
from dinoreg.data.open import open_source, read_labelled
from dinoreg.data.source import JoinedSource, Source, WeightedSource
from dinoreg.data.statistics import inspect_source
from dinoreg.runtime.errors import UserError

NAMES = ("RED", "GREEN", "NIR", "SWIR")
COLUMNS = ",".join(f"path:{name}" for name in NAMES)


def scene(number: int, side: int = 40) -> np.ndarray:
    """(4, side, side) uint16 of twelve bits."""
    return np.random.default_rng(number).integers(0, 4096, (4, side, side)).astype(np.uint16)


def write_bands(root: Path, count: int = 6, labels: bool = False, suffix: str = ".csv") -> Path:
    """A table of pictures in four files each, in a folder a band; the last band of class "b" is brighter by half."""
    rows = []
    for number in range(count):
        planes = scene(number)
        if labels:
            planes[3] = planes[3] // 2 + 2048 * (number % 2)
        row = {}
        for name, plane in zip(NAMES, planes):
            path = root / name / f"{number:02}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, plane)
            row[name] = f"{name}/{number:02}.tif"
        rows.append(row | ({"class": "ab"[number % 2]} if labels else {}))
    return write_table(root / f"list{suffix}", rows)


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        cells = [[*rows[0]], *([*row.values()] for row in rows)]
        path.write_text("".join(("\t" if path.suffix == ".tsv" else ",").join(row) + "\n" for row in cells))
    return path


def of_files(folder: Path, **files: np.ndarray) -> Source:
    """A source of one picture in these files, which are written as their endings say."""
    for name, pixels in files.items():
        tifffile.imwrite(folder / f"{name}.tif", pixels)
    return listed(folder, *(f"{name}.tif" for name in files))


def listed(folder: Path, *names: str, **options: Any) -> Source:
    table = write_table(folder / "list.csv", [{f"c{number}": name for number, name in enumerate(names)}])
    return open_source(table, columns=",".join(f"path:c{number}" for number in range(len(names))), **options)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_files_become_channels_in_the_order_of_the_columns(suffix: str, tmp_path: Path) -> None:
    table = write_bands(tmp_path, suffix=suffix)
    source = open_source(table, columns="path:NIR,path:RED,path:SWIR", value_range=[0, 4095])
    assert len(source) == 6
    for number in range(6):
        assert source.name(number) == str(tmp_path / "NIR" / f"{number:02}.tif")
        expected = scene(number)[[2, 0, 3]].astype(np.float64) * (255 / 4095)
        torch.testing.assert_close(source.decode(number).numpy(), expected.astype(np.float32))


def test_every_channel_may_have_a_range(tmp_path: Path) -> None:
    source = of_files(tmp_path, a=scene(0)[0], b=scene(0)[1])
    source.value_range = open_source("scenes", value_range=[0, 4095, 1000, 2000]).value_range
    low, high = np.array([0, 1000])[:, None, None], np.array([4095, 2000])[:, None, None]
    expected = ((scene(0)[:2] - low) * (255 / (high - low))).clip(0, 255)
    torch.testing.assert_close(source.decode(0, 2).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pixels_of_every_type_are_those_of_one_file_with_all_channels(dtype: type, tmp_path: Path) -> None:
    planes = np.random.default_rng(1).random((4, 20, 24))
    planes = planes.astype(dtype) if dtype == np.float32 else (planes * np.iinfo(dtype).max).astype(dtype)
    source = of_files(tmp_path, a=planes[0], b=planes[1], c=planes[2], d=planes[3])
    (tmp_path / "whole").mkdir()
    tifffile.imwrite(tmp_path / "whole" / "x.tif", planes, photometric="minisblack", planarconfig="separate")
    whole = open_source(tmp_path / "whole").decode(0, 4)
    assert whole.dtype == source.decode(0, 4).dtype
    assert torch.equal(source.decode(0, 4), whole)


def test_what_a_file_says_of_its_pixels_is_heeded(tmp_path: Path) -> None:
    upright = (scene(0)[0, :20, :24] // 16).astype(np.uint8)
    for orientation in (1, 3, 6):
        stored = Image.fromarray(stored_for(orientation, upright))
        stored.save(tmp_path / f"{orientation}.png", exif=turned_exif(orientation))
    stored.save(tmp_path / "photo.jpg", exif=turned_exif(6), quality=95)
    Image.fromarray(np.dstack([upright] * 3)).save(tmp_path / "colour.png")
    seen = listed(tmp_path, "6.png", "1.png", "photo.jpg", "3.png", "colour.png").decode(0, 5).numpy()
    for channel in (0, 1, 3, 4):
        np.testing.assert_array_equal(seen[channel], upright)
    jpeg = np.rot90(np.asarray(Image.open(tmp_path / "photo.jpg")), -1)
    assert np.abs(seen[2].astype(int) - jpeg.astype(int)).max() <= 1

    missing = scene(1)[0].astype(np.int16)
    missing[3, 5] = -9999
    tifffile.imwrite(tmp_path / "m.tif", missing, extratags=[(42113, "s", 0, "-9999", True)])
    tifffile.imwrite(tmp_path / "n.tif", scene(1)[1].astype(np.int16))
    seen = listed(tmp_path, "n.tif", "m.tif", value_range=[-10000, 4095]).decode(0, 2).numpy()
    assert seen[1, 3, 5] == 0
    assert (seen[1] == 0).sum() == 1


def test_files_that_do_not_fit_are_bad_images_by_their_names(tmp_path: Path) -> None:
    rgb = np.zeros((40, 40, 3), np.uint16)
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    (tmp_path / "torn.tif").write_bytes(b"II*\0" + bytes(40))
    plain = scene(0)[0]
    cases = {
        "b.tif: 30x40 uint16, the first channel is 40x40 uint16": {"a": plain, "b": plain[:, :30]},
        "b.tif: 40x40 uint8, the first channel is 40x40 uint16": {"a": plain, "b": (plain // 16).astype(np.uint8)},
    }
    for words, files in cases.items():
        with pytest.raises(BadImage, match=words):
            of_files(tmp_path, **files).decode(0, 2)
    for name, words in (("rgb.tif", "expected one channel"), ("gone.tif", "No such file"), ("torn.tif", "")):
        with pytest.raises(BadImage, match=f"{name}: .*{words}"):
            listed(tmp_path, "a.tif", name).decode(0, 2)


def test_files_of_a_channel_heed_the_limit_of_pixels_one_by_one_and_together(tmp_path: Path) -> None:
    plain = scene(0)[0]
    one, five = of_files(tmp_path, a=plain, b=plain), of_files(tmp_path, **dict.fromkeys("abcde", plain))
    for source in (one, WeightedSource(one, np.ones(1)), JoinedSource([one])):
        assert source.image(0, 2, max_pixels=1600).pixels().shape == (2, 40, 40)
        with pytest.raises(BadImage, match=r"a\.tif: 40x40 pixels, more than the limit of 1599"):
            source.image(0, 2, max_pixels=1599)
    with pytest.raises(BadImage, match=r"a\.tif: 5 x 40x40 pixels, more than 3 x the limit of 1600"):
        five.image(0, 5, max_pixels=1600)
    assert five.image(0, 5, max_pixels=2700).pixels().shape == (5, 40, 40)


def test_a_run_passes_over_pictures_that_lack_a_file_and_counts_them(tmp_path: Path) -> None:
    table = write_bands(tmp_path, 20)
    (tmp_path / "GREEN" / "03.tif").unlink()
    tifffile.imwrite(tmp_path / "NIR" / "05.tif", scene(5, 30)[2])
    (tmp_path / "SWIR" / "07.tif").write_bytes(b"no picture")
    source = open_source(table, columns=COLUMNS, value_range=[0, 4095])
    views = Views(CropSettings(24, 16, 2), AugmentSettings(mean=(0.5,), std=(0.3,)), MaskSettings(), 8, in_channels=4)
    with BatchLoader(source, views, DataConfig(workers=0), batch_size=5, deep=True) as batches:
        used = {number for _ in range(4) for number in next(batches).sample_ids.tolist()}
        bad = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in batches.bad.items()}
    assert used == {*range(20)} - {3, 5, 7}
    assert bad.keys() == {"RED/03.tif", "RED/05.tif", "RED/07.tif"}
    assert bad["RED/03.tif"].startswith("GREEN/03.tif: cannot be read")
    assert bad["RED/05.tif"].startswith("NIR/05.tif: 30x30 uint16")
    assert bad["RED/07.tif"].startswith("SWIR/07.tif: ")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("", r"'RED' and 'GREEN' and 'NIR', which both may be the path; .*path:RED,path:GREEN,path:NIR"),
        ("path:RED,path:GREAN", "no column 'GREAN'; did you mean GREEN"),
        ("path:RED,split:a,split:b", "split:b"),
        (COLUMNS, "line 3: the path is empty"),
    ],
)
def test_a_table_that_does_not_say_what_is_meant_is_refused(columns: str, words: str, tmp_path: Path) -> None:
    table = write_bands(tmp_path)
    if columns == COLUMNS:
        table.write_text(table.read_text().replace("NIR/01.tif", ""))
    with pytest.raises(UserError, match=words):
        open_source(table, columns=columns)


def test_a_labelled_table_names_the_file_that_is_missing(tmp_path: Path) -> None:
    table = write_bands(tmp_path, labels=True)
    found = read_labelled(table, columns=COLUMNS)
    assert found.class_names == ["a", "b"]
    assert found.labels.tolist() == [0, 1] * 3
    assert torch.equal(found.source.decode(4, 4), open_source(table, columns=COLUMNS).decode(4, 4))
    (tmp_path / "SWIR" / "02.tif").unlink()
    with pytest.raises(UserError, match=r"SWIR/02\.tif is missing$"):
        read_labelled(table, columns=COLUMNS)


def test_a_source_is_another_where_a_channel_is(tmp_path: Path) -> None:
    table = write_bands(tmp_path)
    one, other = (open_source(table, columns=f"path:RED,path:{name}") for name in ("GREEN", "NIR"))
    assert one.fingerprint() != other.fingerprint()
    before = one.stamp()
    (tmp_path / "GREEN" / "05.tif").write_bytes(b"other")
    assert one.stamp() != before


def test_an_inspection_sees_files_as_one_picture(tmp_path: Path) -> None:
    found = inspect_source(write_bands(tmp_path), in_channels=4, columns=COLUMNS)
    assert (found["bad"], found["types"], found["formats"]) == ({}, {"uint16": 6}, {"files": 6})
    assert found["range"] is not None
    assert found["range"][1] <= 4095


@pytest.mark.slow
def test_verbs_take_files_of_channels(tmp_path: Path) -> None:
    table = write_bands(tmp_path, 24, labels=True)
    model = tiny_model(2, in_channels=4, image_size=32, depth=2)
    run = write_run(tmp_path / "run", model, mean=[0.4], std=[0.3], range=[0, 4095])
    options = ("own.folds=1", "protocols=logistic", "logistic.num_c=5", "report=false", "baselines=false", "workers=0")
    machine = ("device=cpu", "precision=fp32", f"columns={COLUMNS},label:class")
    assert main(["eval", str(table), f"weights={run}", f"out={tmp_path / 'out'}", *options, *machine]) == 0
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("out/eval/[0-9]*/*.json"))
    assert record["value"] > 0.9
    features = dinoreg.embed(str(table), str(run), columns=f"{COLUMNS},label:class", device="cpu", precision="fp32")
    assert features.labels is not None
    assert features.labels.tolist() == [0, 1] * 12
    planes = scene(0)
    planes[3] //= 2
    with torch.no_grad():
        own = model(dinoreg.transform(dinoreg.load(run))(np.moveaxis(planes, 0, 2))[None])
    np.testing.assert_allclose(features.features[0], own.cls[0].numpy(), atol=1e-4)
    drawn = dinoreg.view("norms", weights=str(run), images=str(table), columns=COLUMNS, out=str(tmp_path / "v"), num=2)
    assert len(drawn.record["images"]) == 2
