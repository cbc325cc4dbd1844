"""The range of values belongs to the data set: from deep files to what the model sees, alike for every consumer."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from training import tiny_config

from dinoreg.commands.main import main
from dinoreg.data.center_crop import center_crops
from dinoreg.data.open import open_source
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from dinoreg.train.prepare import Setup

LOW, HIGH = 0, 4095  # twelve bits


@pytest.fixture
def xrays(tmp_path: Path) -> Path:
    """Smooth pictures of twelve bits in sixteen."""
    folder = tmp_path / "xrays"
    folder.mkdir()
    rows, columns = np.mgrid[:64, :64]
    for number in range(8):
        wave = 0.5 + 0.5 * np.sin(rows / (9 + number) + columns / 13)
        Image.fromarray((LOW + wave * (HIGH - LOW)).astype(np.uint16)).save(folder / f"{number}.png")
    return folder


def test_twelve_bits_reach_the_model_with_all_their_levels(xrays: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run", data__source=str(xrays), data__range=[LOW, HIGH], augment__jitter_probability=0.0,
        augment__mean=[0.0], augment__std=[1.0], crops__global_size=32,
    )  # fmt: skip
    setup = Setup(config)
    with setup.batches(setup.new_state()) as batches:
        crops = next(batches).global_crops
    assert len(crops.unique()) >= 1000
    # Without the range the same levels lie in a sixteenth of the scale.
    assert float(crops.max()) > 0.9


def test_every_consumer_scales_by_the_range_of_the_data_set(xrays: Path) -> None:
    source = open_source(xrays, value_range=[LOW, HIGH])
    (pixels, *_), _ = center_crops(source, range(1), 64)
    stored = np.asarray(Image.open(source.name(0))).astype(np.float64)
    expected = torch.from_numpy((stored - LOW) / (HIGH - LOW) * 255)
    for found in (pixels, source.decode(0), source.image(0).pixels()):
        assert (found.double() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("limits", [[5, 1], [0], [0, 1, 2], []])
def test_a_range_that_is_none_is_refused(limits: list[float], xrays: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.range=.*LOW,HIGH"):
        tiny_config(tmp_path / "run", data__source=str(xrays), data__range=limits)
    assert main(["inspect", f"data={xrays}", f"range={limits}"]) == 2


def test_inspect_suggests_the_range(xrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"data={xrays}"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "give data.range=" in line)
    low, high = map(float, line.split("data.range=[")[1].rstrip("]").split(","))
    assert LOW <= low < 100
    assert HIGH - 100 < high <= HIGH + 1


def test_bytes_keep_their_scale_under_a_range_of_deeper_pictures(tmp_path: Path) -> None:
    values = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    Image.fromarray(values).save(tmp_path / "bytes.png")
    for limits, expected in (([LOW, HIGH], values), ([40, 140], (values.clip(40, 140) - 40.0) / 100 * 255)):
        found = open_source(tmp_path, value_range=limits).decode(0)[0]
        assert np.abs(found.double().numpy() - expected).max() < 1e-3


def test_hounsfield_units_need_a_range_and_slices_then_compare(tmp_path: Path) -> None:
    air, bone = np.full((40, 40), -1000, np.int16), np.full((40, 40), 1000, np.int16)
    air[:20] = bone[:20] = 40  # the same tissue in both
    for name, values in (("air", air), ("bone", bone)):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, photometric="minisblack")
    source = open_source(tmp_path, value_range=[-1000, 1000])
    first, second = source.decode(0), source.decode(1)
    assert float(first[0, 0, 0]) == float(second[0, 0, 0]) == pytest.approx(255 * 1040 / 2000)


def test_five_channels_in_pages_train_and_keep_their_range_in_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        with tifffile.TiffWriter(folder / f"{number}.tif") as writer:
            for _ in range(5):
                plane = rng.integers(0, 4096, (40, 40), dtype=np.uint16)
                writer.write(plane, contiguous=False, photometric="minisblack")
    out = tmp_path / "run"
    config = tiny_config(
        out, data__source=str(folder), data__range=[0, 4095], model__in_channels=5, augment__mean=[0.5],
        augment__std=[0.3], steps=2, probe__every=2,
    )  # fmt: skip
    pretrain(config)
    teacher = json.loads((out / "teacher" / "step_0000002.json").read_text())
    assert teacher["preprocessing"]["range"] == [0, 4095]
