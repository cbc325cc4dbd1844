"""FGVC-Aircraft, CIFAR-10 and CIFAR-100 are read as torchvision reads them, but for Aircraft's banner."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from dinoreg.data.decode import BadImage
from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.evaluation.readers.arrays import ArraySource, BottomCutSource
from dinoreg.runtime.errors import UserError
from tests.miniatures import aircraft, cifar10, cifar100, python2


def read(name: str, root: Path, **options: Any) -> Data:
    benchmark = find_benchmark(name)
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


class Cifar10(datasets.CIFAR10):
    """Torchvision's reader with its checksums off."""

    train_list = [[name, None] for name, _ in datasets.CIFAR10.train_list]  # noqa: RUF012
    test_list = [[name, None] for name, _ in datasets.CIFAR10.test_list]  # noqa: RUF012
    meta = {**datasets.CIFAR10.meta, "md5": None}  # noqa: RUF012


class Cifar100(datasets.CIFAR100):
    """Torchvision's reader with its checksums off."""

    train_list = [[name, None] for name, _ in datasets.CIFAR100.train_list]  # noqa: RUF012
    test_list = [[name, None] for name, _ in datasets.CIFAR100.test_list]  # noqa: RUF012
    meta = {**datasets.CIFAR100.meta, "md5": None}  # noqa: RUF012


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path: Path, name: str) -> None:
    writer, reader = {"cifar10": (cifar10.write, Cifar10), "cifar100": (cifar100.write, Cifar100)}[name]
    writer(tmp_path, per_class=4)
    data = read(name, tmp_path)
    for split in ("train", "test"):
        theirs, part = reader(str(tmp_path), train=split == "train"), data.splits[split]
        assert part.labels.tolist() == theirs.targets
        assert part.num_classes == len(theirs.classes)
        assert len(part) == len(theirs) == 4 * len(theirs.classes)
        for index in range(len(theirs)):
            assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(part.source, index))
    assert list(data.class_names) == theirs.classes
    assert list(data.splits) == ["train", "test"]


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


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 4, 1)])
def test_an_array_source_takes_colour_images_only(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(n, H, W, 3\) uint8"):
        ArraySource(np.zeros(shape, dtype=np.uint8), "a")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": [0, 1]}, "labels is not a list of 4 whole numbers"),
        ({"labels": [0, 1, 2, "1"]}, "labels is not a list of 4 whole numbers"),
        ({"labels": [0, 1, 2, 3]}, "label 3 is out of range, expected 0..2"),
        ({"labels": None}, "has no entry 'labels'"),
        ({"data": np.zeros((4, 3071), dtype=np.uint8)}, "expected (n, 3072) bytes"),
        ({"data": "text"}, "data is str, expected (n, 3072) bytes"),
    ],
)
def test_a_malformed_cifar_batch_is_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = cifar10.write(tmp_path, per_class=4)
    batch = pickle.loads((folder / "test_batch").read_bytes(), encoding="latin1")
    batch = {"data": batch["data"][:4], "labels": batch["labels"][:4], **change}
    kept = {key: value for key, value in batch.items() if value is not None}
    (folder / "test_batch").write_bytes(python2.dumps(kept))
    with pytest.raises(UserError) as caught:
        read("cifar10", tmp_path)
    assert expected in str(caught.value)
    assert "test_batch" in str(caught.value)


def test_a_missing_cifar_batch_is_one_line_with_its_archive(tmp_path: Path) -> None:
    folder = cifar10.write(tmp_path, per_class=2)
    (folder / "data_batch_4").unlink()
    benchmark = find_benchmark("cifar-10")
    with pytest.raises(UserError, match=r"data_batch_4 is missing; it comes from cifar-10-python\.tar\.gz"):
        benchmark.find(tmp_path)
    with pytest.raises(UserError, match=r"data_batch_4 is missing; it comes from cifar-10-python\.tar\.gz"):
        benchmark.tasks[0].read(folder, {})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_aircraft_is_read_as_torchvision_reads_it(tmp_path: Path, split: str) -> None:
    aircraft.write(tmp_path, per_class=3)
    data = read("aircraft", tmp_path, crop_banner=False)
    theirs = datasets.FGVCAircraft(str(tmp_path), split=split)
    assert pairs(data, split) == list(zip(theirs._image_files, theirs._labels))
    assert list(data.class_names) == theirs.classes == ["707-320", "Cessna 172", "F/A-18"]
    for index in range(len(theirs)):
        assert np.array_equal(np.asarray(theirs[index][0]), read_rgb(data.splits[split].source, index))
    assert data.variant == "banner left in"


