"""Food-101, Oxford-IIIT Pets and SUN397 are read as torchvision reads them, and better where it does not read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from dinoreg.evaluation.benchmark import Benchmark, find_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.runtime.errors import UserError
from tests.miniatures import food101, pets, sun397

WRITERS: dict[str, Callable[..., Path]] = {"food101": food101.write, "pets": pets.write, "sun397": sun397.write}


def read(name: str, root: Path, **options: Any) -> Data:
    benchmark = find_benchmark(name)
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


@pytest.fixture(params=sorted(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Benchmark, Path]:
    WRITERS[request.param](tmp_path, per_class=2)
    return find_benchmark(request.param), tmp_path


def test_food_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    food101.write(tmp_path, per_class=3)
    data = read("food101", tmp_path)
    for split in ("train", "test"):
        theirs = datasets.Food101(str(tmp_path), split=split)
        assert pairs(data, split) == [(str(path), label) for path, label in zip(theirs._image_files, theirs._labels)]
        for index in range(len(theirs)):
            assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(data.splits[split].source, index))
    assert [name.replace(" ", "_") for name in data.class_names] == theirs.classes


def test_the_text_lists_of_food_say_the_same_as_its_json(tmp_path: Path) -> None:
    folder = food101.write(tmp_path, per_class=3)
    of_json = read("food101", tmp_path)
    for split in ("train", "test"):
        (folder / "meta" / f"{split}.json").unlink()
    of_text = read("food101", tmp_path)
    for split in ("train", "test"):
        assert sorted(pairs(of_text, split)) == sorted(pairs(of_json, split))


def test_pets_are_read_as_torchvision_reads_them_whatever_the_bytes_are(tmp_path: Path) -> None:
    folder = pets.write(tmp_path, per_class=3)
    data = read("pets", tmp_path)
    formats = set()
    for split, official in (("train", "trainval"), ("test", "test")):
        theirs = datasets.OxfordIIITPet(str(tmp_path), split=official)
        assert pairs(data, split) == [(str(path), label) for path, label in zip(theirs._images, theirs._labels)]
        for index, path in enumerate(theirs._images):
            with Image.open(path) as image:
                formats.add((image.format, image.mode))
            assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(data.splits[split].source, index))
    assert list(data.class_names) == theirs.classes == ["Abyssinian", "American Bulldog", "Egyptian Mau",
                                                        "Yorkshire Terrier"]  # fmt: skip
    assert {("PNG", "P"), ("PNG", "RGBA"), ("PNG", "RGB"), ("GIF", "P"), ("JPEG", "RGB")} <= formats
    assert len(list(folder.glob("images/*.mat"))) == 3


def test_classes_of_sun_keep_all_their_levels_and_equal_torchvisions(tmp_path: Path) -> None:
    sun397.write(tmp_path, per_class=3)
    data = read("sun397", tmp_path)
    theirs = datasets.SUN397(str(tmp_path))
    label_of = {str(path): label for path, label in zip(theirs._image_files, theirs._labels)}
    ours = [*pairs(data, "train"), *pairs(data, "test")]
    assert all(label_of[path] == label for path, label in ours)
    assert list(data.class_names) == theirs.classes == ["abbey", "church/indoor", "church/outdoor"]
    assert len(label_of) == len(ours) + 1  # the image that no list names
    image = read_rgb(data.splits["train"].source, 1)  # a GIF under .jpg
    assert (image.mode, image.size) == ("RGB", (48, 40))


def test_halves_of_sun_are_those_of_the_asked_split_and_its_lists_may_lie_inside_or_beside(tmp_path: Path) -> None:
    sun397.write(tmp_path / "beside", per_class=2)
    sun397.write(tmp_path / "inside", per_class=2, inside=True)
    sun397.write(tmp_path / "below", per_class=2, inside=True)
    lists = tmp_path / "below" / "SUN397" / "Partitions"
    lists.mkdir()
    for path in (tmp_path / "below" / "SUN397").glob("T*.txt"):
        path.rename(lists / path.name)
    found = [read("sun397", tmp_path / place) for place in ("beside", "inside", "below")]
    rows = (tmp_path / "beside" / "Training_01.txt").read_text().split()
    for data in found:
        source = data.splits["train"].source
        assert [source.paths[index] for index in range(len(source))] == [row[1:] for row in rows]
        assert data.variant == "split 1"
    second = read("sun397", tmp_path / "beside", split=2)
    assert pairs(second, "train") == pairs(found[0], "test")
    assert second.variant == "split 2"
    with pytest.raises(UserError, match=r"Training_03\.txt is missing; it comes from Partitions\.zip"):
        read("sun397", tmp_path / "beside", split=3)
    with pytest.raises(UserError, match=r"sun397\.split=11: expected 1\.\.10"):
        read("sun397", tmp_path / "beside", split=11)


def test_labels_count_from_zero_and_every_listed_file_is_there(written: tuple[Benchmark, Path]) -> None:
    benchmark, root = written
    data = read(benchmark.name, root)
    assert set(data.splits) == {"train", "test"}
    for split, part in data.splits.items():
        assert sorted(set(part.labels.tolist())) == list(range(part.num_classes))
        assert all(Path(name).is_file() for name, _ in pairs(data, split))
    assert not {name for name, _ in pairs(data, "train")} & {name for name, _ in pairs(data, "test")}


def test_declared_counts_classes_and_published_numbers_are_those_of_the_reference() -> None:
    expected = {
        "food101": (101, 75_750, 25_250, "top-1", [94.7, 74.2, 93.5, 89.1, 92.8, 94.3, 94.7, 95.6]),
        "pets": (37, 3680, 3669, "mean per class", [96.9, 47.8, 94.1, 95.1, 96.2, 96.6, 96.7, 96.8]),
        "sun397": (397, 19_850, 19_850, "top-1", [78.6, 37.7, 78.5, 74.4, 77.3, 78.7, 78.7, 78.9]),
    }
    for name, (classes, train, test, metric, published) in expected.items():
        benchmark = find_benchmark(name)
        assert benchmark.classes == classes
        assert [task.protocol for task in benchmark.tasks] == ["logistic", "knn"]
        for task in benchmark.tasks:
            assert (task.counts, task.metric) == ({"train": train, "test": test}, metric)
        assert sorted(each.value for each in benchmark.tasks[0].published) == sorted(published)
    shares = {name: find_benchmark(name).tasks[0].options["validation_share"] for name in expected}
    held_out = {"food101": 7575, "pets": 740, "sun397": 3970}  # BYOL, App. D
    assert {name: round(shares[name] * expected[name][1]) for name in expected} == held_out


def test_a_root_without_the_dataset_says_what_is_expected_where_and_from_which_archive(tmp_path: Path) -> None:
    for name, message in {
        "food101": f"food101: {tmp_path}/food-101/images is missing; it comes from food-101.tar.gz",
        "pets": f"pets: {tmp_path}/oxford-iiit-pet/images is missing; it comes from images.tar.gz",
        "sun397": f"sun397: {tmp_path}/SUN397/ClassName.txt is missing; it comes from SUN397.tar.gz",
    }.items():
        with pytest.raises(UserError) as caught:
            find_benchmark(name).find(tmp_path)
        assert str(caught.value) == message


def test_a_missing_list_is_named_with_its_archive(tmp_path: Path) -> None:
    (pets.write(tmp_path, per_class=1) / "annotations" / "test.txt").unlink()
    with pytest.raises(UserError, match=r"annotations/test\.txt is missing; it comes from annotations\.tar\.gz"):
        find_benchmark("pets").find(tmp_path)
    for name in ("Training_01.txt", "Testing_01.txt"):
        sun397.write(tmp_path, per_class=1)
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=rf"{name} is missing; it comes from Partitions\.zip"):
            find_benchmark("sun397").find(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Abyssinian_1 0 1 1", "the class of Abyssinian_1 is 0, expected 1..37"),
        ("Abyssinian_1 38 1 1", "the class of Abyssinian_1 is 38, expected 1..37"),
        ("Abyssinian_1 one 1 1", "the class of Abyssinian_1 is 'one', expected a whole number"),
        ("Abyssinian_1 1", "'Abyssinian_1 1', expected name, class, species and breed"),
        ("../../secret_1 1 1 1", "leaves"),
        ("/etc/secret_1 1 1 1", "leaves"),
        ("Beagle_9 1 2 1", "class 1 is"),
    ],
)
def test_a_bad_row_of_pets_is_refused_in_one_line(tmp_path: Path, row: str, message: str) -> None:
    path = pets.write(tmp_path, per_class=2) / "annotations" / "trainval.txt"
    if "secret" in row:
        path.write_text(f"{row}\n")
        (path.parent / "test.txt").write_text(f"{row}\n")
    else:
        path.write_text(f"{path.read_text()}{row}\n")
    with pytest.raises(UserError) as caught:
        read("pets", tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('["apple_pie/1"]', "expected {"),
        (json.dumps({"apple_pie": ["baklava/1"]}), "'baklava/1' is listed under the class 'apple_pie'"),
        (json.dumps({"apple_pie": ["12"]}), "'12', expected class/id"),
        (json.dumps({"..": ["../../../etc/passwd"]}), "is not among the 3 classes"),
        (json.dumps({"apple_pie": ["apple_pie/../../../x"]}), "leaves"),
    ],
)
def test_a_bad_list_of_food_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (food101.write(tmp_path, per_class=1) / "meta" / "test.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read("food101", tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("/c/church/sun_x.jpg", "'c/church' is not among the 3 classes"),
        ("/z/zoo/sun_x.jpg", "'z/zoo' is not among the 3 classes"),
        ("//etc/passwd", "is not among the 3 classes"),
    ],
)
def test_a_bad_row_of_sun_is_refused_in_one_line(tmp_path: Path, row: str, message: str) -> None:
    sun397.write(tmp_path, per_class=1)
    (tmp_path / "Testing_01.txt").write_text(f"{row}\n")
    with pytest.raises(UserError) as caught:
        read("sun397", tmp_path)
    assert message in str(caught.value)


def test_a_class_name_of_sun_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = sun397.write(tmp_path, per_class=1)
    (folder / "ClassName.txt").write_text("/../outside\n")
    for prefix in ("Training", "Testing"):
        (tmp_path / f"{prefix}_01.txt").write_text("/../outside/sun_x.jpg\n")
    with pytest.raises(UserError, match="leaves"):
        read("sun397", tmp_path)


def test_shuffled_miniatures_keep_the_balance_of_classes(tmp_path: Path) -> None:
    for name, writer in WRITERS.items():
        writer(tmp_path / name, per_class=4, shuffled=True)
        data = read(name, tmp_path / name)
        for part in data.splits.values():
            assert set(np.bincount(part.labels).tolist()) == {4}
