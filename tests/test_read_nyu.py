"""NYU Depth V2: both layouts read right side up, and what is said when something is wrong with them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dinoreg.config.bundled import bundled
from dinoreg.evaluation.benchmark import Benchmark, load_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.runtime.errors import UserError
from tests.miniatures import nyu


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return load_benchmark(bundled("eval") / "nyu.py")


def _read(benchmark: Benchmark, root: Path, **options: Any) -> Data:
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def test_labelled_frames_come_right_side_up_with_their_depth(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=2)
    data = _read(benchmark, tmp_path)
    # The miniature's rule: one in four frames is a test frame, training frames are listed backwards.
    expected = {"train": [7, 6, 4, 3, 2, 0], "test": [1, 5]}
    for split, numbers in expected.items():
        found = data.splits[split]
        assert len(found) == len(numbers)
        for index, number in enumerate(numbers):
            image, depth = nyu.frame(0, number)
            pixels = np.asarray(read_rgb(found.source, index))
            assert pixels.shape == (48, 64, 3)
            np.testing.assert_array_equal(pixels[1:47, 1:63], image[1:47, 1:63])
            assert found.source.name(index).endswith(f"frame {number + 1}")
            np.testing.assert_array_equal(found.depth(index), nyu.holes(depth, 0, number))
            assert found.depth(index).dtype == np.float32
    assert data.variant == "NYU-795, raw depths"


def test_the_white_frame_is_black(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=1)
    with h5py.File(tmp_path / "NYU" / "nyu_depth_v2_labeled.mat") as file:
        assert (file["images"][0][:, 0] == 255).all()  # the trap is there
    pixels = np.asarray(read_rgb(_read(benchmark, tmp_path).splits["test"].source, 0))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 0).all()


def test_filled_depths_are_the_other_map_and_are_said(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=1)
    raw, filled = (_read(benchmark, tmp_path, depths=depths) for depths in ("raw", "filled"))
    assert filled.variant == "NYU-795, filled depths"
    assert (raw.splits["test"].depth(0) == 0).mean() > 0.05
    np.testing.assert_array_equal(filled.splits["test"].depth(0), nyu.frame(0, 1)[1])


@pytest.mark.parametrize("layout", ["sync", "toolbox"])
def test_listed_frames_are_metres_of_the_listed_files(benchmark: Benchmark, tmp_path: Path, layout: str) -> None:
    folder = nyu.write(tmp_path, per_class=2, layout=layout)
    data = _read(benchmark, tmp_path)
    train, test = data.splits["train"], data.splits["test"]
    base = folder if layout == "toolbox" else folder / "official_splits" / "test"
    assert [test.source.name(index) for index in range(len(test))] == [
        str(base / "home_office" / "rgb_00001.jpg"),
        str(base / "home_office" / "rgb_00005.jpg"),
    ]
    assert len(train) == 6
    depth = test.depth(0)
    np.testing.assert_array_equal(depth[10, 10:13], np.float32([0, 1, 9.999]))
    expected = nyu.holes(nyu.frame(0, 1)[1], 0, 1)
    np.testing.assert_allclose(np.delete(depth, 10, axis=0), np.delete(expected, 10, axis=0), atol=5.1e-4)
    image = np.asarray(read_rgb(train.source, 0), dtype=int)
    assert abs(image - nyu.frame(0, 7)[0]).mean() < 4  # JPEG
    assert data.variant == "synced frames, raw depths"


def test_both_layouts_have_the_same_test_frames(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=2)
    nyu.write(tmp_path, per_class=2, layout="sync")
    assert _read(benchmark, tmp_path).variant.startswith("synced")  # of both, that of the published numbers
    labelled, synced = (_read(benchmark, tmp_path, layout=layout).splits["test"] for layout in ("labelled", "sync"))
    for index in range(2):
        a, b = labelled.depth(index), synced.depth(index)
        np.testing.assert_allclose(np.delete(a, 10, axis=0), np.delete(b, 10, axis=0), atol=5.1e-4)
        pixels = [np.asarray(read_rgb(split.source, index), dtype=int) for split in (labelled, synced)]
        assert abs(pixels[0] - pixels[1]).mean() < 4


def test_many_threads_read_what_one_reads(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=4)
    train = _read(benchmark, tmp_path).splits["train"]
    expected = [nyu.frame(0, number) for number in range(16) if number % 4 != 1][::-1]
    jobs = list(range(len(train))) * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: (train.source.read(index), train.depth(index)), jobs))
    for index, (image, depth) in zip(jobs, found):
        np.testing.assert_array_equal(image[1:47, 1:63], expected[index][0][1:47, 1:63])
        known = depth > 0
        np.testing.assert_array_equal(depth[known], expected[index][1][known])


def test_crops_are_the_published_ones(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=1)
    extra = _read(benchmark, tmp_path).extra
    assert extra["eigen_crop"] == ((45, 471, 41, 601), (480, 640))
    assert extra["train_crop"] == ((45, 472, 43, 608), (480, 640))  # the box (43, 45, 608, 472) of x1 y1 x2 y2
    assert extra["official_counts"] == {"train": 795, "test": 654}


def test_published_numbers_stand_with_their_models(benchmark: Benchmark) -> None:
    numbers = {(each.model, each.variant, each.source[:6]): each.value for each in benchmark.tasks[0].published}
    assert numbers["DINOv2 ViT-L/14 (distilled)", "lin.1", "DINOv2"] == 0.384
    assert numbers["DINOv2 ViT-S/14 (distilled)", "lin.4", "DINOv2"] == 0.417
    assert numbers["DINOv2 ViT-g/14", "lin.4", "DINOv2"] == 0.298
    assert numbers["DINOv2 ViT-L/14 (ImageNet-22k), 4 registers", "", "DINOv2"] == 0.366
    assert numbers["DINOv2 ViT-L/14 (LVD-142M), 4 registers", "", "Vision"] == 0.3823
    assert len(numbers) == len(benchmark.tasks[0].published) == 23


def _replace_splits(folder: Path, train: list[int], test: list[int]) -> None:
    savemat(folder / "splits.mat", {"trainNdxs": np.uint16([train]).T, "testNdxs": np.uint16([test]).T})


def test_an_empty_root_is_told_what_is_expected(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nyu: .*NYU/nyu_depth_v2_labeled.mat is missing; it comes from the labelled"):
        benchmark.find(tmp_path)


def test_splits_must_be_there_within_range_and_apart(benchmark: Benchmark, tmp_path: Path) -> None:
    folder = nyu.write(tmp_path, per_class=1)
    _replace_splits(folder, [1, 5], [2])
    with pytest.raises(UserError, match=r"splits.mat: trainNdxs holds 1..5, expected 1..4"):
        _read(benchmark, tmp_path)
    _replace_splits(folder, [0, 1], [2])
    with pytest.raises(UserError, match=r"trainNdxs holds 0..1, expected 1..4"):
        _read(benchmark, tmp_path)
    _replace_splits(folder, [1, 2], [2, 3])
    with pytest.raises(UserError, match=r"frame 2 is in both splits"):
        _read(benchmark, tmp_path)
    (folder / "splits.mat").unlink()
    with pytest.raises(UserError, match=r"splits.mat is missing; it comes from"):
        benchmark.find(tmp_path)


def test_a_file_that_is_no_matlab_7_3_file_is_named(benchmark: Benchmark, tmp_path: Path) -> None:
    folder = nyu.write(tmp_path, per_class=1)
    path = folder / "nyu_depth_v2_labeled.mat"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"nyu_depth_v2_labeled.mat: .* cannot be read, expected a MATLAB 7.3 file"):
        _read(benchmark, tmp_path)
    path.unlink()
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((4, 3, 64, 48), dtype=np.uint8)
        file["rawDepths"] = np.zeros((4, 48, 64), dtype=np.float32)
    with pytest.raises(UserError, match=r"images \(4, 3, 64, 48\) and rawDepths \(4, 48, 64\), expected"):
        _read(benchmark, tmp_path)
    with pytest.raises(UserError, match=r"depths cannot be read"):
        _read(benchmark, tmp_path, depths="filled")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("/../../elsewhere/rgb.jpg /a/b.png 1", "leaves"),
        ("/bathroom/rgb_00000.jpg", "row 1: .* expected an image and its depth"),
        ("/nowhere/rgb_00000.jpg /nowhere/d.png 1", "sync/nowhere/rgb_00000.jpg is missing; it comes from sync.zip"),
        ("", "lists no images"),
    ],
)
def test_a_wrong_row_of_a_list_is_named(benchmark: Benchmark, tmp_path: Path, row: str, message: str) -> None:
    folder = nyu.write(tmp_path, per_class=1, layout="sync")
    outside = tmp_path / "elsewhere" / "rgb.jpg"
    outside.parent.mkdir()
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "nyudepthv2_train_files_with_gt.txt").write_text(row + "\n")
    with pytest.raises(UserError, match=message):
        _read(benchmark, tmp_path)


def test_a_depth_map_that_is_missing_or_of_eight_bits_is_named(benchmark: Benchmark, tmp_path: Path) -> None:
    folder = nyu.write(tmp_path, per_class=1, layout="sync")
    test = _read(benchmark, tmp_path).splits["test"]
    path = folder / "official_splits" / "test" / "home_office" / "sync_depth_00001.png"
    Image.new("L", (64, 48)).save(path)
    with pytest.raises(UserError, match=r"sync_depth_00001.png: is an image of mode L, expected a depth map"):
        test.depth(0)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"sync_depth_00001.png: cannot be read as a depth map"):
        test.depth(0)
    path.unlink()
    with pytest.raises(UserError, match=r"sync_depth_00001.png: .*there is no such file"):
        test.depth(0)


def test_options_that_do_not_fit_are_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=1, layout="sync")
    with pytest.raises(UserError, match=r"nyu.layout=mat: expected auto, labelled, sync"):
        _read(benchmark, tmp_path, layout="mat")
    with pytest.raises(UserError, match=r"nyu.depths=filled: the sync layout holds raw depths only"):
        _read(benchmark, tmp_path, depths="filled")
    with pytest.raises(UserError, match=r"nyu_depth_v2_labeled.mat is missing"):
        _read(benchmark, tmp_path, layout="labelled")
    nyu.write(tmp_path / "other", per_class=1)
    with pytest.raises(UserError, match=r"nyudepthv2_train_files_with_gt.txt is missing; it comes from train_test_inp"):
        _read(benchmark, tmp_path / "other", layout="sync")


def test_a_replaced_file_is_noticed(benchmark: Benchmark, tmp_path: Path) -> None:
    folder = nyu.write(tmp_path, per_class=1)
    source = _read(benchmark, tmp_path).splits["train"].source
    before = (source.fingerprint(), source.stamp())
    _replace_splits(folder, [1, 3], [2])
    other = _read(benchmark, tmp_path).splits["train"].source
    assert other.fingerprint() != before[0]
    with open(folder / "nyu_depth_v2_labeled.mat", "ab") as file:
        file.write(b"\0")
    assert source.fingerprint() == before[0]
    assert source.stamp() != before[1]
