"""Masks as labelling tools write them: right classes for the pixels, or a line that says how to read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoreg.commands.main import main
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.custom.maps import numbered
from dinoreg.evaluation.data import Data
from dinoreg.runtime.errors import UserError
from tests.encoders import small_vit

SIZE = (24, 32)


def write(folder: Path, masks: list[Image.Image | np.ndarray], classes: str = "", suffix: str = ".png") -> Path:
    """Pictures and masks of SIZE; the last of them is the test split."""
    for index, mask in enumerate(masks):
        split = "test" if index == len(masks) - 1 else "train"
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / split / f"{index}.png")
        picture = Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask
        picture.save(folder / "masks" / split / f"{index}{suffix}")
    if classes:
        (folder / "classes.txt").write_text(classes.replace(" ", "\n"))
    return folder


def columns(*values: int, dtype: Any = np.uint8) -> np.ndarray:
    """A mask of upright stripes, as many of each value."""
    return np.broadcast_to(np.repeat(values, SIZE[1] // len(values)), SIZE).astype(dtype)


def read(folder: Path, **options: Any) -> Data:
    benchmark = own_benchmark(folder, options)
    return benchmark.tasks[0].read(folder, {})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("classes", ["background lesion", ""])
def test_masks_of_0_and_255_say_how_they_can_be_read_and_then_are(tmp_path: Path, classes: str) -> None:
    folder = write(tmp_path, [columns(0, 0, 0, 255)] * 4, classes)
    message = refusal(folder)
    assert ("lesion" in message) == bool(classes)
    assert "255 (25%)" in message
    assert "own.values=[0,255]" in message
    data = read(folder, values=[0, 255])
    assert np.array_equal(data.splits["test"].mask(0), columns(0, 0, 0, 1))
    assert list(data.class_names) == (classes.split() or ["0", "255"])
    assert data.extra["warnings"] == []


def test_other_values_are_listed_as_the_option_takes_them(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 128, 128, 255)] * 3)
    message = refusal(folder)
    assert "no mask has a pixel of 1, 2" in message
    assert "own.values=[0,128]" in message
    data = read(folder, values="[0,128]")
    assert np.array_equal(data.splits["test"].mask(0), columns(0, 1, 1, 255))
    assert np.array_equal(read(folder, values="255,128,0").splits["test"].mask(0), columns(2, 1, 1, 0))
    (folder / "classes.txt").write_text("ground\ncup\ndisc\n")
    assert "own.values=[0,128,255]" in refusal(folder)


def test_what_is_not_listed_is_not_counted_and_said(tmp_path: Path) -> None:
    data = read(write(tmp_path, [columns(0, 1, 2, 2)] * 3), values="0,1")
    assert np.array_equal(data.splits["train"].mask(1), columns(0, 1, 255, 255))
    assert [each for each in data.extra["warnings"] if "train" in each] == [
        "unused truth: 50% of the pixels of train are not counted: those of 2 (50%)"
    ]


def test_much_void_is_said_and_little_is_not(tmp_path: Path) -> None:
    much = read(write(tmp_path / "much", [columns(0, 1, 255, 255, 255, 255, 255, 255)] * 2)).extra["warnings"]
    assert [each.rsplit(":", 1)[0] for each in much] == [
        "unused truth: 75% of the pixels of train are not counted",
        "unused truth: 75% of the pixels of test are not counted",
    ]
    assert read(write(tmp_path / "little", [columns(0, 1, 1, 255)] * 2)).extra["warnings"] == []


def test_masks_in_colour_are_read_by_their_colours(tmp_path: Path) -> None:
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255)}
    numbers = columns(0, 1, 2, 0)
    picture = np.array([colours[each] for each in range(3)], dtype=np.uint8)[numbers]
    black = np.zeros((*SIZE, 3), dtype=np.uint8)
    folder = write(tmp_path, [picture, black, picture])
    message = refusal(folder)
    assert "own.values=[#000000,#0000ff,#ff0000]" in message
    data = read(folder, values=["#000000", "#FF0000", "#0000ff"])
    assert np.array_equal(data.splits["test"].mask(0), numbers)
    assert not data.splits["train"].mask(1).any()
    palette = Image.fromarray(numbers + 5)
    palette.putpalette([value for k in range(256) for value in colours.get(k - 5, (9, 9, 9))])
    other = read(write(tmp_path / "palette", [palette] * 2), values="#000000,#ff0000,#0000ff")
    assert np.array_equal(other.splits["test"].mask(0), numbers)


MODES = {  # of each ending; BMP and GIF have no more, and Pillow writes a GIF of RGB or one bit with its own palette
    ".png": ("L", "1", "P", "RGB", "LA", "I;16"),
    ".tif": ("L", "1", "P", "RGB", "LA", "I;16"),
    ".bmp": ("L", "1", "P", "RGB"),
    ".gif": ("L", "P"),
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_every_ending_and_mode_keeps_the_class_numbers(tmp_path: Path, suffix: str, mode: str) -> None:
    numbers = columns(0, 1, 0, 1)
    if mode == "1":
        picture = Image.fromarray(numbers.astype(bool))
    elif mode == "P":
        picture = Image.fromarray(numbers)
        picture.putpalette([value for k in range(256) for value in (255 - k, k, 7)])
    elif mode == "I;16":
        picture = Image.fromarray(numbers.astype(np.uint16))
    else:
        picture = Image.fromarray(numbers).convert(mode)
    data = read(write(tmp_path, [picture] * 2, suffix=suffix))
    assert np.array_equal(data.splits["test"].mask(0), numbers)


def test_truths_may_have_a_tail_to_their_name(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 1)] * 3)
    for path in [*folder.glob("masks/*/*.png")]:
        path.rename(path.with_name(f"{path.stem}_segmentation.png"))
    assert len(read(folder).splits["train"]) == 2


def test_lossy_masks_fractions_and_shades_are_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a", [columns(0, 1)] * 2, suffix=".jpg"))
    assert "masks/train/0.jpg: is a JPEG inside" in message
    folder = write(tmp_path / "b", [columns(0, 1)] * 2)
    Image.fromarray(columns(0, 1)).save(folder / "masks/train/0.png", "JPEG")
    assert "is a JPEG inside" in refusal(folder)
    half = columns(0, 1, dtype=np.float32) / 2
    assert "has fractions, such as 0.5" in refusal(write(tmp_path / "c", [half] * 2, suffix=".tif"))
    whole = columns(0, 1, dtype=np.float32)
    assert np.array_equal(read(write(tmp_path / "d", [whole] * 2, suffix=".tif")).splits["test"].mask(0), columns(0, 1))
    shades = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 255
    assert "masks have 255 different values" in refusal(write(tmp_path / "e", [shades.astype(np.uint8)] * 2))


def test_a_smeared_edge_does_not_hide_what_the_two_values_are(tmp_path: Path) -> None:
    mask = columns(*[0] * 14, 60, 200, *[255] * 16)
    assert "own.values=[0,255]" in refusal(write(tmp_path, [mask] * 2, "background lesion"))
    many = np.clip(columns(0, 255) + np.random.default_rng(0).integers(-9, 9, SIZE), 0, 255).astype(np.uint8)
    assert "own.values=[0,255]" in refusal(write(tmp_path / "many", [many] * 2))
    data = read(tmp_path, values="0,255")
    assert "those of 60 (3.12%), 200 (3.12%)" in data.extra["warnings"][0]


def test_a_class_that_is_nowhere_is_an_error_and_one_that_is_on_one_side_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 1, 2, 3), columns(0, 1, 2, 4)], "ground cat dog tree car bird")
    assert "no mask has a pixel of bird" in refusal(folder)
    (folder / "classes.txt").write_text("ground\ncat\ndog\ntree\ncar\n")
    assert read(folder).extra["warnings"] == [
        "unlearnt classes: test has some that are not in train, and cannot be right: car",
        "untested classes: nothing is said about those without a pixel in test: tree",
    ]
    (folder / "classes.txt").write_text("ground\ncat\ndog\ntree\n")
    assert "masks/test/1.png: has the value 4, expected 0..3 or 255, as classes.txt says" in refusal(folder)


def test_names_may_cover_more_numbers_than_the_masks_have(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 2, 2, 5)] * 2, "ground a cat b c dog")
    assert "own.values=[0,2,5]" in refusal(folder)
    data = read(folder, values="0,2,5")
    assert list(data.class_names) == ["ground", "cat", "dog"]
    assert np.array_equal(data.splits["test"].mask(0), columns(0, 1, 1, 2))


def test_copies_of_a_picture_are_held_out_together_and_across_splits_they_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 1)] * 6)
    for kind in ("images", "masks"):
        shutil.copy(folder / kind / "train" / "0.png", folder / kind / "test" / "copy.png")
    assert read(folder).extra["warnings"] == ["1 of 2 images of test are copies of training images"]
    for path in [*folder.glob("*/*/*.png")]:
        path.rename(path.parents[1] / path.name)
    for folder_of_split in folder.glob("*/*/"):
        folder_of_split.rmdir()
    for seed in range(6):
        splits = read(folder, seed=seed).splits
        sides = [{Path(split.source.name(index)).stem for index in range(len(split))} for split in splits.values()]
        assert all(len(side & {"0", "copy"}) != 1 for side in sides)


def test_a_split_of_one_class_is_refused(tmp_path: Path) -> None:
    assert "every pixel of test that is counted is of 0" in refusal(write(tmp_path, [columns(0, 1), columns(0, 255)]))


@pytest.mark.parametrize("values", ["0", "0,0", "0,x", "0,#ff0000", "#ff00"])
def test_values_that_are_none_are_refused(tmp_path: Path, values: str) -> None:
    assert f"own.values={values}: " in refusal(write(tmp_path, [columns(0, 1)] * 2), values=values)


def test_options_of_masks_and_depth_need_them(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 1)] * 2)
    assert "own.depth_unit=mm: " in refusal(folder, depth_unit="mm")
    (folder / "masks").rename(folder / "labels")
    assert "has no images/ with masks/ beside it" in refusal(folder, values="0,255")


def test_the_key_of_a_result_knows_what_was_a_class(tmp_path: Path) -> None:
    folder = write(tmp_path, [columns(0, 1, 2, 255)] * 2)
    stamps = [read(folder, values=each).splits["test"].truth_stamp() for each in ("0,1", "1,0", "0,1,2", "")]
    assert len(set(stamps)) == 3
    assert stamps[2] == stamps[3]


def test_values_become_their_places() -> None:
    values = np.array([[7, 3, 255], [0, 8, 3]], dtype=np.int32)
    assert numbered(values, [7, 3, 0]).tolist() == [[0, 1, 255], [2, 255, 1]]
    assert numbered(values, [70_000, 3, 0]).tolist() == [[255, 1, 255], [2, 255, 1]]
    assert numbered(values * 100_000, [300_000, 700_000]).tolist() == [[1, 0, 255], [255, 255, 0]]


def test_training_is_as_long_as_the_set_and_crops_as_large_as_its_pictures(tmp_path: Path) -> None:
    data = read(write(tmp_path, [columns(0, 1)] * 7))
    assert data.options(16) == {"steps": 200, "batch_size": 6, "size": 24}
    assert data.options(224)["size"] == 224


def test_the_command_line_asks_scores_the_foreground_and_keeps_the_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 03: red squares on noise, masks of 0 and 255."""
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(8):
        mask = np.zeros(SIZE, dtype=np.uint8)
        top, left = rng.integers(0, 12, 2)
        mask[top : top + 10, left : left + 14] = 255
        masks.append(mask)
    folder = write(tmp_path / "isic", masks, "background lesion")
    for index, mask in enumerate(masks):
        (path,) = folder.glob(f"images/*/{index}.png")
        pixels = np.where(mask[..., None] > 0, (220, 30, 30), np.asarray(Image.open(path)) // 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    torch.save(small_vit().state_dict(), tmp_path / "small.pth")
    out = [f"weights={tmp_path}/small.pth", f"out={tmp_path / 'out'}", "device=cpu", "baselines=false", "workers=0"]
    assert main(["eval", str(folder), *out]) == 2
    assert "own.values=[0,255]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    training = ["segmentation.steps=40", "segmentation.lrs=0.01"]
    assert main(["eval", str(folder), *out, *training, "own.values=[0,255]"]) == 0
    (path,) = (tmp_path / "out").glob("eval/*/isic.json")
    result = json.loads(path.read_text())
    assert result["rows"][0]["details"]["iou"]["lesion"] > 0.4
    assert result["majority"] < 0.5
    settings = result["rows"][0]["settings"]
    assert (settings["steps"], settings["batch_size"], settings["size"]) == (40, 7, 32)
