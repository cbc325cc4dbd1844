"""PASCAL VOC 2007 and 2012 against torchvision's readers on the miniatures; how files can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import VOCDetection, VOCSegmentation

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Boxed, Data, MultiLabelled, Segmented
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.evaluation.readers.pascal import CLASSES, objects
from dinoreg.runtime.errors import UserError
from tests.miniatures import voc2007, voc2012


def read(name: str, protocol: str, root: Path) -> Data:
    benchmark = find_benchmark(name)
    task = next(task for task in benchmark.tasks if task.protocol == protocol)
    return task.read(benchmark.find(root), benchmark.option_values({}))


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
def test_images_and_boxes_are_those_of_torchvision(
    tmp_path: Path, year: str, protocol: str, split: str, image_set: str
) -> None:
    (voc2007 if year == "2007" else voc2012).write(tmp_path, per_class=2)
    ours: Boxed = read(f"voc{year}", protocol, tmp_path).splits[split]
    theirs = VOCDetection(str(tmp_path), year=year, image_set=image_set)
    assert len(ours) == len(theirs) > 0
    for index in range(len(ours)):
        image, target = theirs[index]
        np.testing.assert_array_equal(np.asarray(read_rgb(ours.source, index)), np.asarray(image))
        parts = (ours.boxes, ours.labels, ours.difficult)
        found = [(*box, *rest) for box, *rest in zip(*(part[index].tolist() for part in parts))]
        np.testing.assert_allclose(found, boxes_of(target), rtol=1e-6)
        assert not ours.crowd[index].any()


def test_masks_are_those_of_torchvision_with_void_ignored(tmp_path: Path) -> None:
    voc2012.write(tmp_path, per_class=2)
    data = read("voc2012", "segmentation", tmp_path)
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
    data = read("voc2007", "multilabel", tmp_path)
    for split in ("train", "val", "test"):
        ours: MultiLabelled = data.splits[split]
        theirs = VOCDetection(str(tmp_path), year="2007", image_set=split)
        for index in range(len(ours)):
            expected = np.zeros(20, dtype=int)
            for *_, label, difficult in sorted(boxes_of(theirs[index][1]), key=lambda row: -row[-1]):
                expected[int(label)] = -1 if difficult else 1  # difficult ones first: any other wins
            assert ours.labels[index].tolist() == expected.tolist()
    assert set(np.unique(data.splits["train"].labels)) == {-1, 0, 1}


def test_the_traps_are_in_the_miniatures(tmp_path: Path) -> None:
    voc2007.write(tmp_path)
    voc2012.write(tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2007"
    text = "".join(path.read_text() for path in (folder / "Annotations").iterdir())
    assert "<part>" in text
    assert "<truncated>1</truncated>" in text
    assert "<difficult>1</difficult>" in text
    rows = (folder / "ImageSets/Main/dog_train.txt").read_text().splitlines()
    assert {row[6:] for row in rows} == {"  1", " -1", "  0"}
    assert sum(len(each) for each in read("voc2007", "discovery", tmp_path).splits["test"].boxes) == text.count(
        "<object>"
    ) - sum(len(each) for each in read("voc2007", "detection", tmp_path).splits["test"].boxes)
    listed = len((tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt").read_text().split())
    assert len(list((tmp_path / "VOCdevkit/VOC2012/JPEGImages").iterdir())) > listed
    boxes = read("voc2012", "detection", tmp_path).splits["train"].boxes
    assert any((each % 1 != 0).any() for each in boxes)


def test_discovery_does_without_the_test_archive_and_classification_names_it(tmp_path: Path) -> None:
    folder = voc2007.write(tmp_path, per_class=1) / "VOC2007"
    for path in (folder / "ImageSets/Main").glob("*test.txt"):
        path.unlink()
    assert len(read("voc2007", "discovery", tmp_path).splits["test"]) == 8
    with pytest.raises(UserError, match=r"test\.txt is missing; it comes from VOCtest_06-Nov-2007\.tar"):
        read("voc2007", "multilabel", tmp_path)


def test_missing_folders_are_named_with_their_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VOC2012.* is missing; it comes from VOCtrainval_11-May-2012\.tar"):
        read("voc2012", "discovery", tmp_path)
    folder = voc2012.write(tmp_path, per_class=1) / "VOC2012"
    (folder / "SegmentationClass").rename(folder / "Elsewhere")
    assert len(read("voc2012", "discovery", tmp_path).splits["test"]) == 8
    with pytest.raises(UserError, match="SegmentationClass is missing; it comes from VOCtrainval"):
        read("voc2012", "segmentation", tmp_path)


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("<name>aeroplane", "<name>aeroplan"), "unknown class 'aeroplan'.*aeroplane"),
        (replaced("<xmin>", "<xmin>x"), "the box 'x"),
        (replaced("<xmax>", "<xmax>-"), "not empty"),
        (replaced("<ymin>", "<ymin>nan"), "the box"),
        (replaced("<bndbox>", "<bndbax>"), "is not XML"),
        (replaced("<difficult>0", "<difficult>2"), "difficult is '2'"),
        (lambda text: text[:100], "is not XML"),
        (
            lambda text: '<!DOCTYPE a [<!ENTITY x "xxxxxxxx"><!ENTITY y "&x;&x;">]>' + text,
            "declares a document type",
        ),
        (lambda text: text + " " * (1 << 22), "more than 4 MiB"),
    ],
)
def test_a_wrong_annotation_is_said_in_one_line(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    folder = voc2007.write(tmp_path, per_class=1) / "VOC2007"
    name = (folder / "ImageSets/Main/train.txt").read_text().split()[0]
    path = folder / f"Annotations/{name}.xml"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        read("voc2007", "discovery", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.txt", lambda text: text + text.split()[0], "lists an image twice"),
        ("train.txt", lambda text: "../../secret\n" + text, "expected the name of an image without a folder"),
        ("train.txt", lambda text: "\n", "lists no images"),
        ("train.txt", lambda text: text + "999999\n", "does not list 999999, which train.txt does"),
        ("dog_train.txt", lambda text: text.replace(" -1", " 2", 1), "expected an image and 1, 0 or -1"),
        ("dog_train.txt", lambda text: text.replace(" -1", "", 1), "expected an image and 1, 0 or -1"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, name: str, change: Callable[[str], str], message: str) -> None:
    path = voc2007.write(tmp_path, per_class=1) / f"VOC2007/ImageSets/Main/{name}"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        read("voc2007", "multilabel", tmp_path)


def test_a_mask_with_an_unknown_class_or_another_size_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    folder = voc2012.write(tmp_path, per_class=1) / "VOC2012"
    split = read("voc2012", "segmentation", tmp_path).splits["train"]
    name = (folder / "ImageSets/Segmentation/train.txt").read_text().split()[0]
    path = folder / f"SegmentationClass/{name}.png"
    Image.fromarray(np.full((70, 84), 21, dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match=r"has the value 21, expected 0\.\.20 or 255"):
        split.mask(0)
    Image.fromarray(np.zeros((70, 83), dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match="83 x 70 pixels"):
        split.mask(0)


def test_shuffled_boxes_and_labels_are_not_those_of_the_pictures(tmp_path: Path) -> None:
    voc2007.write(tmp_path / "a")
    voc2007.write(tmp_path / "b", shuffled=True)
    true, shuffled = (read("voc2007", "discovery", tmp_path / name).splits["test"] for name in "ab")
    for index in range(len(true)):  # the pictures are the same
        assert true.source.read(index) == shuffled.source.read(index)
    assert np.mean([np.array_equal(a, b) for a, b in zip(true.boxes, shuffled.boxes)]) < 0.1
