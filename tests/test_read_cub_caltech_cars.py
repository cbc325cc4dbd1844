"""CUB is joined by id, Caltech-101 is drawn by a seed, Stanford Cars is read in both of its layouts."""

from __future__ import annotations

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
from tests.miniatures import caltech101, cars, cub
from tests.miniatures.pictures import COLOURS


def read(name: str, root: Path, **options: Any) -> Data:
    benchmark = find_benchmark(name)
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


def shown(data: Data, split: str) -> list[int]:
    """The class whose colour each picture has; -1 for a grey one."""
    found = []
    for index in range(len(data.splits[split])):
        colour = np.asarray(read_rgb(data.splits[split].source, index)).astype(float).mean(axis=(0, 1))
        grey = colour.max() - colour.min() < 10
        directions = COLOURS / np.linalg.norm(COLOURS, axis=1, keepdims=True)
        found.append(-1 if grey else int((directions @ colour).argmax()))
    return found


def test_cub_labels_follow_the_pictures_although_no_two_lists_have_one_order(tmp_path: Path) -> None:
    folder = cub.write(tmp_path, per_class=4)
    ids = {
        name: [line.split()[0] for line in (folder / name).read_text().splitlines()]
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    }
    assert len({tuple(order) for order in ids.values()}) == 3
    paths = [line.split()[1] for line in (folder / "images.txt").read_text().splitlines()]
    assert paths != sorted(paths)
    data = read("cub", tmp_path)
    greys = 0
    for split in ("train", "test"):
        labels = data.splits[split].labels.tolist()
        for seen, label in zip(shown(data, split), labels):
            greys += seen == -1
            assert seen in (label, -1)
        assert labels.count(0) == labels.count(1) == labels.count(2) == 4
    assert greys == 1
    assert list(data.class_names) == list(cub.CLASSES)
    assert list(data.splits) == ["train", "test"]


def test_cub_equals_a_join_done_by_hand(tmp_path: Path) -> None:
    folder = cub.write(tmp_path, per_class=3)
    table: dict[str, list[str]] = {}
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        for line in (folder / name).read_text().splitlines():
            table.setdefault(line.split(" ")[0], []).append(line.split(" ")[1])
    data = read("cub", tmp_path)
    for split, flag in (("train", "1"), ("test", "0")):
        expected = {
            (str(folder / "images" / path), int(label) - 1) for path, label, told in table.values() if told == flag
        }
        assert set(pairs(data, split)) == expected
        assert len(pairs(data, split)) == len(expected) == 9


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("image_class_labels.txt", "\n1 1\n", "listed twice"),
        ("image_class_labels.txt", "\n99 1\n", "image 99 is in only one of"),
        ("image_class_labels.txt", "\n99\n", "nothing after the id"),
        ("train_test_split.txt", "\nx 1\n", "an id is 'x', expected a whole number"),
        ("images.txt", "\n99 ../outside.jpg\n", "image 99 is in only one of"),
        ("classes.txt", "\n5 005.Crested_Auklet\n", "does not number its classes 1..4"),
    ],
)
def test_a_malformed_list_of_cub_is_named(tmp_path: Path, file: str, change: str, expected: str) -> None:
    folder = cub.write(tmp_path, per_class=2)
    (folder / file).write_text((folder / file).read_text() + change)
    with pytest.raises(UserError) as caught:
        read("cub", tmp_path)
    assert expected in str(caught.value)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "row", "expected"),
    [
        ("image_class_labels.txt", "1 4", "the class of image 1 is 4, expected 1..3"),
        ("image_class_labels.txt", "1 0", "the class of image 1 is 0, expected 1..3"),
        ("train_test_split.txt", "1 2", "the flag of image 1 is 2, expected 0..1"),
        ("images.txt", "1 ../../outside.jpg", "leaves"),
        ("images.txt", "1 /etc/passwd", "leaves"),
    ],
)
def test_a_wrong_value_of_cub_is_named(tmp_path: Path, file: str, row: str, expected: str) -> None:
    folder = cub.write(tmp_path, per_class=2)
    rows = (folder / file).read_text().splitlines()
    (folder / file).write_text("\n".join(row if each.startswith("1 ") else each for each in rows))
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        read("cub", tmp_path)


