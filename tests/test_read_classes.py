"""Datasets of labelled images are read as torchvision reads them, and as their own lists say where it does not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets
from training import read_lines, tiny_config

from dinoreg.commands.main import main
from dinoreg.data.decode import BadImage
from dinoreg.data.open import open_source
from dinoreg.data.statistics import inspect_source
from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_picture
from dinoreg.evaluation.readers.cifar import ArraySource
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from tests.miniatures import (
    aircraft,
    caltech101,
    cars,
    cifar10,
    cifar100,
    cub,
    dtd,
    flowers102,
    imagenet1k,
    imagenet22k,
    inat2018,
    pets,
    places205,
    python2,
    sun397,
)
from tests.miniatures.pictures import COLOURS
from tests.reading import changed, pairs, read, write

SPLITS = ("train", "val", "test")


@pytest.fixture
def no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision takes miniatures for what they stand for."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).is_file())


# (dataset, options of our reader, torchvision's reader of a root and a split)
ORACLES: list[tuple[str, dict[str, Any], Callable[[str, str], Any]]] = [
    ("aircraft", {"crop_banner": False}, lambda root, split: datasets.FGVCAircraft(root, split=split)),
    ("cars", {}, lambda root, split: datasets.StanfordCars(root, split=split)),
    ("cifar10", {}, lambda root, split: datasets.CIFAR10(root, split == "train")),
    ("cifar100", {}, lambda root, split: datasets.CIFAR100(root, split == "train")),
    ("dtd", {"split": 1}, lambda root, split: datasets.DTD(root, split=split, partition=1)),
    ("dtd", {"split": 2}, lambda root, split: datasets.DTD(root, split=split, partition=2)),
    ("flowers102", {}, lambda root, split: datasets.Flowers102(root, split=split)),
    ("food101", {}, lambda root, split: datasets.Food101(root, split=split)),
    ("imagenet1k", {}, lambda root, split: datasets.ImageNet(f"{root}/imagenet1k", split=split)),
    ("pets", {}, lambda root, split: datasets.OxfordIIITPet(root, split=split)),
]
CALLED = {"pets": {"train": "trainval"}, "imagenet1k": {"test": "val"}}  # where torchvision calls a split otherwise
WITH_VAL = ("aircraft", "dtd", "flowers102")


def listed(theirs: Any) -> list[tuple[str, int]] | None:
    """(path, label) of every image of one of torchvision's datasets; None where it keeps pixels."""
    if hasattr(theirs, "data"):
        return None
    samples = getattr(theirs, "samples", None) or getattr(theirs, "_samples", None)
    images = getattr(theirs, "_image_files", None) or getattr(theirs, "_images", None)
    return [(str(path), int(label)) for path, label in samples or zip(images, theirs._labels, strict=True)]


@pytest.mark.usefixtures("no_checksums")
@pytest.mark.parametrize(("name", "options", "reader"), ORACLES)
def test_images_labels_and_classes_are_those_of_torchvision(
    tmp_path: Path, name: str, options: dict[str, Any], reader: Callable[[str, str], Any]
) -> None:
    write(name, tmp_path, per_class=4)
    data = read(name, tmp_path, **options)
    assert list(data.splits) == (["train", "val", "test"] if name in WITH_VAL else ["train", "test"])
    for split, part in data.splits.items():
        theirs = reader(str(tmp_path), CALLED.get(name, {}).get(split, split))
        expected = listed(theirs)
        if expected is None:
            assert part.labels.tolist() == theirs.targets
        else:
            assert pairs(data, split) == expected
        assert len(part) == len(theirs) > 0
        for index in range(len(theirs)):
            assert np.array_equal(np.asarray(theirs[index][0]), read_picture(part.source, index))
        if data.class_names:
            classes = [each[0] if isinstance(each, tuple) else each for each in theirs.classes]
            assert part.num_classes == len(classes)
            assert [each.replace("_", " ") for each in data.class_names] == [each.replace("_", " ") for each in classes]


