"""MPI Sintel's declaration against torchvision's reader on the same miniature, and what it says of damaged data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Sintel

from dinoreg.evaluation.benchmark import Benchmark, load_benchmark
from dinoreg.evaluation.data import Data, FlowPairs
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.runtime.errors import UserError
from tests.miniatures import sintel

BENCHMARK: Benchmark = load_benchmark(Path(__file__).resolve().parent.parent / "eval" / "sintel.py")
TASK = BENCHMARK.tasks[0]


def read(root: Path, **options: str) -> Data:
    return TASK.read(BENCHMARK.find(root), BENCHMARK.option_values(options))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    sintel.write(tmp_path, per_class=3)
    return tmp_path


@pytest.mark.parametrize("rendering", ["clean", "final"])
def test_pairs_flows_and_order_are_those_of_torchvision(root: Path, rendering: str) -> None:
    reference = Sintel(str(root), split="train", pass_name=rendering)
    # The scenes come in the order of the file system there.
    order = sorted(range(len(reference)), key=lambda index: reference._image_list[index][0])
    splits = read(root).extra["passes"][rendering]
    ours = [(splits[split], index) for split in ("train", "test") for index in range(len(splits[split]))]
    ours.sort(key=lambda item: item[0].source.name(int(item[0].first[item[1]])))
    assert len(ours) == len(reference) == 6
    for (pairs, index), theirs in zip(ours, order):
        first, second, flow = reference[theirs]
        np.testing.assert_array_equal(read_rgb(pairs.source, int(pairs.first[index])), np.asarray(first))
        np.testing.assert_array_equal(read_rgb(pairs.source, int(pairs.second[index])), np.asarray(second))
        np.testing.assert_array_equal(pairs.flow(index), flow.transpose(1, 2, 0))
        assert pairs.source.name(int(pairs.first[index])) == reference._image_list[theirs][0]


def test_temple_2_and_3_are_scored_and_the_other_scenes_fitted_on(root: Path) -> None:
    for folder in (root / "Sintel" / "training").iterdir():
        shutil.copytree(folder / "alley_1", folder / "temple_3")
    data = read(root)
    assert set(data.splits["test"].scenes) == {"temple_2", "temple_3"}
    assert set(data.splits["train"].scenes) == {"alley_1", "market_2"}
    assert data.variant == "temple_2 and temple_3"
    assert TASK.counts == {"train": 943, "test": 98}


def test_both_passes_share_one_source_and_the_clean_one_comes_first(root: Path) -> None:
    data = read(root)
    assert list(data.extra["passes"]) == ["clean", "final"]
    clean, final = (data.extra["passes"][name]["test"] for name in ("clean", "final"))
    assert data.splits["test"] is clean
    assert clean.source is final.source
    assert len(clean.source) == 2 * 3 * 3  # the last frame of a scene is only ever a second one
    assert "/clean/" in clean.source.name(int(clean.first[0]))
    assert "/final/" in final.source.name(int(final.first[0]))


def test_one_pass_is_read_where_the_other_is_missing(root: Path) -> None:
    shutil.rmtree(root / "Sintel" / "training" / "clean")
    data = read(root, **{"pass": "final"})
    assert list(data.extra["passes"]) == ["final"]
    with pytest.raises(UserError, match=r"training/clean is missing; it comes from MPI-Sintel-complete\.zip"):
        read(root)
    with pytest.raises(UserError, match=r"sintel\.pass=raw: expected clean, final or both"):
        read(root, **{"pass": "raw"})


def test_masks_say_what_is_invalid_unknown_or_too_long_and_what_is_hidden(root: Path) -> None:
    pairs = read(root).splits["test"]
    training = root / "Sintel" / "training"
    path = training / "flow" / "temple_2" / "frame_0001.flo"
    flow = np.array(pairs.flow(0))
    flow[30, 31], flow[32, 33], flow[34, 35] = (600, -799), (-600, 800), (np.nan, 0)
    path.write_bytes(path.read_bytes()[:12] + flow.tobytes())
    invalid, occluded = (
        np.asarray(Image.open(training / part / "temple_2" / "frame_0001.png")) for part in ("invalid", "occlusions")
    )
    assert {path.name for path in (training / "invalid" / "temple_2").iterdir()} > {
        path.name for path in (training / "occlusions" / "temple_2").iterdir()
    }
    expected = np.ones(flow.shape[:2], dtype=bool)
    for y in range(flow.shape[0]):
        for x in range(flow.shape[1]):
            u, v = flow[y, x].astype(np.float64)
            expected[y, x] = invalid[y, x] == 0 and np.isfinite(u) and abs(u) < 1e9 and (u * u + v * v) ** 0.5 < 1000
    assert expected[30, 31]
    assert not expected[32, 33]
    np.testing.assert_array_equal(pairs.valid(0), expected)
    np.testing.assert_array_equal(pairs.occluded(0), occluded > 0)


@pytest.mark.parametrize("folder", ["Sintel", "MPI-Sintel", "."])
def test_the_folder_may_have_either_name_or_be_the_root_itself(root: Path, folder: str) -> None:
    if folder == "MPI-Sintel":
        (root / "Sintel").rename(root / "MPI-Sintel")
    where = root / "Sintel" if folder == "." else root
    assert isinstance(read(where).splits["test"], FlowPairs)


@pytest.mark.parametrize(
    ("part", "archive"),
    [("occlusions", "extras"), ("invalid", "extras"), ("flow", "extras"), ("clean", "images"), ("final", "images")],
)
def test_a_missing_folder_or_file_is_named_with_its_archive(root: Path, part: str, archive: str) -> None:
    kind = "flo" if part == "flow" else "png"
    frame = root / "Sintel" / "training" / part / "market_2" / f"frame_0002.{kind}"
    frame.unlink()
    with pytest.raises(UserError, match=rf"{frame} is missing; it comes from .*MPI-Sintel-training_{archive}\.zip"):
        read(root)
    shutil.rmtree(root / "Sintel" / "training" / part)
    with pytest.raises(UserError, match=rf"training/{part} is missing; it comes from .*training_{archive}\.zip"):
        read(root)


def test_a_scene_with_a_gap_is_refused(root: Path) -> None:
    for folder in (root / "Sintel" / "training").iterdir():
        for path in (folder / "alley_1").glob("frame_0002.*"):
            path.unlink()
    with pytest.raises(UserError, match=r"clean/alley_1/frame_0002\.png is missing"):
        read(root)


def test_without_a_scene_to_score_on_or_to_fit_on_nothing_is_read(root: Path) -> None:
    shutil.rmtree(root / "Sintel" / "training" / "clean" / "temple_2")
    with pytest.raises(UserError, match="has the scenes alley_1, market_2, expected one of temple_2 and temple_3"):
        read(root)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PI", "is not a .flo file"),
        (b"HEIP" + bytes(8), "is not a .flo file"),
        (b"PIEH" + np.array([4, 3], "<i4").tobytes() + bytes(95), "has 107 bytes for 3x4 pixels"),
        (b"PIEH" + np.array([-4, -3], "<i4").tobytes() + bytes(96), "has 108 bytes for -3x-4 pixels"),
    ],
)
def test_a_damaged_flow_file_is_named(root: Path, content: bytes, told: str) -> None:
    path = root / "Sintel" / "training" / "flow" / "temple_2" / "frame_0002.flo"
    path.write_bytes(content)
    pairs = read(root).splits["test"]
    for reader in (pairs.flow, pairs.valid):
        with pytest.raises(UserError, match=f"{path} {told}"):
            reader(1)


def test_a_damaged_mask_or_one_of_another_size_is_named(root: Path) -> None:
    pairs = read(root).splits["test"]
    path = root / "Sintel" / "training" / "invalid" / "temple_2" / "frame_0001.png"
    Image.new("L", (7, 5)).save(path)
    with pytest.raises(UserError, match=rf"{path} is 5x7, its flow 126x168"):
        pairs.valid(0)
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{path} cannot be read as a mask"):
        pairs.valid(0)


def test_no_number_is_claimed_without_saying_that_it_is_an_upper_bound() -> None:
    assert len(TASK.published) == 2
    for number in TASK.published:
        assert "upper bound" in number.model
        assert "secondary source" in number.differs
