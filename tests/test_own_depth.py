"""Own depth maps: their unit is asked for, their range measured, and what is not counted is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoreg.commands.main import main
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.custom.maps import _above
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.metrics.depth import outside_limits
from dinoreg.runtime.errors import UserError
from tests.encoders import small_vit

SIZE = (24, 32)


def write(folder: Path, maps: list[np.ndarray], suffix: str = ".png") -> Path:
    """Pictures, brighter where it is nearer, and maps; the last of them is the test split."""
    for index, values in enumerate(maps):
        split = "test" if index == len(maps) - 1 else "train"
        for kind in ("images", "depth"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        known = np.where(np.isfinite(values), values, 0).astype(float)
        near = 250 - 200 * known / max(known.max(), 1)
        picture = np.repeat(near[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)
        blocks = np.random.default_rng(index).integers(0, 255, (SIZE[0] // 4, SIZE[1] // 4), dtype=np.uint8)
        picture[..., 2] = np.kron(blocks, np.ones((4, 4), dtype=np.uint8))  # so that none is a copy of another
        Image.fromarray(picture).save(folder / "images" / split / f"{index}.png")
        path = folder / "depth" / split / f"{index}{suffix}"
        if suffix == ".npy":
            np.save(path, values)
        else:
            Image.fromarray(values).save(path)
    return folder


def slope(low: float, high: float, scale: float = 1, dtype: Any = np.float32) -> np.ndarray:
    """Depths from `low` at the left to `high` at the right, times `scale`."""
    values = np.linspace(low, high, SIZE[1]) * scale
    return np.broadcast_to(np.rint(values) if dtype != np.float32 else values, SIZE).astype(dtype)


def read(folder: Path, **options: Any) -> Data:
    return own_benchmark(folder, options).tasks[0].read(folder, {})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("scale", "unit"), [(1000, "mm"), (1000, 0.001), (100, "cm"), (256, "1/256"), (5000, "1/5000"), (1, "m")]
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_whole_numbers_need_a_unit_and_then_are_metres(
    tmp_path: Path, scale: int, unit: str | float, suffix: str
) -> None:
    folder = write(tmp_path, [slope(2, 8, scale, np.uint16)] * 3, suffix)
    message = refusal(folder)
    assert f"whole numbers from {2 * scale} to {8 * scale}" in message
    assert "own.depth_unit=mm" in message
    assert "1/256" in message
    data = read(folder, depth_unit=unit)
    found = data.splits["test"].depth(0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slope(2, 8), atol=0.51 / scale)
    assert data.options(224)["max_depth"] == 8.1
    assert data.extra["warnings"] == []


def test_floats_are_metres_and_doubtful_ones_are_said(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a", [slope(2, 70)] * 2, ".tif")).extra["warnings"] == []
    for number, (low, high) in enumerate([(800, 7900), (0.01, 1.0)]):
        folder = write(tmp_path / f"b{number}", [slope(low, high)] * 2, ".npy")
        (warning,) = read(folder).extra["warnings"]
        assert f"{low:.3g} to {high:.3g}, were read as metres; own.depth_unit=" in warning
        assert read(folder, depth_unit="m").extra["warnings"] == []
    assert read(tmp_path / "b0", depth_unit="mm").options(224)["max_depth"] == 8.0


def test_what_is_unknown_is_zero_whatever_the_file_calls_it(tmp_path: Path) -> None:
    deep = slope(2, 8, 1000, np.uint16)
    deep[:4], deep[4:8] = 65535, 0
    found = read(write(tmp_path / "a", [deep] * 2), depth_unit="mm")
    assert (found.splits["test"].depth(0)[:8] == 0).all()
    assert found.options(224)["max_depth"] == 8.1
    floats = slope(2, 8)
    floats[0], floats[1], floats[2], floats[3] = np.nan, np.inf, -np.inf, 0
    found = read(write(tmp_path / "b", [floats] * 2, ".npy"))
    assert (found.splits["test"].depth(0)[:4] == 0).all()
    np.testing.assert_array_equal(found.splits["test"].depth(0)[4:], slope(2, 8)[4:])


def test_maps_that_say_nothing_are_refused_in_words(tmp_path: Path) -> None:
    nothing, flat = np.full(SIZE, np.nan, dtype=np.float32), np.full(SIZE, 3, dtype=np.float32)
    assert "no pixel of the depth maps of test is known" in refusal(
        write(tmp_path / "a", [slope(2, 8), nothing], ".npy")
    )
    assert "every known pixel of train has the depth 3" in refusal(write(tmp_path / "b", [flat] * 2, ".npy"))
    assert "holds a depth of -1" in refusal(write(tmp_path / "c", [slope(2, 8), slope(-1, 8)], ".npy"))
    colour = np.zeros((*SIZE, 3), dtype=np.uint8)
    folder = write(tmp_path / "d", [slope(2, 8, 20, np.uint8)] * 2)
    Image.fromarray(colour).save(folder / "depth" / "test" / "1.png")
    assert "holds a picture of mode RGB" in refusal(folder)
    one = read(write(tmp_path / "e", [nothing, slope(2, 8), slope(2, 8)], ".npy"))
    assert one.extra["warnings"] == ["unknown depth: in 1 of 2 depth maps of train no pixel is known"]


@pytest.mark.parametrize("unit", ["256", "km", "0", "1/0", "-1", "1/x"])
def test_units_that_are_none_are_refused(tmp_path: Path, unit: str) -> None:
    message = refusal(write(tmp_path, [slope(2, 8)] * 2, ".npy"), depth_unit=unit)
    assert message.startswith(f"own.depth_unit={unit}: expected m, cm, mm")


def test_a_stray_depth_is_no_limit(tmp_path: Path) -> None:
    maps = [slope(2, 8) for _ in range(4)]
    maps[0][3, 5] = 600
    data = read(write(tmp_path, maps, ".npy"))
    assert data.options(224)["max_depth"] == 8.1
    (warning,) = data.extra["warnings"]
    assert "up to 600 m; depth.max_depth=610 counts them" in warning


def test_the_limit_lies_above_every_depth() -> None:
    for depth in (0.05, 0.999, 1.0, 2.0, 8.97, 9.0, 9.95, 10.0, 64.3, 80.0, 99.9, 655.0):
        assert depth < _above(depth) <= 1.1 * depth + 1e-9


def test_depths_outside_of_the_limits_are_said_from_one_in_a_hundred() -> None:
    depth = np.linspace(0.05, 10, 200)
    samples = {"train": depth, "test": depth[:100]}
    assert outside_limits(samples, 0.001, 10.1) == []
    assert outside_limits(samples, 0.001, 9.95) == []
    (line,) = outside_limits(samples, 0.001, 9.0)
    assert line.startswith("unused truth: 10.5% of the known depths of train lie outside of 0.001 to 9 m")


def test_training_is_as_long_as_the_set(tmp_path: Path) -> None:
    options = read(write(tmp_path, [slope(2, 8)] * 7, ".npy")).options(224)
    assert options == {"max_depth": 8.1, "min_depth": 0.001, "steps": 200, "batch_size": 6, "min_size": 224}


def test_the_command_line_asks_for_the_unit_and_measures_the_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 25: the same depths in three units, up to 14 m, beyond NYU's limit."""
    torch.save(small_vit().state_dict(), tmp_path / "small.pth")
    out = [f"weights={tmp_path}/small.pth", f"out={tmp_path / 'out'}", "device=cpu", "baselines=false", "workers=0"]
    out += ["depth.steps=20", "depth.lrs=0.01", "report=false"]
    values = {}
    for name, scale, unit in (("mm", 1000, "mm"), ("kitti", 256, "1/256"), ("tum", 4000, "1/4000")):
        rng = np.random.default_rng(0)
        maps = [slope(2, rng.uniform(9, 14), scale, np.uint16) for _ in range(6)]
        folder = write(tmp_path / name, maps)
        if name == "mm":
            assert main(["eval", str(folder), *out]) == 2
            assert "own.depth_unit=mm" in capsys.readouterr().err
            assert not (tmp_path / "out").exists()
        assert main(["eval", str(folder), *out, f"own.depth_unit={unit}"]) == 0
        (path,) = (tmp_path / "out").glob(f"eval/*/{name}.json")
        result = json.loads(path.read_text())
        values[name] = result["value"]
        assert 13 < result["rows"][0]["settings"]["max_depth"] < 15
        assert result["rows"][0]["note"].startswith("depths up to 1")
        assert not any("depth" in each for each in result["warnings"])
    assert values["kitti"] == pytest.approx(values["mm"], rel=0.01)
    assert values["tum"] == pytest.approx(values["mm"], rel=0.01)
    assert main(["eval", str(tmp_path / "mm"), *out, "own.depth_unit=mm", "depth.max_depth=5"]) == 0
    (path,) = (tmp_path / "out").glob("eval/*/mm-*.json")  # another measurement of the same data
    assert any(
        "of the known depths of train lie outside of" in each for each in json.loads(path.read_text())["warnings"]
    )
    assert "warning: " in capsys.readouterr().err