FACTS: dict[str, tuple[str, int, dict[str, int], list[float]]] = {
    # dataset: (metric, classes, images, published figures of the logistic regression)
    "aircraft": (
        "mean per class",
        100,
        {"train": 3_334, "val": 3_333, "test": 3_333},
        [74.0, 79.4, 81.5, 87.2, 88.5, 87.3, 17.1, 79.1, 84.6, 15.5, 73.3, 85.2, 14.5, 71.1],
    ),
    "caltech101": (
        "mean per class",
        101,
        {"train": 3_030, "test": 5_647},
        [97.0, 96.1, 97.5, 97.6, 95.9, 96.9, 73.2, 97.6],
    ),
    "cars": ("top-1", 196, {"train": 8_144, "test": 8_041}, [81.6, 88.2, 90.1, 91.4, 94.6, 91.5, 10.8, 85.2]),
    "cifar10": ("top-1", 10, {"train": 50_000, "test": 10_000}, [97.7, 98.7, 99.3, 99.5, 99.5, 99.4, 97.1, 99.3]),
    "cifar100": ("top-1", 100, {"train": 50_000, "test": 10_000}, [87.5, 91.3, 93.4, 94.4, 94.5, 94.5, 81.3, 93.7]),
    "cub": ("top-1", 200, {"train": 5_994, "test": 5_794}, [88.1, 89.6, 90.5, 91.6, 91.6, 91.3, 18.6, 84.9]),
    "dtd": (
        "top-1",
        47,
        {"train": 1_880, "val": 1_880, "test": 1_880},
        [80.6, 83.3, 84.0, 84.5, 86.8, 85.2, 63.1, 84.9],
    ),
    "flowers102": (
        "mean per class",
        102,
        {"train": 1_020, "val": 1_020, "test": 6_149},
        [99.6, 99.6, 99.7, 99.7, 99.7, 99.7, 59.5, 99.6],
    ),
    "food101": ("top-1", 101, {"train": 75_750, "test": 25_250}, [89.1, 92.8, 94.3, 94.7, 95.6, 94.7, 74.2, 93.5]),
    "pets": ("mean per class", 37, {"train": 3_680, "test": 3_669}, [95.1, 96.2, 96.6, 96.7, 96.8, 96.9, 47.8, 94.1]),
    "sun397": ("top-1", 397, {"train": 19_850, "test": 19_850}, [74.4, 77.3, 78.7, 78.7, 78.9, 78.6, 37.7, 78.5]),
}
HELD_OUT = {"food101": 7_575, "pets": 740, "sun397": 3_970, "cifar10": 5_000, "cifar100": 5_067, "cars": 1_650}  # BYOL


@pytest.mark.parametrize("name", FACTS)
def test_declared_facts_are_those_of_the_papers(name: str) -> None:
    metric, classes, counts, published = FACTS[name]
    benchmark = find_benchmark(name)
    logistic, knn = benchmark.tasks
    assert (logistic.protocol, knn.protocol) == ("logistic", "knn")
    assert (logistic.metric, knn.metric) == (metric, metric if name == "pets" else "top-1")
    assert logistic.read is knn.read
    assert logistic.counts == knn.counts == counts
    assert benchmark.classes == classes
    assert [each.value for each in logistic.published] == published
    assert all("arXiv" in each.source for each in logistic.published)
    assert sum(each.model == "DINOv2-g, 0 registers" for each in logistic.published) == 3
    share = logistic.options.get("validation_share")
    if name in HELD_OUT:
        assert round(share * counts["train"]) == HELD_OUT[name]
    else:
        assert share == (5 / 30 if name == "caltech101" else None)


@pytest.mark.parametrize("name", ["food101", "pets", "sun397"])
def test_labels_count_from_zero_every_listed_file_is_there_and_shuffling_keeps_the_balance(
    tmp_path: Path, name: str
) -> None:
    write(name, tmp_path, per_class=4, shuffled=True)
    data = read(name, tmp_path)
    assert set(data.splits) == {"train", "test"}
    for split, part in data.splits.items():
        assert np.bincount(part.labels).tolist() == [4] * part.num_classes
        assert all(Path(path).is_file() for path, _ in pairs(data, split))
    assert not {path for path, _ in pairs(data, "train")} & {path for path, _ in pairs(data, "test")}


