"""DTD and Flowers-102 are read as torchvision reads them, with their official validation splits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.runtime.errors import UserError
from tests.miniatures import dtd, flowers102

SPLITS = ("train", "val", "test")


def read(name: str, root: Path, **options: Any) -> Data:
    benchmark = find_benchmark(name)
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


class Flowers102(datasets.Flowers102):
    """Torchvision's reader with its checksums off."""

    _file_dict = {key: (name, None) for key, (name, _) in datasets.Flowers102._file_dict.items()}  # noqa: RUF012


@pytest.mark.parametrize("partition", [1, 2])
def test_dtd_is_read_as_torchvision_reads_it(tmp_path: Path, partition: int) -> None:
    dtd.write(tmp_path, per_class=2)
    data = read("dtd", tmp_path, split=partition)
    for split in SPLITS:
        theirs = datasets.DTD(str(tmp_path), split=split, partition=partition)
        assert pairs(data, split) == [(str(path), label) for path, label in zip(theirs._image_files, theirs._labels)]
        assert list(data.class_names) == theirs.classes
        for index in range(len(theirs)):
            assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(data.splits[split].source, index))
    assert data.variant == f"split {partition}"


def test_the_first_official_split_of_dtd_is_the_default_and_differs_from_the_second(tmp_path: Path) -> None:
    dtd.write(tmp_path, per_class=2)
    default, first, second = read("dtd", tmp_path), *(read("dtd", tmp_path, split=number) for number in (1, 2))
    assert [pairs(default, split) for split in SPLITS] == [pairs(first, split) for split in SPLITS]
    assert pairs(second, "train") == pairs(first, "val")
    assert not set(pairs(second, "test")) & set(pairs(first, "test"))


def test_a_class_that_one_list_of_dtd_lacks_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    folder = dtd.write(tmp_path, per_class=2)
    listed = folder / "labels" / "test1.txt"
    listed.write_text("".join(line for line in listed.open() if not line.startswith("banded/")))
    data = read("dtd", tmp_path)
    assert list(data.class_names) == list(dtd.CLASSES)
    assert data.splits["test"].labels.tolist() == [1, 1, 2, 2]
    assert data.splits["test"].num_classes == 3


def test_dtd_is_found_with_one_folder_or_two(tmp_path: Path) -> None:
    folder = dtd.write(tmp_path, per_class=1)
    benchmark = find_benchmark("dtd")
    assert benchmark.find(tmp_path) == benchmark.find(tmp_path / "dtd") == benchmark.find(folder) == folder


@pytest.mark.parametrize(
    ("row", "expected"),
    [("banded", "expected class/file"), ("banded/../../../x.jpg", "leaves"), ("/etc/x", "class/file")],
)
def test_a_malformed_row_of_dtd_is_named(tmp_path: Path, row: str, expected: str) -> None:
    folder = dtd.write(tmp_path, per_class=1)
    with (folder / "labels" / "val1.txt").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError) as caught:
        read("dtd", tmp_path)
    assert str(caught.value).startswith("dtd: ")
    assert expected in str(caught.value)


def test_a_split_of_dtd_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    dtd.write(tmp_path, per_class=1)
    for number in (0, 11):
        with pytest.raises(UserError, match=rf"dtd\.split={number}: expected 1\.\.10"):
            read("dtd", tmp_path, split=number)
    with pytest.raises(UserError, match=r"train3\.txt is missing; it comes from dtd-r1\.0\.1\.tar\.gz"):
        read("dtd", tmp_path, split=3)
    with pytest.raises(UserError, match=r"images is missing; it comes from dtd-r1\.0\.1\.tar\.gz"):
        read("dtd", tmp_path / "nowhere")


def test_flowers_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    flowers102.write(tmp_path, per_class=2)
    data = read("flowers102", tmp_path)
    for split in SPLITS:
        theirs = Flowers102(str(tmp_path), split=split)
        assert pairs(data, split) == [(str(path), label) for path, label in zip(theirs._image_files, theirs._labels)]
        for index in range(len(theirs)):
            assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(data.splits[split].source, index))


