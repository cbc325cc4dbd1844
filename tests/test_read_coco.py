"""COCO 2017 and COCO-20k against pycocotools and torchvision on the miniatures; how files can be wrong."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Boxed, Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.evaluation.readers.coco import Ragged, read_instances
from dinoreg.runtime.errors import UserError
from tests.miniatures import coco20k, coco2017


def read(name: str, root: Path, **options: str) -> Data:
    benchmark = find_benchmark(name)
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


@pytest.mark.parametrize(("split", "name"), [("train", "train2017"), ("test", "val2017")])
def test_images_and_boxes_are_those_of_torchvision(tmp_path: Path, split: str, name: str) -> None:
    folder = coco2017.write(tmp_path, per_class=3)
    ours: Boxed = read("coco2017", tmp_path).splits[split]
    theirs = CocoDetection(str(folder / name), str(folder / f"annotations/instances_{name}.json"))
    assert len(ours) == len(theirs) == 9
    places = {number: place for place, number in enumerate(sorted(theirs.coco.cats))}
    for index in range(len(ours)):
        image, target = theirs[index]
        target = [each for each in target if split == "test" or each["bbox"][2] > 0]
        np.testing.assert_array_equal(np.asarray(read_rgb(ours.source, index)), np.asarray(image))
        expected = [
            (x, y, x + w, y + h, places[each["category_id"]], each["iscrowd"], each["area"])
            for each in target
            for x, y, w, h in [each["bbox"]]
        ]
        parts = (ours.boxes, ours.labels, ours.crowd, ours.area)
        found = [(*box, *rest) for box, *rest in zip(*(part[index].tolist() for part in parts if part is not None))]
        assert sorted(found) == sorted(expected)


def test_the_traps_are_in_the_miniature(tmp_path: Path) -> None:
    folder = coco2017.write(tmp_path)
    data = read("coco2017", tmp_path)
    train, test = data.splits["train"], data.splits["test"]
    assert list(data.class_names) == ["person", "bottle", "toothbrush"]
    assert train.num_classes == 3
    assert [len(boxes) for boxes in test.boxes].count(0) == 1
    assert sum(crowd.sum() for crowd in train.crowd) > 0
    widths = [boxes[:, 2] - boxes[:, 0] for boxes in test.boxes]
    assert min(width.min() for width in widths if len(width)) == 0
    assert min((boxes[:, 2] - boxes[:, 0]).min() for boxes in train.boxes if len(boxes)) > 0
    theirs = COCO(folder / "annotations/instances_train2017.json")
    crowds = [each for each in theirs.anns.values() if each["iscrowd"]]
    assert all(theirs.annToMask(each).sum() == each["area"] for each in crowds)
    assert all(not flags.any() for flags in train.difficult)


def test_both_places_of_the_images_are_accepted(tmp_path: Path) -> None:
    folder = coco2017.write(tmp_path / "a", per_class=1)
    (folder / "images").mkdir()
    for name in ("train2017", "val2017"):
        (folder / name).rename(folder / "images" / name)
    data = read("coco2017", tmp_path / "a")
    assert read_rgb(data.splits["train"].source, 0).size == (84, 70)


def test_coco20k_reads_the_listed_images_in_the_order_of_the_list(tmp_path: Path) -> None:
    folder = coco20k.write(tmp_path)
    data = read("coco20k", tmp_path)
    test: Boxed = data.splits["test"]
    rows = (folder / "coco_20k_filenames.txt").read_text().split()
    assert len(test) == len(rows) == 18
    theirs = COCO(folder / "annotations/instances_train2014.json")
    files = {each["file_name"]: each["id"] for each in theirs.dataset["images"]}
    for index, row in enumerate(rows):
        assert test.source.name(index) == str(folder / row)
        annotations = theirs.loadAnns(theirs.getAnnIds(files[Path(row).name]))
        kept = [each["bbox"] for each in annotations if each["bbox"][2] > 0]
        assert sorted(test.boxes[index][:, :2].tolist()) == sorted(box[:2] for box in kept)
    assert data.variant == "boxes of instances_train2014.json, images of train2014"


@pytest.mark.parametrize("place", ["", "annotations/", "datasets/"])
def test_coco20k_can_be_read_from_the_files_of_2017_by_id(tmp_path: Path, place: str) -> None:
    folder = coco2017.write(tmp_path, per_class=2)
    listed = [25, 9, 57]
    path = folder / f"{place}coco_20k_filenames.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"train2014/COCO_train2014_{number:012d}.jpg\n" for number in listed))
    data = read("coco20k", tmp_path)
    assert data.variant == "boxes of instances_train2017.json, images of train2017"
    for index, number in enumerate(listed):
        assert data.splits["test"].source.name(index).endswith(f"train2017/{number:012d}.jpg")
        assert read_rgb(data.splits["test"].source, index).mode == "RGB"
    assert [len(boxes) for boxes in data.splits["test"].boxes] == [2, 2, 0]  # of places 1, 0 and 3 of the miniature


def test_the_years_annotations_can_be_asked_for(tmp_path: Path) -> None:
    folder = coco20k.write(tmp_path)
    path = folder / "annotations/instances_train2014.json"
    path.with_name("instances_train2017.json").write_text(path.read_text())
    assert "train2014.json" in read("coco20k", tmp_path).variant
    variant = read("coco20k", tmp_path, annotations="2017").variant
    assert variant == "boxes of instances_train2017.json, images of train2014"
    with pytest.raises(UserError, match="expected auto, 2014 or 2017"):
        read("coco20k", tmp_path, annotations="2015")


def test_polygons_are_dropped_as_each_object_closes(tmp_path: Path) -> None:
    polygon = [round(0.37 * k, 2) for k in range(300)]
    objects = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0, "segmentation": [polygon]}
        for _ in range(400)
    ]
    categories = [{"id": 1, "name": "thing"}]
    path = tmp_path / "big.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": objects,
                                "categories": categories}))  # fmt: skip
    tracemalloc.start()
    found = read_instances(path, "coco2017", "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.objects[0]) == 400
    assert peak < 2.5 * path.stat().st_size  # bytes and text; the polygons' numbers would take ten times as much


def test_ragged_arrays_are_a_sequence() -> None:
    ragged = Ragged(np.arange(6), np.array([0, 2, 2, 6]))
    assert [each.tolist() for each in ragged] == [[0, 1], [], [2, 3, 4, 5]]
    assert ragged[-1].tolist() == [2, 3, 4, 5]
    assert [each.tolist() for each in ragged[1:]] == [[], [2, 3, 4, 5]]
    assert [each.tolist() for each in ragged.take(np.array([2, 0, 2]))] == [[2, 3, 4, 5], [0, 1], [2, 3, 4, 5]]
    with pytest.raises(IndexError):
        ragged[3]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["annotations"][0].update(image_id=77777), "image 77777, which the file does not list"),
        (lambda v: v["annotations"][0].update(category_id=2), "category 2, which the file does not list"),
        (lambda v: v["annotations"][0].update(bbox=[1, 2, 3]), "without image_id, category_id and bbox"),
        (lambda v: v["annotations"][0].update(bbox=[1, 2, -3, 4]), r"has the box \(1.0, 2.0, -3.0, 4.0\)"),
        (lambda v: v["annotations"][0].update(iscrowd=2), "iscrowd 2"),
        (lambda v: v["images"].append(v["images"][0]), "is there twice"),
        (lambda v: v["images"][0].update(file_name="../../secret.jpg"), "leaves"),
        (lambda v: v["images"][0].pop("file_name"), "an image without id and file_name"),
        (lambda v: v.pop("categories"), "no list 'categories'"),
        (lambda v: v["categories"].pop(), "which the file does not list"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_in_one_line(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    folder = coco2017.write(tmp_path, per_class=1)
    edit(folder / "annotations/instances_train2017.json", change)
    with pytest.raises(UserError, match=message) as caught:
        read("coco2017", tmp_path)
    assert "\n" not in str(caught.value)
    assert "coco2017" in str(caught.value)


def test_a_torn_file_and_differing_categories_are_refused(tmp_path: Path) -> None:
    folder = coco2017.write(tmp_path, per_class=1)
    path = folder / "annotations/instances_val2017.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"instances_val2017\.json cannot be read as JSON"):
        read("coco2017", tmp_path)
    path.write_text(text.replace('"toothbrush"', '"hairbrush"'))
    with pytest.raises(UserError, match="has other categories"):
        read("coco2017", tmp_path)


def test_missing_files_are_named_with_their_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"instances_train2017\.json is missing; it comes from annotations_trainval"):
        read("coco2017", tmp_path)
    with pytest.raises(UserError, match=r"coco_20k_filenames\.txt is missing; it comes from LOST"):
        read("coco20k", tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("train2014/COCO_train2014_000000000009.png\n", "expected train2014"),
        ("train2014/COCO_train2014_000000000025.jpg\n" * 2, "lists image 25 twice"),
        ("train2014/COCO_train2014_000000000001.jpg\n", "image 1 of .* is not in"),
        ("\n", "lists no images"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    folder = coco20k.write(tmp_path)
    (folder / "coco_20k_filenames.txt").write_text(rows)
    with pytest.raises(UserError, match=message):
        read("coco20k", tmp_path)


def test_shuffled_boxes_are_not_those_of_the_pictures(tmp_path: Path) -> None:
    coco20k.write(tmp_path / "a")
    coco20k.write(tmp_path / "b", shuffled=True)
    true, shuffled = (read("coco20k", tmp_path / name).splits["test"] for name in "ab")
    same = [np.array_equal(a, b) for a, b in zip(true.boxes, shuffled.boxes)]
    assert np.mean(same) < 0.3