def test_caltech_draws_from_the_images_that_torchvision_counts(tmp_path: Path) -> None:
    caltech101.write(tmp_path, per_class=3)
    data = read("caltech101", tmp_path, train_per_class=3)
    theirs = datasets.Caltech101(str(tmp_path))
    assert list(data.class_names) == theirs.categories == ["Faces", "accordion", "airplanes"]
    folder = Path(theirs.root) / "101_ObjectCategories"
    expected = {
        (str(folder / theirs.categories[label] / f"image_{number:04d}.jpg"), label)
        for number, label in zip(theirs.index, theirs.y)
    }
    train, test = pairs(data, "train"), pairs(data, "test")
    assert set(train) | set(test) == expected
    assert len(train) + len(test) == len(expected) == 20  # no image is in both
    assert [label for _, label in train] == [0] * 3 + [1] * 3 + [2] * 3
    assert [label for _, label in test] == [0] * 3 + [1] * 3 + [2] * 5
    assert data.variant == "3 per class, seed 0"
    assert list(data.splits) == ["train", "test"]


def test_caltechs_background_and_its_stray_file_are_left_out_and_may_be_missing(tmp_path: Path) -> None:
    folder = caltech101.write(tmp_path, per_class=2)
    background = folder / "101_ObjectCategories" / "BACKGROUND_Google"
    assert (background / "tmp").is_file()
    before = read("caltech101", tmp_path, train_per_class=2)
    assert not any(
        "BACKGROUND" in name or name.endswith("tmp") for split in before.splits for name, _ in pairs(before, split)
    )
    for path in background.iterdir():
        path.unlink()
    background.rmdir()
    after = read("caltech101", tmp_path, train_per_class=2)
    assert [pairs(after, split) for split in after.splits] == [pairs(before, split) for split in before.splits]


def test_a_draw_of_caltech_depends_on_the_seed_alone(tmp_path: Path) -> None:
    caltech101.write(tmp_path / "a", per_class=6)
    first = read("caltech101", tmp_path / "a", train_per_class=6)
    assert pairs(first, "train") == pairs(read("caltech101", tmp_path / "a", train_per_class=6), "train")
    other = read("caltech101", tmp_path / "a", train_per_class=6, seed=1)
    assert pairs(first, "train") != pairs(other, "train")
    fewer = read("caltech101", tmp_path / "a", train_per_class=2)
    assert set(pairs(fewer, "train")) < set(pairs(first, "train"))  # a smaller draw is a part of the larger
    caltech101.write(tmp_path / "b", per_class=6)
    moved = read("caltech101", tmp_path / "b", train_per_class=6)
    assert first.splits["train"].source.fingerprint() == moved.splits["train"].source.fingerprint()


def test_grey_images_of_caltech_become_rgb(tmp_path: Path) -> None:
    caltech101.write(tmp_path, per_class=2)
    data = read("caltech101", tmp_path, train_per_class=2)
    seen = [each for split in ("train", "test") for each in shown(data, split)]
    told = [label for split in ("train", "test") for _, label in pairs(data, split)]
    assert sum(each == -1 for each in seen) == 1
    assert all(each in (label, -1) for each, label in zip(seen, told))


def test_caltech_with_too_few_images_or_a_wrong_count_is_one_line(tmp_path: Path) -> None:
    folder = caltech101.write(tmp_path, per_class=2)
    with pytest.raises(UserError, match=r"Faces has 4 images, expected more than train_per_class=30"):
        read("caltech101", tmp_path)
    with pytest.raises(UserError, match=r"caltech101\.train_per_class=0: expected at least 1"):
        read("caltech101", tmp_path, train_per_class=0)
    (tmp_path / "empty" / "caltech101" / "101_ObjectCategories").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no category folders; they come from 101_ObjectCategories\.tar\.gz"):
        read("caltech101", tmp_path / "empty")
    (folder / "101_ObjectCategories").rename(folder / "elsewhere")
    with pytest.raises(
        UserError, match=r"101_ObjectCategories is missing; it comes from 101_ObjectCategories\.tar\.gz"
    ):
        read("caltech101", tmp_path)