def test_pets_hold_files_of_other_kinds_than_their_names_say(tmp_path: Path) -> None:
    folder = pets.write(tmp_path, per_class=3)
    data = read("pets", tmp_path)
    formats = set()
    for split in data.splits:
        for path, _ in pairs(data, split):
            with Image.open(path) as image:
                formats.add((image.format, image.mode))
    assert {("PNG", "P"), ("PNG", "RGBA"), ("PNG", "RGB"), ("GIF", "P"), ("JPEG", "RGB")} <= formats
    assert len(list(folder.glob("images/*.mat"))) == 3


def test_cifar_images_are_those_that_were_drawn(tmp_path: Path) -> None:
    cifar10.write(tmp_path, per_class=2, seed=3)
    source = read("cifar10", tmp_path).splits["train"].source
    for index in range(len(source)):
        expected = cifar10.planes([index % 3], [3000 + index]).reshape(3, 32, 32)
        assert np.array_equal(source.read(index), np.moveaxis(expected, 0, 2))
        assert source.read(index).shape == (32, 32, 3)


def test_a_cifar_image_is_named_after_its_batch(tmp_path: Path) -> None:
    folder = cifar10.write(tmp_path, per_class=2)
    source = read("cifar10", tmp_path).splits["train"].source
    assert source.name(0) == f"{folder / 'data_batch_1'}:0"
    assert source.name(5) == f"{folder / 'data_batch_5'}:0"


def test_the_fingerprint_of_cifar_covers_every_byte(tmp_path: Path) -> None:
    folder = cifar100.write(tmp_path, per_class=2)
    before = read("cifar100", tmp_path).splits["train"].source
    content = (folder / "train").read_bytes()
    batch = pickle.loads(content, encoding="latin1")
    batch["data"] = batch["data"].copy()
    batch["data"][-1, -1] ^= 1
    (folder / "train").write_bytes(python2.dumps(batch))
    after = read("cifar100", tmp_path).splits["train"].source
    assert before.fingerprint() != after.fingerprint()
    assert before.stamp() != after.stamp()
    (folder / "train").write_bytes(content)
    assert read("cifar100", tmp_path).splits["train"].source.fingerprint() == before.fingerprint()


def test_an_array_source_hashes_pixels_in_their_order_whatever_the_memory_layout() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(9, 5, 4, 3), dtype=np.uint8)
    view = pixels.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)
    assert not view.flags.c_contiguous
    expected = hashlib.sha256(b"(9, 5, 4, 3)" + pixels.tobytes()).hexdigest()[:16]
    assert ArraySource(pixels, "a").fingerprint() == ArraySource(view, "b").fingerprint() == expected
    assert ArraySource(pixels[::-1], "a").fingerprint() != expected
    assert ArraySource(pixels, "a").name(3) == "a:3"


def test_aircrafts_train_and_val_together_are_the_official_trainval(tmp_path: Path) -> None:
    aircraft.write(tmp_path, per_class=3)
    data = read("aircraft", tmp_path, crop_banner=False)
    both = datasets.FGVCAircraft(str(tmp_path), split="trainval")
    assert pairs(data, "train") + pairs(data, "val") == list(zip(both._image_files, both._labels))


def test_the_banner_of_aircraft_is_cut_off_by_default(tmp_path: Path) -> None:
    aircraft.write(tmp_path, per_class=2)
    cut, whole = read("aircraft", tmp_path), read("aircraft", tmp_path, crop_banner=False)
    assert (cut.variant, whole.variant) == ("banner cut off", "banner left in")
    for split in ("train", "val", "test"):
        for index in range(len(cut.splits[split])):
            seen = np.asarray(read_picture(cut.splits[split].source, index))
            file = np.asarray(read_picture(whole.splits[split].source, index))
            assert seen.shape == (40, 48, 3)
            assert np.array_equal(seen, file[:-20])
        assert pairs(cut, split) == pairs(whole, split)
        assert cut.splits[split].source.stamp() != whole.splits[split].source.stamp()


