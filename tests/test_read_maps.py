"""Datasets of masks, depth, boxes and flow: what is read is what other readers read, and what was planted."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy.io import savemat
from torchvision.datasets import CocoDetection, Sintel, VOCDetection, VOCSegmentation

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Boxed, FlowPairs, MultiLabelled, Segmented
from dinoreg.evaluation.features.images import read_picture, read_with_truth
from dinoreg.evaluation.readers.coco import read_instances
from dinoreg.evaluation.readers.pascal import CLASSES, objects
from dinoreg.runtime.errors import UserError
from tests.miniatures import ade20k, coco20k, coco2017, nyu, sintel, voc2007, voc2012
from tests.reading import read


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    ade20k.write(tmp_path, per_class=2)
    return tmp_path


@pytest.fixture
def film(tmp_path: Path) -> Path:
    sintel.write(tmp_path, per_class=3)
    return tmp_path


def test_masks_are_the_files_less_one_with_other_ignored(ade: Path) -> None:
    found = read("ade20k", ade).splits
    assert {name: len(split) for name, split in found.items()} == {"train": 6, "test": 2}
    seen: set[int] = set()
    for name, folder in (("train", "training"), ("test", "validation")):
        split = found[name]
        assert split.num_classes == 150
        for index in range(len(split)):
            path = Path(split.source.name(index))
            assert path.parent.name == folder
            stored = np.asarray(Image.open(path.parents[2] / "annotations" / folder / f"{path.stem}.png")).astype(int)
            mask = split.mask(index)
            assert mask.dtype == np.uint8
            assert mask.shape == Image.open(path).size[::-1]
            for y in range(stored.shape[0]):
                for x in range(stored.shape[1]):
                    assert mask[y, x] == (255 if stored[y, x] == 0 else stored[y, x] - 1)
            seen |= set(np.unique(mask).tolist())
    assert {0, 149, 255} <= seen


def test_images_are_in_the_order_of_their_names_and_of_many_sizes(ade: Path) -> None:
    split = read("ade20k", ade).splits["train"]
    names = [Path(split.source.name(index)).name for index in range(len(split))]
    assert names == [f"ADE_train_{number:08d}.jpg" for number in range(1, 7)]
    assert len({split.mask(index).shape for index in range(len(split))}) == len(ade20k.SIZES)


def test_there_are_150_names(ade: Path) -> None:
    names = read("ade20k", ade).class_names
    assert len(names) == 150
    assert (names[0], names[149]) == ("object 1, thing 1", "object 150, thing 150")


def test_hidden_files_are_no_images(ade: Path) -> None:
    (ade / "ADEChallengeData2016/images/training/._ADE_train_00000001.jpg").write_bytes(b"")
    assert len(read("ade20k", ade).splits["train"]) == 6


def test_a_mask_of_another_size_or_with_more_than_150_is_named(ade: Path) -> None:
    folder = ade / "ADEChallengeData2016/annotations/training"
    Image.new("L", (9, 8)).save(folder / "ADE_train_00000001.png")
    mask = np.asarray(Image.open(folder / "ADE_train_00000002.png")).copy()
    mask[0, 0] = 151
    Image.fromarray(mask).save(folder / "ADE_train_00000002.png")
    split = read("ade20k", ade).splits["train"]
    with pytest.raises(UserError, match=r"ADE_train_00000001\.jpg: its mask is 8 x 9 pixels, the image 56 x 70"):
        read_with_truth(split, 0)
    with pytest.raises(UserError, match=r"ADE_train_00000002\.png has the value 151, expected 0\.\.150"):
        split.mask(1)


def test_published_figures_are_percent_with_a_source() -> None:
    task = find_benchmark("ade20k").tasks[0]
    assert (task.protocol, task.metric) == ("segmentation", "mIoU")
    assert dict(task.counts) == {"train": 20_210, "test": 2_000}
    values = {each.model: each.value for each in task.published}
    assert len(values) == len(task.published)
    assert values["DINOv2 ViT-L/14 (ImageNet-22k), 4 registers"] == 47.9
    assert values["DINOv2 ViT-S/14 (distilled)"] == 44.3
    assert all(20 < each.value < 60 and "arXiv" in each.source for each in task.published)


def boxes_of(target: dict[str, Any]) -> list[tuple[float, ...]]:
    """(box, class, difficult) by torchvision's parse, which keeps what the XML says as text."""
    found = []
    for each in target["annotation"].get("object", []):
        x0, y0, x1, y1 = (float(each["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
        found.append((x0 - 1, y0 - 1, x1, y1, CLASSES.index(each["name"]), int(each["difficult"])))
    return found


@pytest.mark.parametrize(
    ("year", "protocol", "split", "image_set"),
    [
        ("2007", "discovery", "test", "trainval"),
        ("2007", "detection", "train", "trainval"),
        ("2007", "detection", "test", "test"),
        ("2012", "discovery", "test", "trainval"),
        ("2012", "detection", "train", "train"),
        ("2012", "detection", "test", "val"),
    ],
)
def test_voc_images_and_boxes_are_those_of_torchvision(
    tmp_path: Path, year: str, protocol: str, split: str, image_set: str
) -> None:
    (voc2007 if year == "2007" else voc2012).write(tmp_path, per_class=2)
    ours: Boxed = read(f"voc{year}", tmp_path, protocol).splits[split]
    theirs = VOCDetection(str(tmp_path), year=year, image_set=image_set)
    assert len(ours) == len(theirs) > 0
    for index in range(len(ours)):
        image, target = theirs[index]
        np.testing.assert_array_equal(np.asarray(read_picture(ours.source, index)), np.asarray(image))
        parts = (ours.boxes, ours.labels, ours.difficult)
        found = [(*box, *rest) for box, *rest in zip(*(part[index].tolist() for part in parts))]
        np.testing.assert_allclose(found, boxes_of(target), rtol=1e-6)
        assert not ours.crowd[index].any()


def test_masks_are_those_of_torchvision_with_void_ignored(tmp_path: Path) -> None:
    voc2012.write(tmp_path, per_class=2)
    data = read("voc2012", tmp_path, "segmentation")
    assert data.class_names[:2] == ("background", "aeroplane")
    for split, image_set in (("train", "train"), ("test", "val")):
        ours: Segmented = data.splits[split]
        theirs = VOCSegmentation(str(tmp_path), year="2012", image_set=image_set)
        assert len(ours) == len(theirs) == 8
        assert ours.num_classes == 21
        for index in range(len(ours)):
            mask = ours.mask(index)
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask, np.asarray(theirs[index][1]))
            assert {0, 255} < set(np.unique(mask)) <= {0, 1, 9, 12, 15, 255}


def test_class_lists_agree_with_the_annotations(tmp_path: Path) -> None:
    voc2007.write(tmp_path)
    data = read("voc2007", tmp_path, "multilabel")
    for split in ("train", "val", "test"):
        ours: MultiLabelled = data.splits[split]
        theirs = VOCDetection(str(tmp_path), year="2007", image_set=split)
        for index in range(len(ours)):
            expected = np.zeros(20, dtype=int)
            for *_, label, difficult in sorted(boxes_of(theirs[index][1]), key=lambda row: -row[-1]):
                expected[int(label)] = -1 if difficult else 1  # difficult ones first: any other wins
            assert ours.labels[index].tolist() == expected.tolist()
    assert set(np.unique(data.splits["train"].labels)) == {-1, 0, 1}


def test_the_traps_of_voc_are_in_the_miniatures(tmp_path: Path) -> None:
    voc2007.write(tmp_path)
    voc2012.write(tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2007"
    text = "".join(path.read_text() for path in (folder / "Annotations").iterdir())
    assert "<part>" in text
    assert "<truncated>1</truncated>" in text
    assert "<difficult>1</difficult>" in text
    rows = (folder / "ImageSets/Main/dog_train.txt").read_text().splitlines()
    assert {row[6:] for row in rows} == {"  1", " -1", "  0"}
    assert sum(len(each) for each in read("voc2007", tmp_path, "discovery").splits["test"].boxes) == text.count(
        "<object>"
    ) - sum(len(each) for each in read("voc2007", tmp_path, "detection").splits["test"].boxes)
    listed = len((tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt").read_text().split())
    assert len(list((tmp_path / "VOCdevkit/VOC2012/JPEGImages").iterdir())) > listed
    boxes = read("voc2012", tmp_path, "detection").splits["train"].boxes
    assert any((each % 1 != 0).any() for each in boxes)


def test_discovery_does_without_the_test_archive_and_classification_names_it(tmp_path: Path) -> None:
    folder = voc2007.write(tmp_path, per_class=1) / "VOC2007"
    for path in (folder / "ImageSets/Main").glob("*test.txt"):
        path.unlink()
    assert len(read("voc2007", tmp_path, "discovery").splits["test"]) == 8
    with pytest.raises(UserError, match=r"test\.txt is missing; it comes from VOCtest_06-Nov-2007\.tar"):
        read("voc2007", tmp_path, "multilabel")


def test_missing_folders_are_named_with_their_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VOC2012.* is missing; it comes from VOCtrainval_11-May-2012\.tar"):
        read("voc2012", tmp_path, "discovery")
    folder = voc2012.write(tmp_path, per_class=1) / "VOC2012"
    (folder / "SegmentationClass").rename(folder / "Elsewhere")
    assert len(read("voc2012", tmp_path, "discovery").splits["test"]) == 8
    with pytest.raises(UserError, match="SegmentationClass is missing; it comes from VOCtrainval"):
        read("voc2012", tmp_path, "segmentation")


def test_a_document_type_is_seen_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes("<!DOCTYPE a [<!ENTITY x 'x'>]><annotation>&x;</annotation>".encode("utf-16"))
    with pytest.raises(UserError, match="declares a document type"):
        objects(path, "voc2007", "archive")
    with pytest.raises(UserError, match=r"b\.xml is missing; it comes from archive"):
        objects(tmp_path / "b.xml", "voc2007", "archive")


def test_parts_outside_of_objects_and_missing_flags_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    box = "<bndbox><xmax>9</xmax><xmin>1</xmin><ymax>7</ymax><ymin>2.5</ymin></bndbox>"
    path.write_text(
        f"<annotation><object><part><name>head</name>{box}</part><name> cat </name>{box}</object></annotation>"
    )
    assert objects(path, "voc2012", "archive") == [((0.0, 1.5, 9.0, 7.0), CLASSES.index("cat"), False)]
    path.write_text(f"<annotation><object><name>cat</name><part><name>head</name>{box}</part></object></annotation>")
    with pytest.raises(UserError, match="the box"):
        objects(path, "voc2012", "archive")


def test_a_voc_mask_with_an_unknown_class_or_another_size_is_refused(tmp_path: Path) -> None:
    folder = voc2012.write(tmp_path, per_class=1) / "VOC2012"
    split = read("voc2012", tmp_path, "segmentation").splits["train"]
    name = (folder / "ImageSets/Segmentation/train.txt").read_text().split()[0]
    path = folder / f"SegmentationClass/{name}.png"
    Image.fromarray(np.full((70, 84), 21, dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match=r"has the value 21, expected 0\.\.20 or 255"):
        split.mask(0)
    Image.fromarray(np.zeros((70, 83), dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match="its mask is 70 x 83 pixels"):
        read_with_truth(split, 0)


def test_shuffled_boxes_and_labels_are_not_those_of_the_pictures(tmp_path: Path) -> None:
    voc2007.write(tmp_path / "a")
    voc2007.write(tmp_path / "b", shuffled=True)
    true, shuffled = (read("voc2007", tmp_path / name, "discovery").splits["test"] for name in "ab")
    for index in range(len(true)):  # the pictures are the same
        assert true.source.read(index) == shuffled.source.read(index)
    assert np.mean([np.array_equal(a, b) for a, b in zip(true.boxes, shuffled.boxes)]) < 0.1


@pytest.mark.parametrize(("split", "name"), [("train", "train2017"), ("test", "val2017")])
def test_coco_images_and_boxes_are_those_of_torchvision(tmp_path: Path, split: str, name: str) -> None:
    folder = coco2017.write(tmp_path, per_class=3)
    ours: Boxed = read("coco2017", tmp_path).splits[split]
    theirs = CocoDetection(str(folder / name), str(folder / f"annotations/instances_{name}.json"))
    assert len(ours) == len(theirs) == 9
    places = {number: place for place, number in enumerate(sorted(theirs.coco.cats))}
    for index in range(len(ours)):
        image, target = theirs[index]
        target = [each for each in target if split == "test" or each["bbox"][2] > 0]
        np.testing.assert_array_equal(np.asarray(read_picture(ours.source, index)), np.asarray(image))
        expected = [
            (x, y, x + w, y + h, places[each["category_id"]], each["iscrowd"])
            for each in target
            for x, y, w, h in [each["bbox"]]
        ]
        parts = (ours.boxes, ours.labels, ours.crowd)
        assert all(torch.from_numpy(part[index]).numel() == part[index].size for part in parts)
        found = [(*box, *rest) for box, *rest in zip(*(part[index].tolist() for part in parts))]
        assert sorted(found) == sorted(expected)


def test_the_traps_of_coco_are_in_the_miniature(tmp_path: Path) -> None:
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
    assert read_picture(data.splits["train"].source, 0).size == (84, 70)


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
        assert read_picture(data.splits["test"].source, index).mode == "RGB"
    assert [len(boxes) for boxes in data.splits["test"].boxes] == [2, 2, 0]  # of places 1, 0 and 3 of the miniature


def test_of_both_years_annotations_those_of_2014_are_read(tmp_path: Path) -> None:
    folder = coco20k.write(tmp_path)
    path = folder / "annotations/instances_train2014.json"
    path.with_name("instances_train2017.json").write_text(path.read_text())
    assert read("coco20k", tmp_path).variant == "boxes of instances_train2014.json, images of train2014"


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


def test_shuffled_boxes_of_coco_are_not_those_of_the_pictures(tmp_path: Path) -> None:
    coco20k.write(tmp_path / "a")
    coco20k.write(tmp_path / "b", shuffled=True)
    true, shuffled = (read("coco20k", tmp_path / name).splits["test"] for name in "ab")
    same = [np.array_equal(a, b) for a, b in zip(true.boxes, shuffled.boxes)]
    assert np.mean(same) < 0.3


def test_labelled_frames_come_right_side_up_with_their_depth(tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=2)
    data = read("nyu", tmp_path)
    # The miniature's rule: one in four frames is a test frame, training frames are listed backwards.
    expected = {"train": [7, 6, 4, 3, 2, 0], "test": [1, 5]}
    for split, numbers in expected.items():
        found = data.splits[split]
        assert len(found) == len(numbers)
        for index, number in enumerate(numbers):
            image, depth = nyu.frame(0, number)
            pixels = np.asarray(read_picture(found.source, index))
            assert pixels.shape == (48, 64, 3)
            np.testing.assert_array_equal(pixels[1:47, 1:63], image[1:47, 1:63])
            assert found.source.name(index).endswith(f"frame {number + 1}")
            np.testing.assert_array_equal(found.depth(index), nyu.holes(depth, 0, number))
            assert found.depth(index).dtype == np.float32
    assert data.variant == "NYU-795, raw depths"


def test_the_white_frame_is_black(tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=1)
    with h5py.File(tmp_path / "NYU" / "nyu_depth_v2_labeled.mat") as file:
        assert (file["images"][0][:, 0] == 255).all()  # the trap is there
    pixels = np.asarray(read_picture(read("nyu", tmp_path).splits["test"].source, 0))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 0).all()


@pytest.mark.parametrize("layout", ["sync", "toolbox"])
def test_listed_frames_are_metres_of_the_listed_files(tmp_path: Path, layout: str) -> None:
    folder = nyu.write(tmp_path, per_class=2, layout=layout)
    data = read("nyu", tmp_path)
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
    image = np.asarray(read_picture(train.source, 0), dtype=int)
    assert abs(image - nyu.frame(0, 7)[0]).mean() < 4  # JPEG
    assert data.variant == "synced frames, raw depths"


def test_both_layouts_have_the_same_test_frames(tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=2)
    labelled = read("nyu", tmp_path).splits["test"]
    nyu.write(tmp_path, per_class=2, layout="sync")
    data = read("nyu", tmp_path)
    assert data.variant.startswith("synced")  # of both, that of the published numbers
    synced = data.splits["test"]
    for index in range(2):
        a, b = labelled.depth(index), synced.depth(index)
        np.testing.assert_allclose(np.delete(a, 10, axis=0), np.delete(b, 10, axis=0), atol=5.1e-4)
        pixels = [np.asarray(read_picture(split.source, index), dtype=int) for split in (labelled, synced)]
        assert abs(pixels[0] - pixels[1]).mean() < 4


def test_many_threads_read_what_one_reads(tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=4)
    train = read("nyu", tmp_path).splits["train"]
    expected = [nyu.frame(0, number) for number in range(16) if number % 4 != 1][::-1]
    jobs = list(range(len(train))) * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: (train.source.read(index), train.depth(index)), jobs))
    for index, (image, depth) in zip(jobs, found):
        np.testing.assert_array_equal(image[1:47, 1:63], expected[index][0][1:47, 1:63])
        known = depth > 0
        np.testing.assert_array_equal(depth[known], expected[index][1][known])


def test_crops_are_the_published_ones(tmp_path: Path) -> None:
    nyu.write(tmp_path, per_class=1)
    extra = read("nyu", tmp_path).extra
    assert extra["eigen_crop"] == ((45, 471, 41, 601), (480, 640))
    assert extra["train_crop"] == ((45, 472, 43, 608), (480, 640))  # the box (43, 45, 608, 472) of x1 y1 x2 y2


def test_published_depths_stand_with_their_models() -> None:
    numbers = {
        (each.model, each.variant, each.source[:6]): each.value for each in find_benchmark("nyu").tasks[0].published
    }
    assert numbers["DINOv2 ViT-L/14 (distilled)", "lin.1", "DINOv2"] == 0.384
    assert numbers["DINOv2 ViT-S/14 (distilled)", "lin.4", "DINOv2"] == 0.417
    assert numbers["DINOv2 ViT-g/14", "lin.4", "DINOv2"] == 0.298
    assert numbers["DINOv2 ViT-L/14 (ImageNet-22k), 4 registers", "", "DINOv2"] == 0.366
    assert numbers["DINOv2 ViT-L/14 (released), 4 registers", "", "Vision"] == 0.3823
    assert len(numbers) == len(find_benchmark("nyu").tasks[0].published) == 23


def _replace_splits(folder: Path, train: list[int], test: list[int]) -> None:
    savemat(folder / "splits.mat", {"trainNdxs": np.uint16([train]).T, "testNdxs": np.uint16([test]).T})


def test_a_depth_map_that_is_missing_or_of_eight_bits_is_named(tmp_path: Path) -> None:
    folder = nyu.write(tmp_path, per_class=1, layout="sync")
    test = read("nyu", tmp_path).splits["test"]
    path = folder / "official_splits" / "test" / "home_office" / "sync_depth_00001.png"
    Image.new("L", (64, 48)).save(path)
    with pytest.raises(UserError, match=r"sync_depth_00001.png: holds bytes, expected a depth map of 16 bits"):
        test.depth(0)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"sync_depth_00001.png: cannot be read as a depth map"):
        test.depth(0)
    path.unlink()
    with pytest.raises(UserError, match=r"sync_depth_00001.png: .*No such file"):
        test.depth(0)


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    folder = nyu.write(tmp_path, per_class=1)
    source = read("nyu", tmp_path).splits["train"].source
    before = (source.fingerprint(), source.stamp())
    _replace_splits(folder, [1, 3], [2])
    other = read("nyu", tmp_path).splits["train"].source
    assert other.fingerprint() != before[0]
    with open(folder / "nyu_depth_v2_labeled.mat", "ab") as file:
        file.write(b"\0")
    assert source.fingerprint() == before[0]
    assert source.stamp() != before[1]


@pytest.mark.parametrize("rendering", ["clean", "final"])
def test_pairs_flows_and_order_are_those_of_torchvision(film: Path, rendering: str) -> None:
    reference = Sintel(str(film), split="train", pass_name=rendering)
    # The scenes come in the order of the file system there.
    order = sorted(range(len(reference)), key=lambda index: reference._image_list[index][0])
    splits = read("sintel", film).extra["passes"][rendering]
    ours = [(splits[split], index) for split in ("train", "test") for index in range(len(splits[split]))]
    ours.sort(key=lambda item: item[0].source.name(int(item[0].first[item[1]])))
    assert len(ours) == len(reference) == 6
    for (pairs, index), theirs in zip(ours, order):
        first, second, flow = reference[theirs]
        np.testing.assert_array_equal(read_picture(pairs.source, int(pairs.first[index])), np.asarray(first))
        np.testing.assert_array_equal(read_picture(pairs.source, int(pairs.second[index])), np.asarray(second))
        np.testing.assert_array_equal(pairs.flow(index), flow.transpose(1, 2, 0))
        assert pairs.source.name(int(pairs.first[index])) == reference._image_list[theirs][0]


def test_temple_2_and_3_are_scored_and_the_other_scenes_fitted_on(film: Path) -> None:
    for folder in (film / "Sintel" / "training").iterdir():
        shutil.copytree(folder / "alley_1", folder / "temple_3")
    data = read("sintel", film)
    assert set(data.splits["test"].scenes) == {"temple_2", "temple_3"}
    assert set(data.splits["train"].scenes) == {"alley_1", "market_2"}
    assert data.variant == "temple_2 and temple_3"
    assert find_benchmark("sintel").tasks[0].counts == {"train": 943, "test": 98}


def test_both_passes_share_one_source_and_the_clean_one_comes_first(film: Path) -> None:
    data = read("sintel", film)
    assert list(data.extra["passes"]) == ["clean", "final"]
    clean, final = (data.extra["passes"][name]["test"] for name in ("clean", "final"))
    assert data.splits["test"] is clean
    assert clean.source is final.source
    assert len(clean.source) == 2 * 3 * 3  # the last frame of a scene is only ever a second one
    assert "/clean/" in clean.source.name(int(clean.first[0]))
    assert "/final/" in final.source.name(int(final.first[0]))


def test_one_pass_is_read_where_the_other_is_missing(film: Path) -> None:
    shutil.rmtree(film / "Sintel" / "training" / "clean")
    data = read("sintel", film, **{"pass": "final"})
    assert list(data.extra["passes"]) == ["final"]
    with pytest.raises(UserError, match=r"training/clean is missing; it comes from MPI-Sintel-complete\.zip"):
        read("sintel", film)


def test_masks_say_what_is_invalid_unknown_or_too_long_and_what_is_hidden(film: Path) -> None:
    pairs = read("sintel", film).splits["test"]
    training = film / "Sintel" / "training"
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
def test_the_folder_may_have_either_name_or_be_the_root_itself(film: Path, folder: str) -> None:
    if folder == "MPI-Sintel":
        (film / "Sintel").rename(film / "MPI-Sintel")
    where = film / "Sintel" if folder == "." else film
    assert isinstance(read("sintel", where).splits["test"], FlowPairs)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PI", "is not a .flo file"),
        (b"HEIP" + bytes(8), "is not a .flo file"),
        (b"PIEH" + np.array([4, 3], "<i4").tobytes() + bytes(95), "has 107 bytes for 3x4 pixels"),
        (b"PIEH" + np.array([-4, -3], "<i4").tobytes() + bytes(96), "has 108 bytes for -3x-4 pixels"),
    ],
)
def test_a_damaged_flow_file_is_named(film: Path, content: bytes, told: str) -> None:
    path = film / "Sintel" / "training" / "flow" / "temple_2" / "frame_0002.flo"
    path.write_bytes(content)
    pairs = read("sintel", film).splits["test"]
    for reader in (pairs.flow, pairs.valid):
        with pytest.raises(UserError, match=f"{path} {told}"):
            reader(1)


def test_a_damaged_mask_or_one_of_another_size_is_named(film: Path) -> None:
    pairs = read("sintel", film).splits["test"]
    path = film / "Sintel" / "training" / "invalid" / "temple_2" / "frame_0001.png"
    Image.new("L", (7, 5)).save(path)
    with pytest.raises(UserError, match=rf"{path} is 5x7, its flow 126x168"):
        pairs.valid(0)
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{path} cannot be read as a mask"):
        pairs.valid(0)


def test_no_number_is_claimed_without_saying_that_it_is_an_upper_bound() -> None:
    assert len(find_benchmark("sintel").tasks[0].published) == 2
    for number in find_benchmark("sintel").tasks[0].published:
        assert "upper bound" in number.model
        assert "secondary source" in number.differs