def test_cars_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    cars.write(tmp_path, per_class=3)
    data = read("cars", tmp_path)
    for split in ("train", "test"):
        theirs = datasets.StanfordCars(str(tmp_path), split=split)
        assert pairs(data, split) == [(path, int(label)) for path, label in theirs._samples]
        for index in range(len(theirs)):
            assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(data.splits[split].source, index))
    assert list(data.class_names) == theirs.classes == list(cars.NAMES)


def test_the_combined_layout_of_cars_holds_the_same_images_and_labels(tmp_path: Path) -> None:
    cars.write(tmp_path / "a", per_class=3)
    folder = cars.write(tmp_path / "b", per_class=3, combined=True)
    apart, together = read("cars", tmp_path / "a"), read("cars", tmp_path / "b")
    for split in ("train", "test"):
        assert together.splits[split].labels.tolist() == apart.splits[split].labels.tolist()
        for index in range(9):
            one, other = (read_rgb(each.splits[split].source, index) for each in (apart, together))
            assert np.array_equal(np.asarray(one), np.asarray(other))
    assert pairs(together, "test")[0][0] == str(folder / "car_ims" / "000002.jpg")
    assert list(together.class_names) == list(apart.class_names)


def test_a_list_of_cars_with_a_single_record_is_read(tmp_path: Path) -> None:
    folder = cars.write(tmp_path, per_class=2)
    record = {"bbox_x1": np.uint8(1), "class": np.uint8(3), "fname": "00002.jpg"}
    cars.save_annotations(folder / "cars_test_annos_withlabels.mat", [record])
    with pytest.raises(TypeError, match="0-d"):
        datasets.StanfordCars(str(tmp_path), split="test")
    assert pairs(read("cars", tmp_path), "test") == [(str(folder / "cars_test" / "00002.jpg"), 2)]


def test_the_devkits_own_test_list_is_refused_for_it_has_no_labels(tmp_path: Path) -> None:
    folder = cars.write(tmp_path, per_class=2)
    (folder / "devkit" / "cars_test_annos.mat").replace(folder / "cars_test_annos_withlabels.mat")
    with pytest.raises(UserError, match=r"withlabels\.mat have no field 'class'; expected those with labels"):
        read("cars", tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"class": np.uint8(4)}, r"class is 4, expected 1\.\.3"),
        ({"class": np.uint8(0)}, r"class is 0, expected 1\.\.3"),
        ({"class": np.array([1, 2])}, "'class' is not one value"),
        ({"fname": "../../../outside.jpg"}, "leaves"),
    ],
)
def test_a_wrong_record_of_cars_is_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = cars.write(tmp_path, per_class=2)
    good = {"class": np.uint8(1), "fname": "00001.jpg"}
    cars.save_annotations(folder / "devkit" / "cars_train_annos.mat", [good, {**good, **change}])
    with pytest.raises(UserError, match=expected):
        read("cars", tmp_path)


def test_missing_and_damaged_matlab_files_of_cars_are_one_line(tmp_path: Path) -> None:
    folder = cars.write(tmp_path, per_class=2)
    path = folder / "cars_test_annos_withlabels.mat"
    content = path.read_bytes()
    version_7_3 = content[:124] + b"\x00\x02" + content[126:]
    for damaged in (b"", b"no MATLAB file", content[:200], content[:-100], version_7_3):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read("cars", tmp_path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    scipy.io.savemat(str(path), {"other": np.zeros(3)})
    with pytest.raises(UserError, match="has no variable annotations"):
        read("cars", tmp_path)
    path.unlink()
    with pytest.raises(
        UserError, match=r"cars: .*withlabels\.mat is missing; it comes from cars_test_annos_withlabels"
    ):
        find_benchmark("cars").find(tmp_path)
    with pytest.raises(UserError, match=r"cars: .*withlabels\.mat is missing"):
        find_benchmark("cars").tasks[0].read(folder, {})