def test_aircraft_is_found_without_the_folder_data(tmp_path: Path) -> None:
    folder = aircraft.write(tmp_path, per_class=2)
    assert pairs(read("aircraft", folder / "data"), "test") == pairs(read("aircraft", tmp_path), "test")


@pytest.mark.parametrize(("content", "reason"), [(b"no image", "not an image"), (b"", "20 rows of pixels")])
def test_what_is_no_image_or_all_banner_is_a_bad_image_with_a_name(content: bytes, reason: str, tmp_path: Path) -> None:
    aircraft.write(tmp_path, per_class=2)
    source = read("aircraft", tmp_path).splits["train"].source
    path = Path(source.name(0))
    if content:
        path.write_bytes(content)
    else:
        Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(BadImage, match=reason):
        source.read(0)
    with pytest.raises(UserError, match=rf"{path.name}: cannot be read as an image \({reason}"):
        read_picture(source, 0)
    Image.new("RGB", (30, 21)).save(path)
    assert source.read(0).shape == (1, 30, 3)


def shown(data: Data, split: str) -> list[int]:
    """The class whose colour each picture has; -1 for a grey one."""
    found = []
    for index in range(len(data.splits[split])):
        colour = np.asarray(read_picture(data.splits[split].source, index)).astype(float).mean(axis=(0, 1))
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


def test_the_combined_layout_of_cars_holds_the_same_images_and_labels(tmp_path: Path) -> None:
    cars.write(tmp_path / "a", per_class=3)
    folder = cars.write(tmp_path / "b", per_class=3, combined=True)
    apart, together = read("cars", tmp_path / "a"), read("cars", tmp_path / "b")
    for split in ("train", "test"):
        assert together.splits[split].labels.tolist() == apart.splits[split].labels.tolist()
        for index in range(9):
            one, other = (read_picture(each.splits[split].source, index) for each in (apart, together))
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


def test_the_first_official_split_of_dtd_is_the_default_and_differs_from_the_second(tmp_path: Path) -> None:
    dtd.write(tmp_path, per_class=2)
    default, first, second = read("dtd", tmp_path), *(read("dtd", tmp_path, split=number) for number in (1, 2))
    assert [pairs(default, split) for split in SPLITS] == [pairs(first, split) for split in SPLITS]
    assert (default.variant, second.variant) == ("split 1", "split 2")
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


def test_the_test_of_flowers_is_the_larger_split_tstid(tmp_path: Path) -> None:
    folder = flowers102.write(tmp_path, per_class=2)
    data = read("flowers102", tmp_path)
    assert {split: len(data.splits[split]) for split in SPLITS} == {"train": 6, "val": 6, "test": 12}
    ids = scipy.io.loadmat(str(folder / "setid.mat"))["tstid"].ravel()
    assert [name for name, _ in pairs(data, "test")] == [str(folder / "jpg" / f"image_{each:05d}.jpg") for each in ids]
    official = find_benchmark("flowers102").tasks[0].counts
    assert official == {"train": 1020, "val": 1020, "test": 6149}


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


def test_classes_of_sun_keep_all_their_levels_and_equal_torchvisions(tmp_path: Path) -> None:
    sun397.write(tmp_path, per_class=3)
    data = read("sun397", tmp_path)
    theirs = datasets.SUN397(str(tmp_path))
    label_of = {str(path): label for path, label in zip(theirs._image_files, theirs._labels)}
    ours = [*pairs(data, "train"), *pairs(data, "test")]
    assert all(label_of[path] == label for path, label in ours)
    assert list(data.class_names) == theirs.classes == ["abbey", "church/indoor", "church/outdoor"]
    assert len(label_of) == len(ours) + 1  # the image that no list names
    image = read_picture(data.splits["train"].source, 1)  # a GIF under .jpg
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
    with pytest.raises(UserError, match=r"sun397\.split=11: expected a number in \[1, 10\]"):
        read("sun397", tmp_path / "beside", split=11)