def test_aircrafts_train_and_val_together_are_the_official_trainval(tmp_path: Path) -> None:
    aircraft.write(tmp_path, per_class=3)
    data = read("aircraft", tmp_path, crop_banner=False)
    both = datasets.FGVCAircraft(str(tmp_path), split="trainval")
    assert pairs(data, "train") + pairs(data, "val") == list(zip(both._image_files, both._labels))


def test_the_banner_of_aircraft_is_cut_off_by_default(tmp_path: Path) -> None:
    aircraft.write(tmp_path, per_class=2)
    cut, whole = read("aircraft", tmp_path), read("aircraft", tmp_path, crop_banner=False)
    assert cut.variant == "banner cut off"
    for split in ("train", "val", "test"):
        for index in range(len(cut.splits[split])):
            seen = np.asarray(read_rgb(cut.splits[split].source, index))
            file = np.asarray(read_rgb(whole.splits[split].source, index))
            assert seen.shape == (40, 48, 3)
            assert np.array_equal(seen, file[:-20])
        assert pairs(cut, split) == pairs(whole, split)
        assert cut.splits[split].source.stamp() != whole.splits[split].source.stamp()


def test_aircraft_is_found_without_the_folder_data(tmp_path: Path) -> None:
    folder = aircraft.write(tmp_path, per_class=2)
    assert pairs(read("aircraft", folder / "data"), "test") == pairs(read("aircraft", tmp_path), "test")


class Held(ArraySource):
    """Sources of files, which hand out bytes."""

    def __init__(self, files: list[bytes]) -> None:
        super().__init__(np.zeros((len(files), 1, 1, 3), dtype=np.uint8), "held")
        self.files = files

    def read(self, index: int) -> Any:
        return self.files[index]


def test_what_is_no_image_or_all_banner_is_a_bad_image_with_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20)).save(path)
    source = BottomCutSource(Held([b"no image", path.read_bytes()]), 20)
    for index, reason in ((0, "cannot identify image file"), (1, "20 rows of pixels")):
        with pytest.raises(BadImage, match=reason):
            source.read(index)
        with pytest.raises(UserError, match=rf"held:{index}: cannot be read as an image \({reason}"):
            read_rgb(source, index)
    source.rows = 19
    assert source.read(1).shape == (1, 30, 3)


def test_cutting_follows_changes_of_the_files_and_of_the_rows() -> None:
    pixels = np.zeros((2, 30, 4, 3), dtype=np.uint8)
    inner = ArraySource(pixels, "a")
    assert BottomCutSource(inner, 5).fingerprint() != BottomCutSource(inner, 6).fingerprint()
    assert BottomCutSource(inner, 5).stamp() != BottomCutSource(ArraySource(pixels + 1, "a"), 5).stamp()
    assert np.array_equal(BottomCutSource(inner, 5).read(1), pixels[1, :25])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1025794 Cessna 173", "'Cessna 173' is not among the 3 classes"),
        ("1025794", "'1025794' has no class"),
        ("../../../etc/passwd F/A-18", "leaves"),
    ],
)
def test_a_malformed_row_of_aircraft_is_named(tmp_path: Path, row: str, expected: str) -> None:
    folder = aircraft.write(tmp_path, per_class=2)
    listed = folder / "data" / "images_variant_val.txt"
    listed.write_text(listed.read_text() + row + "\n")
    with pytest.raises(UserError) as caught:
        read("aircraft", tmp_path)
    assert str(caught.value).startswith("aircraft: ")
    assert expected in str(caught.value)


def test_a_missing_list_of_aircraft_is_one_line_with_its_archive(tmp_path: Path) -> None:
    folder = aircraft.write(tmp_path, per_class=2)
    (folder / "data" / "images_variant_val.txt").unlink()
    with pytest.raises(UserError, match=r"images_variant_val\.txt is missing; it comes from fgvc-aircraft-2013b"):
        find_benchmark("aircraft").find(tmp_path)
    with pytest.raises(UserError, match=r"aircraft: .*images_variant_val\.txt is missing"):
        find_benchmark("aircraft").tasks[0].read(folder, {"crop_banner": True})
