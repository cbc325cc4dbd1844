"""Models of one, five and many channels: looked at first, trained, probed, evaluated, viewed, exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from miniatures import pets
from PIL import Image
from small_runs import tiny_model, write_run
from training import tiny_config
from zoo import write_planes

from dinoreg.commands.main import main
from dinoreg.config.load import load_config
from dinoreg.data.open import open_source
from dinoreg.data.statistics import inspect_source, survey
from dinoreg.runtime.errors import UserError
from dinoreg.train.prepare import Setup

TWELVE = [0, 4095]
FAST = ["device=cpu", "precision=fp32", "workers=0", "report=false", "examples=1", "baselines=false"]
SIDE = 48
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]


def planes(rng: np.random.Generator, channels: int, last: np.ndarray) -> np.ndarray:
    """Noise of twelve bits in all channels but the last."""
    noise = rng.integers(0, 4096, (channels, SIDE, SIDE))
    return np.concatenate([noise[:-1], last[None]]).astype(np.uint16)


def write_classes(root: Path, channels: int, each: int = 12) -> Path:
    """Classes that the last channel alone tells apart: stripes down and across, of any phase and contrast."""
    rng = np.random.default_rng(0)
    for name, ramp in (("down", ROWS), ("across", COLUMNS)):
        for number in range(each):
            wave = 0.5 + 0.5 * np.sin(ramp / 3 + rng.uniform(0, 6)) * rng.uniform(0.5, 1)
            write_planes(root / name / f"{number:02d}", planes(rng, channels, wave * 4095))
    return root


def run_of(folder: Path, channels: int, value_range: list[int] | None = TWELVE) -> Path:
    """A run of random weights."""
    model = tiny_model(1, depth=1, dim=24, in_channels=channels, image_size=32, init_std=0.1)
    stated = {"mean": [0.5], "std": [0.25], "range": value_range}
    return write_run(folder, model, **stated)


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("eval/[0-9]*/*.json"))]


def evaluated(data: Path, run: Path, out: Path, *options: str) -> dict:
    assert main(["eval", str(data), f"weights={run}", f"out={out}", *FAST, *options]) == 0
    (found,) = records(out)
    return found


def test_a_run_measures_the_normalisation_of_other_than_three_channels(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "cells", 5, each=3)
    given = load_config("vits14_reg4", {"model.in_channels": 5, "data": str(data), "data.range": TWELVE, "steps": 1})
    setup = Setup(load_config(None, {**plain(given), "out": str(tmp_path / "run"), "device": "cpu"}))
    pixels = np.stack([tifffile.imread(path) for path in sorted(data.rglob("*.tif"))]) / 4095
    np.testing.assert_allclose(setup.config.augment.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(setup.config.augment.std, pixels.std(axis=(0, 2, 3)), atol=1e-4)
    assert any("hue" in note for note in setup.notes)
    assert not any("warning" in note for note in setup.notes)


def plain(config: object) -> dict:
    """A tiny model with the options of a shipped config that matter here."""
    sections = vars(config)
    return {
        "model.name": "vitt8_reg4",
        "model.in_channels": sections["model"].in_channels,
        "data": sections["data"].source,
        "data.range": sections["data"].range,
        "steps": 1,
        "crops.global_size": 32,
        "crops.local_size": 16,
    }


def test_pictures_of_other_channels_end_a_run_before_it_begins(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "cells", 5, each=2)
    with pytest.raises(UserError, match=r"00\.tif: 5 channels, expected 3; model\.in_channels=5"):
        Setup(tiny_config(tmp_path / "run", data__source=str(data)))
    assert not (tmp_path / "run").exists()
    assert inspect_source(data)["misfits"] == {5: 4}


def test_a_probe_of_other_channels_is_refused_by_its_name(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "cells", 5, each=2)
    for name in ("a", "b"):
        (tmp_path / "rgb" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (number, 90, 7)).save(tmp_path / "rgb" / name / f"{number}.png")
    options = {"model__in_channels": 5, "data__range": TWELVE, "probe__every": 1, "probe__data": str(tmp_path / "rgb")}
    with pytest.raises(UserError, match=r"^probe\.data: none of 6 pictures .*3 channels, expected 5"):
        Setup(tiny_config(tmp_path / "run", data__source=str(data), **options))


def test_values_beyond_the_range_of_a_run_and_of_weights_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for number in range(3):
            values = rng.integers(0, 65536, (32, 32)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "deep" / name / f"{number}.png")
    source = open_source(tmp_path / "deep", value_range=TWELVE)
    (line,) = survey(source, 3).warnings
    assert line.startswith("beyond the range: 93.")  # 1 - 4095 / 65535 of evenly spread values
    run = run_of(tmp_path / "run", 3)
    found = evaluated(tmp_path / "deep", run, tmp_path / "out", "protocols=knn", "knn.k=1")
    assert [warning for warning in found["warnings"] if warning.startswith("beyond the range: ")]
    ranged = evaluated(tmp_path / "deep", run, tmp_path / "other", "protocols=knn", "knn.k=1", "range=0,65535")
    assert not [warning for warning in ranged["warnings"] if "range" in warning]


def test_embed_names_values_beyond_the_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    run = run_of(tmp_path / "run", 3)
    arguments = ["embed", f"data={tmp_path / 'a.png'}", f"weights={run}", "device=cpu"]
    for name, more, words in (("plain", [], "cut off"), ("ranged", ["range=0,65535"], "")):
        assert main([*arguments, f"out={tmp_path / name}.safetensors", *more]) == 0
        said = capsys.readouterr().err
        assert words in said
        assert ("warning" in said) == bool(words)


def test_a_range_that_is_hardly_used_is_named(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "grey", 1, each=2)
    (line,) = survey(open_source(data), 1).warnings
    stored = np.stack([np.asarray(Image.open(path)) for path in data.rglob("*.png")])
    low, high = np.percentile(stored, (0.1, 99.9))
    assert f"{100 * (high - low) / 65535:.1f} %" in line
    assert survey(open_source(data, value_range=TWELVE), 1).warnings == []


def test_mixed_ranges_levels_and_pages_are_inspected(tmp_path: Path) -> None:
    ramp = (ROWS * SIDE + COLUMNS).astype(np.float64) / (SIDE * SIDE - 1)
    for number, top in enumerate((255, 4095, 65535)):
        Image.fromarray((ramp * top).round().astype(np.uint16)).save(tmp_path / f"{number}.png")
    found = inspect_source(tmp_path)
    assert found["bits"] == {8: 1, 12: 1, 16: 1}
    assert found["levels"][1] == 256
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((4, 32, 32), np.uint16), photometric="minisblack")
    assert inspect_source(tmp_path)["pages"] == {4: 1}


@pytest.mark.parametrize("channels", [1, 5, pytest.param(48, marks=pytest.mark.slow)])
def test_eval_finds_what_the_last_channel_alone_says(channels: int, tmp_path: Path) -> None:
    rng, run = np.random.default_rng(5), run_of(tmp_path / "run", channels)
    for place, levels in (("told", (800, 3200)), ("untold", (2000, 2000))):
        for name, level in zip(("dark", "bright"), levels):
            for number in range(30 if channels < 48 else 40):
                last = level + rng.integers(-400, 400, (SIDE, SIDE))
                write_planes(tmp_path / place / name / f"{number:02d}", planes(rng, channels, last))
    options = ["protocols=logistic", "logistic.token=cls+mean", "logistic.num_c=8"]
    told, untold = (
        evaluated(tmp_path / place, run, tmp_path / f"out_{place}", *options) for place in ("told", "untold")
    )
    assert told["value"] > 0.9
    assert told["low"] > untold["high"]
    assert not [warning for warning in told["warnings"] if "range" in warning]


def test_a_benchmark_is_refused_to_many_channels_and_grey_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets.write(tmp_path)
    five, grey = run_of(tmp_path / "five", 5), run_of(tmp_path / "grey", 1)
    arguments = [f"root={tmp_path}", *FAST, "protocols=knn", "knn.k=1"]
    assert main(["eval", "pets", f"weights={five}", f"out={tmp_path / 'a'}", *arguments]) == 2
    assert "takes 5 channels" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not records(tmp_path / "a")
    assert main(["eval", "pets", f"weights={grey}", f"out={tmp_path / 'b'}", *arguments]) == 0
    assert [warning for warning in records(tmp_path / "b")[0]["warnings"] if "grey" in warning]


def test_a_mask_turns_with_its_picture(tmp_path: Path) -> None:
    from dinoreg.evaluation.custom.datasets import own_benchmark
    from dinoreg.evaluation.protocols.segmentation import read_pair

    upright = np.zeros((16, 24), np.uint8)
    upright[2:6, 3:20] = 1
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned against the clock
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number, mask in enumerate((upright, np.rot90(upright))):  # drawn over the picture as seen, and as stored
        picture = Image.fromarray(np.ascontiguousarray(np.rot90(upright * 255))).convert("RGB")
        picture.save(tmp_path / "images" / f"{number}.png", exif=exif)
        Image.fromarray(np.ascontiguousarray(mask)).save(tmp_path / "masks" / f"{number}.png")
    data = own_benchmark(tmp_path, {}).tasks[0].read(tmp_path, {})
    for split in data.splits.values():
        for index in range(len(split)):
            image, mask = read_pair(split, index)
            assert isinstance(image, torch.Tensor)
            np.testing.assert_array_equal(image[0].numpy(), mask * 255)