def test_inat_joins_images_and_annotations_by_identity_not_by_place(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path, per_class=6)
    data = read("inat2018", tmp_path)
    for split, count in (("train", 18), ("test", 9)):
        found = pairs(data, split)
        assert len(found) == count
        for name, label in found:  # the folder of an image is its category
            assert int(Path(name).parent.name) == label
    assert data.class_names == [name for _, name in inat2018.CATEGORIES]
    content = json.loads((folder / "train2018.json").read_text())
    by_place = [each["category_id"] for each in content["annotations"]]
    assert by_place != data.splits["train"].labels.tolist()


def test_torchvision_finds_the_same_labels_on_inats_tree_but_cannot_tell_the_splits(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path / "ours", per_class=4)
    shutil.copytree(folder / "train_val2018", tmp_path / "theirs/2018")
    theirs = datasets.INaturalist(str(tmp_path / "theirs"), version="2018")
    expected = {name: label for label, name in theirs.index}
    data = read("inat2018", tmp_path / "ours")
    found = {Path(name).name: label for split in ("train", "test") for name, label in pairs(data, split)}
    assert found == expected
    assert len(theirs) == len(data.splits["train"]) + len(data.splits["test"])


def test_inats_labels_are_the_ranks_of_its_identifiers(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path, per_class=2)
    before = read("inat2018", tmp_path)

    def renumber(content: dict[str, Any]) -> None:
        for each in content["annotations"]:
            each["category_id"] = 10 * each["category_id"] + 5
        for each in content["categories"]:
            each["id"] = 10 * each["id"] + 5

    for split in ("train", "val"):
        changed(f"{split}2018.json", renumber)(folder)
    after = read("inat2018", tmp_path)
    assert pairs(after, "test") == pairs(before, "test")
    assert after.class_names == before.class_names


def test_places_reads_its_space_separated_lists_and_nested_categories(tmp_path: Path) -> None:
    folder = places205.write(tmp_path, per_class=4)
    data = read("places205", tmp_path)
    assert data.class_names == ["abbey", "basilica", "church/outdoor"]
    for split, listed, count in (("train", "train", 12), ("test", "val", 6)):
        rows = [
            line.split()
            for line in (folder / f"trainvalsplit_places205/{listed}_places205.csv").read_text().splitlines()
        ]
        assert len(rows) == count
        assert pairs(data, split) == [(str(folder / places205.IMAGES / name), int(label)) for name, label in rows]
        for index in range(count):
            assert read_picture(data.splits[split].source, index).size == (48, 40)


@pytest.mark.parametrize("images", ["images256", ".", "my/pictures"])
def test_the_images_of_places_may_lie_elsewhere(tmp_path: Path, images: str) -> None:
    expected = read("places205", places205.write(tmp_path / "a", per_class=2).parent)
    folder = places205.write(tmp_path / "b", per_class=2, images=images)
    options = {"images": images} if images == "my/pictures" else {}
    data = read("places205", tmp_path / "b", **options)
    assert np.array_equal(data.splits["train"].labels, expected.splits["train"].labels)
    assert data.splits["train"].source.read(0) == expected.splits["train"].source.read(0)
    if images == "my/pictures":
        assert pairs(read("places205", tmp_path / "b", images=str(folder / images)), "test") == pairs(data, "test")
        with pytest.raises(
            UserError, match=r"images256/.*is missing.*imagesPlaces205_resize.*places205\.images=FOLDER"
        ):
            read("places205", tmp_path / "b")
        with pytest.raises(UserError, match=r"places205\.images=nowhere: .* is not a folder"):
            read("places205", tmp_path / "b", images="nowhere")


def test_an_absent_file_of_places_is_named(tmp_path: Path) -> None:
    places205.write(tmp_path, per_class=2, absent=True)
    with pytest.raises(UserError, match=r"a/abbey/gsun_absent\.jpg is missing; it comes from imagesPlaces205_resize"):
        read("places205", tmp_path)
    with pytest.raises(UserError, match=r"gsun_absent\.jpg is missing"):
        open_source(f"places205:root={tmp_path}")


