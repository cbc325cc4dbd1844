"""What is wrong with a dataset's files is said in one line that names the file, what it holds and what was expected."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from dinoreg.evaluation.benchmark import benchmarks, find_benchmark
from dinoreg.runtime.errors import UserError
from tests.miniatures import cars
from tests.reading import (
    Edit,
    append,
    batch,
    both,
    changed,
    cut,
    gone,
    line,
    matlab,
    read,
    replaced,
    text,
    write,
)

Written = Callable[..., tuple[Path, Path]]
SMALL: dict[str, dict[str, Any]] = {  # what differs from one picture a class
    "ade20k": {"per_class": 2},
    "cifar10": {"per_class": 4},
    "imagenet22k": {"extra": False},
    "sintel": {"per_class": 3},
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Miniatures that are written once: (root, folder)."""
    known: dict[str, tuple[Path, Path]] = {}

    def get(name: str, **options: Any) -> tuple[Path, Path]:
        key = f"{name} {options}"
        if key not in known:
            root = tmp_path_factory.mktemp(name)
            known[key] = (root, write(name, root, **({"per_class": 1} | SMALL.get(name, {}) | options)))
        return known[key]

    return get


@pytest.fixture
def written(pristine: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Written:
    """A copy of a miniature of one's own: (root, folder)."""

    def copy(name: str, **options: Any) -> tuple[Path, Path]:
        root, folder = pristine(name, **options)
        own = tmp_path / "datasets"
        shutil.copytree(root, own, dirs_exist_ok=True)
        return own, own / folder.relative_to(root)

    return copy


def refusal(name: str, root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(name, root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said_by_readers(name: str, folder: Path) -> list[str]:
    """What each task says that cannot read a folder."""
    benchmark, said = find_benchmark(name), []
    for task in benchmark.tasks:
        try:
            task.read(folder, benchmark.option_values({}))
        except UserError as error:
            said.append(str(error))
    return said


def assert_says(message: str, expected: str) -> None:
    """The parts between the dots occur in this order."""
    start = 0
    for part in expected.split(" … "):
        assert part in message[start:], message
        start = message.index(part, start) + len(part)


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_a_root_without_the_dataset_says_what_is_expected_where_and_from_which_archive(
    tmp_path: Path, name: str
) -> None:
    benchmark = find_benchmark(name)
    need = benchmark.layouts[0][0]
    expected = f"{name}: {tmp_path / benchmark.folders[0] / need.path} is missing; it comes from {need.archive}"
    assert refusal(name, tmp_path) == expected


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_archives_unpacked_one_folder_too_deep_give_the_same_data(written: Written, tmp_path: Path, name: str) -> None:
    root, folder = written(name, per_class=4)
    plain = contents(name, root)
    for path in [*folder.iterdir(), *([folder] if folder != root else [])]:
        if path.is_dir():
            inner = path.rename(tmp_path / "moved")
            path.mkdir()
            inner.rename(path / path.name)
            (path / ".DS_Store").touch()
    assert contents(name, root) == plain


def contents(name: str, root: Path) -> list[object]:
    """For each task and split the images' bytes and, where they are classes, their labels."""
    benchmark, found = find_benchmark(name), []
    options = benchmark.option_values({"train_per_class": 2} if name == "caltech101" else {})
    for task in benchmark.tasks:
        for split, part in task.read(benchmark.find(root), options).splits.items():
            images = [np.asarray(part.source.read(index)).tobytes() for index in range(len(part))]
            found.append(
                (task.protocol, split, images, [np.asarray(each).tolist() for each in getattr(part, "labels", ())])
            )
    return found


def has_pattern(name: str) -> bool:
    """Whether any class will do of the paths of a layout."""
    return any("[" in need.path for layout in benchmarks()[name].layouts for need in layout)


@pytest.mark.parametrize("name", [name for name in sorted(benchmarks()) if not has_pattern(name)])
def test_each_path_of_a_layout_is_missed_with_its_archive(written: Written, name: str) -> None:
    benchmark = find_benchmark(name)
    root, _ = written(name)
    folder = benchmark.find(root)
    layout = next(layout for layout in benchmark.layouts if all(need.met(folder) for need in layout))
    for need in layout:
        hidden = (folder / need.path).with_name("hidden")
        (folder / need.path).rename(hidden)
        others = [other for other in benchmark.layouts if all(each.met(folder) for each in other)]
        if others:  # another layout does without it
            assert benchmark.find(root) == folder
        else:
            with pytest.raises(UserError) as caught:
                benchmark.find(root)
            assert f"/{need.path} is missing; it comes from {need.archive}" in str(caught.value)
            if (folder / need.path).suffix:  # a list, which the reader itself misses too
                assert any("is missing; it comes from" in said for said in said_by_readers(name, folder))
        hidden.rename(folder / need.path)


def cars_records(file: str, **change: Any) -> Edit:
    good = {"class": np.uint8(1), "fname": "00001.jpg"}
    return lambda folder: cars.save_annotations(folder / file, [good, {**good, **change}])


def cars_content(change: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / CARS_TEST
        path.write_bytes(change(path.read_bytes()))

    return edit


def voc_annotation(old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        name = (folder / "VOC2007/ImageSets/Main/train.txt").read_text().split()[0]
        replaced(f"VOC2007/Annotations/{name}.xml", old, new)(folder)

    return edit


def voc_list(name: str, change: Callable[[str], str]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / f"VOC2007/ImageSets/Main/{name}"
        path.write_text(change(path.read_text()))

    return edit


def nyu_splits(train: list[int], test: list[int]) -> Edit:
    return matlab("splits.mat", trainNdxs=np.uint16([train]).T, testNdxs=np.uint16([test]).T)


def nyu_turned(folder: Path) -> None:
    (folder / "nyu_depth_v2_labeled.mat").unlink()
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((4, 3, 64, 48), dtype=np.uint8)
        file["rawDepths"] = np.zeros((4, 48, 64), dtype=np.float32)


def nyu_list(row: str) -> Edit:
    def edit(folder: Path) -> None:
        outside = folder.parent / "elsewhere" / "rgb.jpg"
        outside.parent.mkdir()
        Image.new("RGB", (4, 4)).save(outside)
        (folder / "nyudepthv2_train_files_with_gt.txt").write_text(row + "\n")

    return edit


NO_INDEX = "which the file does not list"
CARS_TEST, CARS_TRAIN = "cars_test_annos_withlabels.mat", "devkit/cars_train_annos.mat"
TRAIN_2017, VAL_2017 = "annotations/instances_train2017.json", "annotations/instances_val2017.json"
PLACES = "trainvalsplit_places205"
FLOWER_LABELS, FLOWER_SETS = "imagelabels.mat", "setid.mat"
COCO_LIST, COCO_IMAGE = "coco_20k_filenames.txt", "train2014/COCO_train2014_000000000"
ONE_OF_EACH = {"trnid": [[1]], "valid": [[2]]}
WHOLE = "expected a list of whole numbers"
VOC_TEST_ARCHIVE = "test.txt is missing; it comes from VOCtest_06-Nov-2007.tar"
TASK = "task"  # which options are the miniature's, and which the reader's
Broken = tuple[Edit, str] | tuple[Edit, str, dict[str, Any]]


def nothing(folder: Path) -> None:
    """The files are as they should be; the options are not."""


BROKEN: dict[str, list[Broken]] = {
    "ade20k": [
        (
            gone("annotations/training/*3.png"),
            "ade20k: … ADE_train_00000003.png is missing; it comes from ADEChallen",
        ),
        (gone("images/validation/*2.jpg"), "ADE_val_00000002.jpg is missing; it comes from ADEChallenge"),
        (gone("images/training/*2.jpg"), "ade20k: … ADE_train_00000002.jpg is missing; it comes from ADEChallen"),
        (gone("*/validation/*"), "ade20k: … images/validation has no .jpg images"),
        (line("objectInfo150.txt", "150", ""), "objectInfo150.txt has 149 rows below its titles, expected 150"),
    ],
    "aircraft": [
        (append("data/images_variant_val.txt", "10 Cessna 173\n"), "aircraft: … 'Cessna 173' is not among the 3 class"),
        (
            append("data/images_variant_val.txt", "1025794\n"),
            "aircraft: … '1025794', expected a number, a space and a variant",
        ),
        (append("data/images_variant_val.txt", "../../../etc/passwd F/A-18\n"), "aircraft: … leaves"),
    ],
    "caltech101": [
        (nothing, "Faces has 2 images, expected more than train_per_class=30"),
        (nothing, "caltech101.train_per_class=0: expected at least 1", {"train_per_class": 0}),
        (gone("101_ObjectCategories/[Fa]*"), "has no category folders; they come from 101_ObjectCategories.tar.gz"),
    ],
    "cars": [
        (cars_records(CARS_TRAIN, **{"class": np.uint8(4)}), "the class of 00001.jpg is 4, expected 1..3"),
        (cars_records(CARS_TRAIN, **{"class": np.uint8(0)}), "the class of 00001.jpg is 0, expected 1..3"),
        (
            cars_records(CARS_TRAIN, **{"class": np.array([1, 2])}),
            "expected annotations with labels, each with one class, one fname",
        ),
        (cars_records(CARS_TRAIN, fname="../../../outside.jpg"), "leaves"),
        (
            lambda folder: (folder / "devkit/cars_test_annos.mat").replace(folder / CARS_TEST),
            "withlabels.mat: expected annotations with labels, each with one class",
        ),
        (cars_content(lambda content: b""), CARS_TEST),
        (cars_content(lambda content: b"no MATLAB file"), f"{CARS_TEST} cannot be read as a MATLAB file"),
        (cars_content(lambda content: content[:200]), CARS_TEST),
        (cars_content(lambda content: content[:-100]), CARS_TEST),
        (cars_content(lambda content: content[:124] + b"\x00\x02" + content[126:]), CARS_TEST),  # version 7.3
        (matlab(CARS_TEST, other=np.zeros(3)), "has no variable annotations"),
    ],
    "cifar10": [
        (
            batch("test_batch", labels=[0, 1]),
            "test_batch is of another form, expected data",
        ),
        (
            batch("test_batch", labels=[0, 1, 2, "1"]),
            "test_batch is of another form, expected data",
        ),
        (batch("test_batch", labels=[0, 1, 2, 3]), "test_batch … label 3 is out of range, expected 0..2"),
        (batch("test_batch", labels=None), "test_batch is of another form"),
        (
            batch("test_batch", data=np.zeros((4, 3071), dtype=np.uint8)),
            "test_batch is of another form, expected data, (n, 3072) bytes",
        ),
        (batch("test_batch", data="text"), "and labels, a list of n whole numbers"),
    ],
    "coco2017": [
        (changed(TRAIN_2017, lambda v: v["annotations"][0].update(image_id=77777)), f"image 77777, {NO_INDEX}"),
        (changed(TRAIN_2017, lambda v: v["annotations"][0].update(category_id=2)), f"category 2, {NO_INDEX}"),
        (
            changed(TRAIN_2017, lambda v: v["annotations"][0].update(bbox=[1, 2, 3])),
            "coco2017: … without image_id, category_id and bbox",
        ),
        (
            changed(TRAIN_2017, lambda v: v["annotations"][0].update(bbox=[1, 2, -3, 4])),
            "has the box (1.0, 2.0, -3.0, 4.0)",
        ),
        (changed(TRAIN_2017, lambda v: v["annotations"][0].update(iscrowd=2)), "coco2017: … iscrowd 2"),
        (changed(TRAIN_2017, lambda v: v["images"].append(v["images"][0])), "coco2017: … lists image … twice"),
        (changed(TRAIN_2017, lambda v: v["images"][0].update(file_name="../../secret.jpg")), "coco2017: … leaves"),
        (changed(TRAIN_2017, lambda v: v["images"][0].pop("file_name")), "an image without id and file_name"),
        (changed(TRAIN_2017, lambda v: v.pop("categories")), "coco2017: … no list 'categories'"),
        (changed(TRAIN_2017, lambda v: v["categories"].pop()), f"coco2017: … {NO_INDEX}"),
        (cut(VAL_2017), "instances_val2017.json cannot be read as JSON"),
        *(
            (text(VAL_2017, broken), "coco2017: … instances_val2017.json")
            for broken in ("", "[1]", '{"images": [1 2]}')
        ),
        (replaced(VAL_2017, '"toothbrush"', '"hairbrush"'), "coco2017: … has other categories"),
    ],
    "coco20k": [
        (text(COCO_LIST, f"{COCO_IMAGE}009.png\n"), "coco20k: … expected train2014"),
        (text(COCO_LIST, f"{COCO_IMAGE}025.jpg\n" * 2), "coco20k: … lists image 25 twice"),
        (text(COCO_LIST, f"{COCO_IMAGE}001.jpg\n"), f"coco20k: … {COCO_LIST} names image 1, {NO_INDEX}"),
        (text(COCO_LIST, "\n"), "coco20k: … lists no images"),
    ],
    "cub": [
        (append("image_class_labels.txt", "\n1 1\n"), "image_class_labels.txt lists id 1 twice"),
        (append("image_class_labels.txt", "\n99 1\n"), "image 99 is in only one of … image_class_labels.txt"),
        (append("image_class_labels.txt", "\n99\n"), "image_class_labels.txt row … '99', expected an id, a space and"),
        (append("train_test_split.txt", "\nx 1\n"), "train_test_split.txt row … 'x 1', expected an id"),
        (append("images.txt", "\n99 ../outside.jpg\n"), "image 99 is in only one of … images.txt"),
        (append("classes.txt", "\n5 005.Crested_Auklet\n"), "classes.txt does not number its classes 1..4"),
        (line("image_class_labels.txt", "1 ", "1 4"), "the class of … .jpg is 4, expected 1..3"),
        (line("image_class_labels.txt", "1 ", "1 0"), "the class of … .jpg is 0, expected 1..3"),
        (line("train_test_split.txt", "1 ", "1 2"), "the flag of image 1 is 2, expected 0..1"),
        (line("images.txt", "1 ", "1 ../../outside.jpg"), "leaves"),
        (line("images.txt", "1 ", "1 /etc/passwd"), "leaves"),
    ],
    "dtd": [
        (append("labels/val1.txt", "banded\n"), "dtd: … expected class/file"),
        (append("labels/val1.txt", "banded/../../../x.jpg\n"), "dtd: … leaves"),
        (append("labels/val1.txt", "/etc/x\n"), "dtd: … class/file"),
        (nothing, "dtd.split=0: expected a number in [1, 10]", {"split": 0}),
        (nothing, "dtd.split=11: expected a number in [1, 10]", {"split": 11}),
        (nothing, "train3.txt is missing; it comes from dtd-r1.0.1.tar.gz", {"split": 3}),
    ],
    "flowers102": [
        (
            matlab(FLOWER_LABELS, labels=[[1, 2, 3, 0]]),
            "flowers102: … imagelabels.mat … labels holds 0, expected 1..102",
        ),
        (matlab(FLOWER_LABELS, labels=[[1, 2, 103]]), "imagelabels.mat … labels holds 103, expected 1..102"),
        (matlab(FLOWER_LABELS, labels=[[1.5, 2.0]]), f"imagelabels.mat … {WHOLE}"),
        (matlab(FLOWER_LABELS, labels=[[np.nan, 2.0]]), f"imagelabels.mat … {WHOLE}"),
        (matlab(FLOWER_LABELS, labels=np.zeros((1, 0))), f"imagelabels.mat … {WHOLE}"),
        (matlab(FLOWER_LABELS, others=[[1, 2]]), "imagelabels.mat has no variable labels"),
        (matlab(FLOWER_SETS, trnid=[[0]], valid=[[1]], tstid=[[2]]), "setid.mat … trnid holds 0, expected 1..12"),
        (matlab(FLOWER_SETS, **ONE_OF_EACH, tstid=[[13]]), "setid.mat … tstid holds 13, expected 1..12"),
        (matlab(FLOWER_SETS, **ONE_OF_EACH), "setid.mat has no variable tstid"),
    ],
    "food101": [
        (text("meta/test.json", "{"), "food101: … cannot be read as JSON"),
        (text("meta/test.json", '["apple_pie/1"]'), "food101: … expected {"),
        (text("meta/test.json", '{"apple_pie": ["baklava/1"]}'), "'baklava/1' is listed under the class 'apple_pie'"),
        (text("meta/test.json", '{"apple_pie": ["12"]}'), "'12' … expected class/id"),
        (text("meta/test.json", '{"..": ["../../../etc/passwd"]}'), "is not among the 3 classes"),
        (text("meta/test.json", '{"apple_pie": ["apple_pie/../../../x"]}'), "leaves"),
    ],
    "imagenet_a": [
        (gone("../imagenet1k"), "imagenet_a: learns from ImageNet-1k, which imagenet_a.imagenet=FOLDER says … train"),
        (nothing, "imagenet1k/train is missing; it comes from ILSVRC2012_img_train.tar", {"imagenet": "nowhere"}),
        (
            lambda folder: (folder / "n01440764").rename(folder / "n00000001"),
            "imagenet_a: … n00000001 is neither a class of the 4 of ImageNet-1k",
        ),
    ],
    "imagenet_c": [
        (gone("fog/*/*/*"), "no image files below … imagenet_c/fog"),
        (gone("weather/fog/*/*/*"), "imagenet_c: … has no fog/SEVERITY/WNID/ with images", {TASK: {"grouped": True}}),
        (
            lambda folder: (folder / "fog/5/n01440764").rename(folder / "fog/5/tench"),
            "imagenet_c: … fog/5/tench is neither a class of the 4",
        ),
    ],
    "imagenet_v2": [
        (lambda folder: (folder / "3").rename(folder / "4"), "4 is neither a class of the 4 of … nor the rank of one"),
        (lambda folder: (folder / "3").rename(folder / "tench"), "tench is neither a class of the 4 of ImageNet-1k"),
    ],
    "imagenet22k": [
        (nothing, "imagenet22k: … no class of two images or more"),
        (
            nothing,
            "imagenet22k.holdout_per_class=0: expected at least 1",
            {"holdout_per_class": 0},
        ),
        (nothing, "imagenet22k.hold: unknown option … holdout_per_class", {"hold": 3}),
    ],
    "inat2018": [
        *(
            (changed("train2018.json", change), expected)
            for change, expected in (
                (lambda c: c["annotations"].pop(), "expected each image once, and one annotation of each"),
                (
                    lambda c: c["annotations"].append(dict(c["annotations"][0])),
                    "expected each image once, and one annotation of each",
                ),
                (
                    lambda c: c["images"][0].update(id=c["images"][1]["id"]),
                    "expected each image once, and one annotation of each",
                ),
                (
                    lambda c: c["annotations"][0].update(category_id=8142),
                    f"of category 8142, {NO_INDEX}",
                ),
                (
                    lambda c: c["annotations"][0].update(category_id="oak"),
                    "an annotation without image_id and category_id",
                ),
                (lambda c: c.pop("annotations"), "no list 'annotations'"),
                (lambda c: c.pop("categories"), "no list 'categories'"),
                (lambda c: c["images"][0].pop("file_name"), "an image without id and file_name"),
                (lambda c: c["images"][0].update(file_name="../../secret.jpg"), "'../../secret.jpg' leaves"),
                (lambda c: c["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd' leaves"),
                (
                    lambda c: c["images"][0].update(file_name="train_val2018/no.jpg"),
                    "no.jpg is missing … train_val2018.tar",
                ),
            )
        ),
        (text("val2018.json", "{"), "inat2018: … val2018.json cannot be read as JSON"),
        (text("val2018.json", "[" * 100_000), "inat2018: … val2018.json cannot be read as JSON"),
        (text("val2018.json", "[1]"), "inat2018: … val2018.json has no list 'images', expected"),
    ],
    "nyu": [
        (nyu_splits([1, 5], [2]), "splits.mat: trainNdxs holds 5, expected 1..4"),
        (nyu_splits([0, 1], [2]), "trainNdxs holds 0, expected 1..4"),
        (nyu_splits([1, 2], [2, 3]), "frame 2 is in both splits"),
        (cut("nyu_depth_v2_labeled.mat"), "nyu_depth_v2_labeled.mat: … cannot be read, expected a MATLAB 7.3 file"),
        (nyu_turned, "images (4, 3, 64, 48) and rawDepths (4, 48, 64), expected"),
        *(
            (nyu_list(row), expected, {TASK: {"layout": "sync"}})
            for row, expected in (
                ("/../../elsewhere/rgb.jpg /a/b.png 1", "leaves"),
                ("/bathroom/rgb_00000.jpg", "row 1: … expected an image and its depth"),
                (
                    "/nowhere/rgb_00000.jpg /nowhere/d.png 1",
                    "sync/nowhere/rgb_00000.jpg is missing; it comes from sync.zip",
                ),
                ("", "lists no images"),
            )
        ),
    ],
    "pets": [
        *(
            (append("annotations/trainval.txt", f"{row}\n"), expected)
            for row, expected in (
                ("Abyssinian_1 0 1 1", "the class of Abyssinian_1.jpg is 0, expected 1..37"),
                ("Abyssinian_1 38 1 1", "the class of Abyssinian_1.jpg is 38, expected 1..37"),
                ("Abyssinian_1 one 1 1", "the class of Abyssinian_1.jpg is 'one', expected a whole number"),
                ("Abyssinian_1 1", "'Abyssinian_1 1', expected name, class, species and breed"),
                ("Beagle_9 1 2 1", "class 1 is"),
            )
        ),
        *(
            (both(*(text(f"annotations/{split}.txt", f"{row}\n") for split in ("trainval", "test"))), "leaves")
            for row in ("../../secret_1 1 1 1", "/etc/secret_1 1 1 1")
        ),
    ],
    "places205": [
        *(
            (text(f"{PLACES}/{name}_places205.csv", content), expected)
            for name, content, expected in (
                ("train", "a/abbey/x.jpg,0\n", "expected a file, a space and the number of its class"),
                ("train", "a/abbey/x.jpg 3\n", "the class of a/abbey/x.jpg is 3, expected 0..2"),
                ("train", "a/abbey/x.jpg abbey\n", "is 'abbey', expected a whole number"),
                ("train", "../../secret.jpg 0\n", "leaves"),
                ("train", "/etc/passwd 0\n", "leaves"),
                ("train", "\n\n", "lists no images"),
                ("categoryIndex", "/a/abbey 0\n/b/basilica 0\n", "its 2 classes are not numbered 0..1"),
                ("categoryIndex", "/a/abbey 0\n/b/basilica 2\n", "its 2 classes are not numbered 0..1"),
                ("categoryIndex", "/a/abbey 205\n", "its 1 classes are not numbered 0..0"),
            )
        ),
    ],
    "sintel": [
        *(
            (
                gone(f"training/{part}/market_2/frame_0002.*"),
                f"training/{part}/market_2/frame_0002 … is missing; it comes from … MPI-Sintel-training_{archive}.zip",
            )
            for part, archive in (
                ("occlusions", "extras"),
                ("invalid", "extras"),
                ("flow", "extras"),
                ("clean", "images"),
                ("final", "images"),
            )
        ),
        (gone("training/final"), "training/final is missing; it comes from … MPI-Sintel-training_images.zip"),
        (gone("training/*/alley_1/frame_0002.*"), "clean/alley_1/frame_0002.png is missing"),
        (
            gone("training/clean/temple_2"),
            "has the scenes alley_1, market_2, expected one of temple_2 and temple_3",
        ),
        (nothing, "sintel.pass=raw: expected clean, final or both", {"pass": "raw"}),
    ],
    "sun397": [
        *(
            (lambda folder, row=row: text("Testing_01.txt", f"{row}\n")(folder.parent), expected)
            for row, expected in (
                ("/c/church/sun_x.jpg", "'c/church' is not among the 3 classes"),
                ("/z/zoo/sun_x.jpg", "'z/zoo' is not among the 3 classes"),
                ("//etc/passwd", "is not among the 3 classes"),
            )
        ),
        (nothing, "Training_03.txt is missing; it comes from Partitions.zip", {"split": 3}),
        (nothing, "sun397.split=11: expected a number in [1, 10]", {"split": 11}),
        (
            both(
                text("ClassName.txt", "/../outside\n"),
                *(text(f"../{half}_01.txt", "/../outside/sun_x.jpg\n") for half in ("Training", "Testing")),
            ),
            "leaves",
        ),
    ],
    "voc2007": [
        *(
            (voc_annotation(old, new), f"/VOC2007/Annotations/ … {expected}", {"protocol": "discovery"})
            for old, new, expected in (
                ("<name>aeroplane", "<name>aeroplan", "unknown class 'aeroplan' … aeroplane"),
                ("<xmin>", "<xmin>x", "the box 'x"),
                ("<xmax>", "<xmax>-", "not empty"),
                ("<ymin>", "<ymin>nan", "the box"),
                ("<bndbox>", "<bndbax>", "is not XML"),
                ("<difficult>0", "<difficult>2", "difficult is '2'"),
                ("</annotation>", "", "is not XML"),
                ("<annotation>", '<!DOCTYPE a [<!ENTITY x "xxx">]><annotation>', "declares a document type"),
                ("</annotation>", "</annotation>" + " " * (1 << 22), "more than the 4,194,304 bytes"),
            )
        ),
        *(
            (voc_list(name, change), expected, {"protocol": "multilabel"})
            for name, change, expected in (
                ("train.txt", lambda rows: rows + rows.split()[0], "train.txt lists image … twice"),
                ("train.txt", lambda rows: "../../a\n" + rows, "expected the name of an image without a folder"),
                ("train.txt", lambda rows: "\n", "lists no images"),
                ("train.txt", lambda rows: rows + "999999\n", "does not list 999999, which train.txt does"),
                ("dog_train.txt", lambda rows: rows.replace(" -1", " 2", 1), "expected an image and 1, 0 or -1"),
                ("dog_train.txt", lambda rows: rows.replace(" -1", "", 1), "expected an image and 1, 0 or -1"),
            )
        ),
        (gone("VOC2007/ImageSets/Main/*test.txt"), VOC_TEST_ARCHIVE, {"protocol": "multilabel"}),
    ],
    "voc2012": [
        (
            gone("VOC2012/SegmentationClass"),
            "SegmentationClass is missing; it comes from VOCtrainval",
            {"protocol": "segmentation"},
        ),
    ],
}
CASES = [(name, *case, *([{}] if len(case) == 2 else [])) for name, cases in BROKEN.items() for case in cases]


@pytest.mark.parametrize(
    ("name", "edit", "expected", "options"), CASES, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(CASES)]
)
def test_what_is_wrong_is_said_in_one_line(
    written: Written, name: str, edit: Edit, expected: str, options: dict[str, Any]
) -> None:
    root, folder = written(name, **options.get(TASK, {}))
    edit(folder)
    message = refusal(name, root, **{key: value for key, value in options.items() if key != TASK})
    assert_says(message, expected)