def test_the_test_of_flowers_is_the_larger_split_tstid(tmp_path: Path) -> None:
    folder = flowers102.write(tmp_path, per_class=2)
    data = read("flowers102", tmp_path)
    assert {split: len(data.splits[split]) for split in SPLITS} == {"train": 6, "val": 6, "test": 12}
    ids = scipy.io.loadmat(str(folder / "setid.mat"))["tstid"].ravel()
    assert [name for name, _ in pairs(data, "test")] == [str(folder / "jpg" / f"image_{each:05d}.jpg") for each in ids]
    official = find_benchmark("flowers102").tasks[0].counts
    assert official == {"train": 1020, "val": 1020, "test": 6149}


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("imagelabels.mat", {"labels": np.array([[1, 2, 3, 0]])}, r"label is 0, expected 1\.\.102"),
        ("imagelabels.mat", {"labels": np.array([[1, 2, 103]])}, r"label is 103, expected 1\.\.102"),
        ("imagelabels.mat", {"labels": np.array([[1.5, 2.0]])}, "expected a list of whole numbers"),
        ("imagelabels.mat", {"labels": np.array([[np.nan, 2.0]])}, "expected a list of whole numbers"),
        ("imagelabels.mat", {"labels": np.zeros((1, 0))}, "expected a list of whole numbers"),
        ("imagelabels.mat", {"others": np.array([[1, 2]])}, "has no variable labels"),
        ("setid.mat", {"trnid": [[0]], "valid": [[1]], "tstid": [[2]]}, r"id in trnid is 0, expected 1\.\.12"),
        ("setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[13]]}, r"id in tstid is 13, expected 1\.\.12"),
        ("setid.mat", {"trnid": [[1]], "valid": [[2]]}, "has no variable tstid"),
    ],
)
def test_wrong_numbers_of_flowers_are_named(tmp_path: Path, file: str, change: dict[str, Any], expected: str) -> None:
    folder = flowers102.write(tmp_path, per_class=1)
    scipy.io.savemat(str(folder / file), change)
    with pytest.raises(UserError, match=rf"flowers102: .*{file}.*{expected}"):
        read("flowers102", tmp_path)


def test_splits_of_one_flower_each_are_read(tmp_path: Path) -> None:
    folder = flowers102.write(tmp_path, per_class=1)
    scipy.io.savemat(str(folder / "setid.mat"), {"trnid": [[2]], "valid": [[1]], "tstid": [[12]]})
    data = read("flowers102", tmp_path)
    assert [data.splits[split].source.name(0)[-15:] for split in SPLITS] == [
        "image_00002.jpg",
        "image_00001.jpg",
        "image_00012.jpg",
    ]


def test_without_scipy_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flowers102.write(tmp_path, per_class=1)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        UserError, match=r"flowers102: reading .*imagelabels\.mat needs scipy: pip install 'dinoreg\[eval\]'"
    ):
        read("flowers102", tmp_path)


NAMES = ("aircraft", "cifar10", "cifar100", "cub", "caltech101", "cars", "dtd", "flowers102")


@pytest.mark.parametrize("name", NAMES)
def test_each_declaration_has_both_protocols_over_one_reader_and_its_published_numbers(name: str) -> None:
    benchmark = find_benchmark(name)
    logistic, knn = benchmark.tasks
    assert (logistic.protocol, knn.protocol, knn.metric) == ("logistic", "knn", "top-1")
    assert logistic.read is knn.read
    assert logistic.metric == ("mean per class" if name in ("aircraft", "caltech101", "flowers102") else "top-1")
    assert logistic.counts == knn.counts
    assert set(logistic.counts) == {"train", "test"} | ({"val"} if name in ("aircraft", "dtd", "flowers102") else set())
    assert len(logistic.published) >= 8
    assert all(0 < each.value < 100 and "arXiv" in each.source for each in logistic.published)
    assert sum(each.model == "DINOv2-g, 0 registers" for each in logistic.published) == 3