def test_an_absent_file_that_no_sample_met_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = places205.write(tmp_path, per_class=12)
    data = read("places205", tmp_path)
    Path(data.splits["train"].source.name(1)).unlink()
    assert folder.is_dir()
    with pytest.raises(UserError, match=r"gsun_.*\.jpg: cannot be read as an image .*No such file"):
        read_picture(read("places205", tmp_path).splits["train"].source, 1)


def test_places_has_205_classes_without_its_index_and_its_lists_are_needed(tmp_path: Path) -> None:
    folder = places205.write(tmp_path, per_class=2)
    (folder / "trainvalsplit_places205/categoryIndex_places205.csv").unlink()
    data = read("places205", tmp_path)
    assert (data.splits["train"].num_classes, len(data.class_names)) == (205, 205)
    (folder / "trainvalsplit_places205/val_places205.csv").unlink()
    with pytest.raises(UserError, match=r"val_places205\.csv is missing; it comes from trainvalsplit_places205\.tar"):
        find_benchmark("places205").find(tmp_path)


def test_both_are_sources_by_split(tmp_path: Path) -> None:
    inat2018.write(tmp_path, per_class=4)
    places205.write(tmp_path, per_class=4, images="elsewhere")
    for name, spec, options in (
        ("inat2018", f"inat2018:root={tmp_path}", {}),
        ("places205", f"places205:root={tmp_path},images=elsewhere", {"images": "elsewhere"}),
    ):
        data = read(name, tmp_path, **options)
        for split, named in (("train", ""), ("train", ",split=train"), ("test", ",split=val")):
            source = open_source(spec + named)
            assert [source.name(i) for i in range(len(source))] == [path for path, _ in pairs(data, split)]
        found = inspect_source(spec)
        assert (found["images"], found["formats"], found["bad"]) == (12, {"JPEG": 12}, {})
    with pytest.raises(UserError, match=r"split=test: expected train or val"):
        open_source(f"inat2018:root={tmp_path},split=test")
    with pytest.raises(UserError, match=r"inat2018 has no option 'images', expected root, split"):
        open_source(f"inat2018:root={tmp_path},images=x")


def test_a_source_needs_only_the_files_of_its_own_split(tmp_path: Path) -> None:
    (inat2018.write(tmp_path, per_class=2) / "val2018.json").unlink()
    assert len(open_source(f"inat:root={tmp_path}")) == 6
    with pytest.raises(UserError, match=r"val2018\.json is missing"):
        open_source(f"inat:root={tmp_path},split=val")


def test_shuffled_labels_say_nothing_about_the_pictures_and_stay_balanced(tmp_path: Path) -> None:
    for name, module in (("inat2018", inat2018), ("places205", places205)):
        module.write(tmp_path / "plain", per_class=6)
        module.write(tmp_path / "shuffled", per_class=6, shuffled=True)
        plain, shuffled = (read(name, tmp_path / place).splits["train"] for place in ("plain", "shuffled"))
        assert np.bincount(shuffled.labels).tolist() == [6, 6, 6]
        same = [plain.source.read(i) == shuffled.source.read(i) for i in range(len(plain))]
        assert 0 < sum(same) < len(same)  # some pictures are where another class claims to be


def test_without_its_meta_file_only_the_names_of_imagenets_classes_differ(tmp_path: Path) -> None:
    folder = imagenet1k.write(tmp_path, per_class=4)
    named = read("imagenet1k", tmp_path)
    (folder / "meta.bin").unlink()
    unnamed = read("imagenet1k", tmp_path)
    assert [pairs(unnamed, split) for split in ("train", "test")] == [
        pairs(named, split) for split in ("train", "test")
    ]
    assert list(unnamed.class_names) == sorted(os.listdir(folder / "train"))


def test_two_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    imagenet1k.write(tmp_path, per_class=2)
    data = read("imagenet1k", tmp_path)
    assert data.class_names == ["tench", "crane", "Shetland sheepdog", "crane"]
    assert data.splits["train"].num_classes == 4
    assert set(data.splits["test"].labels.tolist()) == {0, 1, 2, 3}


def test_a_class_without_validation_images_moves_no_other_label(tmp_path: Path) -> None:
    folder = imagenet1k.write(tmp_path, per_class=4)
    before = dict(pairs(read("imagenet1k", tmp_path), "test"))
    shutil.rmtree(folder / "val/n01440764")
    after = dict(pairs(read("imagenet1k", tmp_path), "test"))
    assert after == {name: label for name, label in before.items() if "n01440764" not in name}
    (folder / "val/n00000000").mkdir()
    (folder / "val/n00000000/ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")
    with pytest.raises(UserError, match=r"val has images of n00000000, of which .*train has none"):
        read("imagenet1k", tmp_path)


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harmed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_the_meta_file_can_hold_nothing_but_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    folder = imagenet1k.write(tmp_path, per_class=2)
    monkeypatch.chdir(tmp_path)
    good = torch.load(folder / "meta.bin", weights_only=True)
    for content in (
        (good[0], _Harm()),
        good[0],
        (good[0], [torch.zeros(2)]),
        ({"n01440764": "tench"}, good[1]),
        ({"n01440764": (3,)}, good[1]),
    ):
        torch.save(content, folder / "meta.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"meta\.bin (is not the file|does not hold)") as caught:
            read("imagenet1k", tmp_path)
        assert "\n" not in str(caught.value)
    for damaged in (b"", b"junk", pickle.dumps(_Harm())):
        (folder / "meta.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=r"meta\.bin is not the file that torchvision writes"):
            read("imagenet1k", tmp_path)
    assert not (tmp_path / "harmed").exists()
    torch.save(good, folder / "meta.bin", _use_new_zipfile_serialization=zipped)
    assert read("imagenet1k", tmp_path).class_names[0] == "tench"


def test_both_layouts_of_22k_hold_the_same_images_out(tmp_path: Path) -> None:
    imagenet22k.write(tmp_path / "a", per_class=9)
    imagenet22k.write(tmp_path / "b", per_class=9, layout="folders")
    options = {"holdout_per_class": 3, "train_per_class": 4}
    tars, folders = (read("imagenet22k", tmp_path / name, **options) for name in "ab")
    for split, each in (("train", 4), ("test", 3)):
        found, expected = (
            {re.split("[/:]", name)[-1]: label for name, label in pairs(data, split)} for data in (tars, folders)
        )
        assert found == expected
        assert np.bincount(list(found.values())).tolist() == [each] * 4
        assert all(imagenet22k.WNIDS[label] == name.split("_")[0] for name, label in found.items())
    assert tars.class_names == list(imagenet22k.WNIDS)
    assert tars.variant == "3 images per class held out, 4 per class to train on, seed 0"


def test_nothing_is_both_trained_on_and_held_out_and_the_seed_chooses(tmp_path: Path) -> None:
    imagenet22k.write(tmp_path, per_class=9)
    chosen = {}
    for seed in (0, 1):
        data = read("imagenet22k", tmp_path, holdout_per_class=3, train_per_class=0, seed=seed)
        train, test = ({name for name, _ in pairs(data, split)} for split in ("train", "test"))
        assert not train & test
        assert len(train | test) == 4 * 9
        chosen[seed] = test
    assert chosen[0] != chosen[1]
    data = read("imagenet22k", tmp_path, holdout_per_class=100, train_per_class=100)
    assert (len(data.splits["train"]), len(data.splits["test"])) == (4 * 5, 4 * 4)  # half of a small class at most


@pytest.mark.parametrize("layout", ["tars", "folders"])
def test_the_file_that_is_no_image_is_left_out(tmp_path: Path, layout: str) -> None:
    imagenet22k.write(tmp_path, per_class=4, layout=layout)
    data = read("imagenet22k", tmp_path)
    names = [name for split in data.splits for name, _ in pairs(data, split)]
    assert len(names) == 16
    assert not any(imagenet22k.UNREADABLE in name for name in names)
    for split in data.splits.values():
        for index in range(len(split)):
            assert read_picture(split.source, index).size == (48, 40)


def test_every_layout_of_22k_is_a_source_of_all_readable_images(tmp_path: Path) -> None:
    for layout in ("tars", "folders"):
        folder = imagenet22k.write(tmp_path / layout, per_class=3, layout=layout)
        for root in (folder, folder.parent):
            source = open_source(f"imagenet22k:root={root}")
            names = {re.split("[/:]", source.name(index))[-1] for index in range(len(source))}
            assert names == {f"{imagenet22k.WNIDS[i % 4]}_{10 + 7 * i}.JPEG" for i in range(12)}
            found = inspect_source(f"in22k:root={root}")
            assert (found["images"], found["formats"], found["bad"]) == (12, {"JPEG": 12}, {})


def test_a_part_of_22k_is_a_source_too(tmp_path: Path) -> None:
    folder = imagenet22k.write(tmp_path, per_class=3)
    (folder / "n01440764.tar").unlink()
    assert len(open_source(f"imagenet22k:root={tmp_path}")) == 9


def test_imagenet_is_a_source_by_split(tmp_path: Path) -> None:
    folder = imagenet1k.write(tmp_path, per_class=4)
    data = read("imagenet1k", tmp_path)
    for spec, split in (("imagenet1k:root={}", "train"), ("in1k:root={},split=val", "test")):
        source = open_source(spec.format(tmp_path))
        assert [source.name(i) for i in range(len(source))] == [name for name, _ in pairs(data, split)]
    shutil.rmtree(folder / "val")
    assert len(open_source(f"imagenet:root={folder}")) == 16  # the validation images are not asked for
    found = inspect_source(f"imagenet1k:root={tmp_path}")
    assert (found["formats"], found["modes"]) == ({"JPEG": 15, "PNG": 1}, {"RGB": 14, "CMYK": 1, "L": 1})
    mixed = open_source([f"imagenet1k:root={tmp_path}", "scenes:count=4,size=32"], weights=[3, 1])
    assert [group.length for group in mixed.groups()] == [16, 4]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("imagenet22:root=/x", r"'imagenet22' is not a known kind of source, expected .*; did you mean imagenet22k\?"),
        (
            "imagenet1k:",
            r"imagenet1k needs the folder .* imagenet1k:root=FOLDER with train of ILSVRC2012_img_train",
        ),
        ("imagenet22k:split=train", "imagenet22k has no option 'split', expected root"),
        ("imagenet1k:root={0},splt=val", "no option 'splt', expected root, split; did you mean split"),
        ("imagenet1k:root={0},split=tran", r"split=tran: expected train or val; did you mean train\?"),
        ("imagenet1k:root={0},root={0}", r"root: given twice \(data=imagenet1k:root="),
        ("imagenet1k:root=/no/such/place", "root=/no/such/place is not a folder"),
        ("imagenet1k:root={0}", r"imagenet1k/train is missing; it comes from ILSVRC2012_img_train\.tar"),
        ("imagenet22k:root={0}", r"imagenet22k/n\[0-9\]\*\.tar is missing; it comes from fall11_whole\.tar"),
    ],
)
def test_a_source_that_cannot_be_opened_says_so_in_one_line(tmp_path: Path, spec: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        open_source(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_reads_the_tars_and_lists_their_truncated_image(tmp_path: Path) -> None:
    root = tmp_path / "a, b"  # a comma without a key behind it is part of the path
    imagenet22k.write(root, per_class=3, truncated=True)
    for path in (root, *root.rglob("*")):  # an index of what has just changed is not kept
        os.utime(path, (time.time() - 60,) * 2)
    spec, kept = f"imagenet22k:root={root}", tmp_path / "kept"
    pretrain(tiny_config(tmp_path / "run", data__source=spec, steps=4, data__index_dir=str(kept)))
    assert len(list(kept.iterdir())) == 1
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    assert "n12102133.tar:n12102133_87.JPEG" in (tmp_path / "run/skipped.jsonl").read_text()


def test_inspect_reads_a_dataset_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet22k.write(tmp_path, per_class=3, truncated=True)
    assert main(["inspect", f"data=imagenet22k:root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "12 images, 12 looked at" in shown
    assert "bad: 1" in shown
    assert "n12102133.tar:n12102133_87.JPEG" in shown
    assert main(["inspect", "data=imagenet22k:root=/no/such/place"]) == 2
