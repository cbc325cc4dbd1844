"""Average precision of boxes: against literal loops over VOC's rules and against pycocotools' COCOeval."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from dinoreg.data.source import ScenesSource
from dinoreg.evaluation.backbones.encoder import PixelEncoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.data import Boxed, Data, Labelled
from dinoreg.evaluation.dense.pictures import draw_boxes, strip
from dinoreg.evaluation.dense.windows import pad_to_patches
from dinoreg.evaluation.metrics.bootstrap import nanmean
from dinoreg.evaluation.metrics.box_ap import (
    MISSING,
    Detections,
    Truth,
    areas,
    average_precision,
    coco_matches,
    overlaps,
    score,
    voc_matches,
)
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.runtime.errors import UserError
from tests.box_pictures import context

IMAGES, CLASSES, SIDE = 12, 4, 300


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Whole pixels, so that no rounding stands between the conventions."""
    corner = rng.integers(0, SIDE - 120, (count, 2))
    return np.concatenate([corner, corner + rng.integers(3, 120, (count, 2))], axis=1).astype(np.float32)


def random_case(seed: int, crowds: bool = False) -> tuple[Boxed, Detections]:
    """Objects of which a share is difficult or a crowd, and detections: jittered objects, duplicates and mistakes."""
    rng = np.random.default_rng(seed)
    boxes, labels, flags, found = [], [], [], []
    for image in range(IMAGES):
        count = 0 if image == 3 else int(rng.integers(1, 6))
        boxes.append(random_boxes(rng, count))
        labels.append(rng.integers(0, CLASSES - 1, count))  # the last class never occurs
        flags.append(rng.random(count) < 0.25)
        for box, label in zip(boxes[-1], labels[-1]):
            for _ in range(int(rng.integers(0, 4))):
                moved = box + rng.integers(-8, 9, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 2)
                found.append((image, label if rng.random() < 0.9 else rng.integers(CLASSES), moved))
        found += [(image, rng.integers(CLASSES), box) for box in random_boxes(rng, 3)]
    order = rng.permutation(len(found))
    scores = np.round(rng.random(len(found)), 2)  # with ties
    detections = Detections(
        np.array([found[i][0] for i in order]),
        np.array([found[i][2] for i in order], dtype=np.float64),
        np.array([found[i][1] for i in order], dtype=np.int64),
        scores,
    )
    none = [np.zeros(len(each), dtype=bool) for each in flags]
    source = ScenesSource(IMAGES, 8)
    difficult, crowd = (none, flags) if crowds else (flags, none)
    return Boxed(source, boxes, labels, CLASSES, difficult, crowd), detections


def kit_ap(split: Boxed, found: Detections, label: int, eleven: bool) -> float:
    """The development kit, literally: inclusive pixels from 1, areas with one pixel more, one detection at a time."""
    objects = {}
    positives = 0
    for image in range(len(split)):
        rows = split.labels[image] == label
        objects[image] = (split.boxes[image][rows] + np.array([1, 1, 0, 0]), split.difficult[image][rows])
        positives += int((~objects[image][1]).sum())
    if not positives:
        return float("nan")
    rows = [i for i in range(len(found.image)) if found.labels[i] == label]
    rows.sort(key=lambda i: (-found.scores[i], found.image[i]))
    taken = set()
    right, wrong = [], []
    for i in rows:
        x0, y0, x1, y1 = found.boxes[i] + np.array([1, 1, 0, 0])
        most, which = -1.0, -1
        boxes, difficult = objects[int(found.image[i])]
        for number, (a0, b0, a1, b1) in enumerate(boxes):
            width, height = min(x1, a1) - max(x0, a0) + 1, min(y1, b1) - max(y0, b0) + 1
            if width > 0 and height > 0:
                union = (x1 - x0 + 1) * (y1 - y0 + 1) + (a1 - a0 + 1) * (b1 - b0 + 1) - width * height
                if width * height / union > most:
                    most, which = width * height / union, number
        if most >= 0.5 and difficult[which]:
            continue
        hit = most >= 0.5 and (found.image[i], which) not in taken
        if hit:
            taken.add((found.image[i], which))
        right.append(hit)
        wrong.append(not hit)
    tp, fp = np.cumsum(right), np.cumsum(wrong)
    recall, precision = tp / positives, tp / np.maximum(tp + fp, 1)
    if eleven:
        reached = [[p for p, n in zip(precision, tp) if 10 * n >= k * positives] for k in range(11)]
        return sum(max(each) if each else 0.0 for each in reached) / 11
    area, before = 0.0, 0.0
    for place, r in enumerate(recall):
        area += (r - before) * max(precision[place:])
        before = r
    return area


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("points", ["11", "all"])
def test_voc_ap_equals_the_development_kits_loop_with_inclusive_pixels(seed: int, points: str) -> None:
    split, found = random_case(seed)
    ours = average_precision(voc_matches(found, Truth.of(split)), points)
    literal = [kit_ap(split, found, label, points == "11") for label in range(CLASSES)]
    np.testing.assert_allclose(ours[0], literal, atol=1e-12)
    assert np.nanmin(ours) < np.nanmax(ours)


def coco_eval(split: Boxed, found: Detections) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = []
    for image in range(len(split)):
        for k, (x0, y0, x1, y1) in enumerate(split.boxes[image].tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": int(split.labels[image][k]) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(areas(split.boxes[image])[k]),
                    "iscrowd": int(split.crowd[image][k]),
                }
            )
    results = [
        {
            "image_id": int(found.image[i]) + 1,
            "category_id": int(found.labels[i]) + 1,
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "score": float(found.scores[i]),
        }
        for i, (x0, y0, x1, y1) in enumerate(found.boxes)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image + 1} for image in range(len(split))],
            "annotations": annotations,
            "categories": [{"id": k + 1, "name": str(k)} for k in range(CLASSES)],
        }
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(results), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged


@pytest.mark.parametrize("seed", range(6))
def test_coco_ap_equals_pycocotools_with_crowds_and_ties(seed: int) -> None:
    split, found = random_case(seed, crowds=True)
    judged = coco_eval(split, found)
    truth = Truth.of(split)
    theirs = judged.eval["precision"][:, :, :, 0, 2].mean(axis=1)  # (T, K), -1 without objects
    ours = average_precision(coco_matches(found, truth), "101")
    np.testing.assert_allclose(np.nan_to_num(ours, nan=-1.0), theirs, atol=1e-9)
    values = {each.metric: each.value for each in score(found, truth, "coco")}
    stats = judged.stats
    assert values["AP"] == pytest.approx(stats[0], abs=1e-9)
    assert values["AP50"] == pytest.approx(stats[1], abs=1e-9)
    assert 0 < values["AP"] < values["AP50"] < 1


def test_only_the_hundred_surest_detections_of_an_image_and_class_count_for_coco() -> None:
    rng = np.random.default_rng(0)
    split, _ = random_case(1)
    many = 130
    found = Detections(
        np.zeros(many, dtype=np.int64), random_boxes(rng, many), np.zeros(many, dtype=np.int64), rng.random(many)
    )
    last = int(found.scores.argmin())
    found.boxes[last] = split.boxes[0][0]
    split.labels[0][0] = 0
    judged = coco_eval(split, found)
    ours = average_precision(coco_matches(found, Truth.of(split)), "101")
    np.testing.assert_allclose(ours[:, 0], judged.eval["precision"][:, :, 0, 0, 2].mean(axis=1), atol=1e-9)
    assert len(coco_matches(found, Truth.of(split))[0].image) == 100


@pytest.mark.parametrize("rule", ["voc2007", "voc2012", "coco"])
def test_a_weighted_figure_equals_that_of_a_set_with_images_repeated(rule: str) -> None:
    split, found = random_case(2, crowds=rule == "coco")
    rng = np.random.default_rng(9)
    # No ties, so that copies of a detection follow each other.
    found = Detections(found.image, found.boxes, found.labels, rng.permutation(len(found.image)) / 1000)
    weights = np.bincount(rng.integers(0, IMAGES, IMAGES), minlength=IMAGES)
    drawn = np.repeat(np.arange(IMAGES), weights)
    rows = [(new, row) for new, old in enumerate(drawn) for row in np.flatnonzero(found.image == old)]
    places = np.array([row for _, row in rows])
    repeated = Detections(
        np.array([new for new, _ in rows]), found.boxes[places], found.labels[places], found.scores[places]
    )
    for ours, theirs in zip(
        score(found, Truth.of(split), rule),
        score(repeated, Truth.of(split.chosen(drawn)), rule),
        strict=True,
    ):
        assert ours.resampled(weights) == pytest.approx(theirs.value, abs=1e-12)
        assert ours.resampled(np.ones(IMAGES, dtype=np.int64)) == pytest.approx(ours.value, abs=1e-12)
        assert ours.resampled(weights) != pytest.approx(ours.value, abs=1e-6)


def test_a_rule_puts_its_own_reading_of_the_curve_first() -> None:
    split, found = random_case(4)
    truth = Truth.of(split)
    kinds = {
        rule: [(each.metric, each.variant) for each in score(found, truth, rule)]
        for rule in ("voc2007", "voc2012", "coco")
    }
    assert kinds["voc2007"] == [("AP50", "11-point"), ("AP50", "all-points")] == kinds["voc2012"][::-1]
    assert kinds["coco"] == [("AP", ""), ("AP50", "")]
    per_class = score(found, truth, "voc2007", Data({}, ("cat", "dog")).names(3))[0].per_class
    assert set(per_class) == {"cat", "dog", "2"}
    assert np.mean(list(per_class.values())) == pytest.approx(score(found, truth, "voc2007")[0].value)


def test_perfect_boxes_score_one_and_difficult_objects_change_nothing() -> None:
    split, _ = random_case(5)
    truth = Truth.of(split)
    perfect = Detections(truth.image, truth.boxes, truth.labels, np.linspace(0.1, 1, len(truth.image)))
    for rule in ("voc2007", "voc2012", "coco"):
        assert score(perfect, truth, rule)[0].value == pytest.approx(1.0)
    nothing = Detections(truth.image[:0], truth.boxes[:0], truth.labels[:0], np.zeros(0))
    for rule in ("voc2007", "coco"):
        assert score(nothing, truth, rule)[0].value == 0.0


def test_of_several_detections_of_an_object_the_surest_is_right_and_a_mistake_above_it_costs() -> None:
    source = ScenesSource(1, 8)
    flags = [np.zeros(1, dtype=bool)]
    split = Boxed(source, [np.array([[0, 0, 10, 10]], np.float32)], [np.array([0])], 1, flags, flags)
    found = Detections(
        np.zeros(3, dtype=np.int64),
        np.array([[40.0, 40, 50, 50], [0, 0, 10, 9], [0, 0, 10, 10]]),
        np.zeros(3, dtype=np.int64),
        np.array([0.9, 0.8, 0.7]),
    )
    (matches,) = voc_matches(found, Truth.of(split))
    assert [ranking.present.tolist() for ranking in matches.rankings] == [[False, True, False]]
    assert average_precision([matches], "all")[0, 0] == pytest.approx(0.5)
    # COCO at 0.95 has only the third fit.
    coco = coco_matches(found, Truth.of(split))[0]
    assert coco.rankings[0].present.tolist() == [False, True, False]
    assert coco.rankings[-1].present.tolist() == [False, False, True]


def test_overlaps_equal_torchvisions_and_the_rule_for_crowds_divides_by_the_detection() -> None:
    rng = np.random.default_rng(3)
    a, b = random_boxes(rng, 7), random_boxes(rng, 5)
    np.testing.assert_allclose(overlaps(a, b), box_iou(torch.tensor(a), torch.tensor(b)).numpy(), atol=1e-6)
    inner, region = np.array([[10, 10, 20, 20]]), np.array([[0, 0, 100, 100], [0, 0, 100, 100]])
    assert overlaps(inner, region, np.array([False, True])).tolist() == [[0.01, 1.0]]
    assert overlaps(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def test_padding_is_what_the_encoders_normalisation_turns_into_zeros() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    image = pad_to_patches(pixels, 4, (0.485, 0.456, 0.406))
    assert image.shape == (3, 8, 12)
    np.testing.assert_array_equal((image[:, :5, :9] * 255).round().permute(1, 2, 0).numpy(), pixels)
    assert image[:, 5:].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert torch.equal(image[:, :, 9:], image[:, 5:6, :1].expand(3, 8, 3))


def test_pictures_show_boxes_where_they_are() -> None:
    from PIL import Image

    drawn = draw_boxes(Image.new("RGB", (580, 200)), np.array([[100, 40, 300, 180]]), (255, 0, 0))
    assert drawn.size == (290, 100)  # halved
    red = np.argwhere(np.asarray(drawn)[..., 0] > 200)
    assert red.min(axis=0).tolist() == [20, 50]
    assert red.max(axis=0).tolist() == [89, 149]
    assert strip([drawn] * 3, ("a", "b", "c")).width <= 900


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [np.array([[5, 5, 2, 9]], np.float32)]}, "ends before it starts"),
        ({"boxes": [np.array([[5, np.nan, 7, 9]], np.float32)]}, "not finite"),
        ({"boxes": [np.zeros((2, 4), np.float32)]}, "came with 1 labels"),
        ({"labels": [np.array([2])]}, r"out of range, expected 0\.\.1"),
        ({"crowd": []}, "1 images came with crowd of 0"),
    ],
)
def test_boxes_that_cannot_be_are_named(change: dict, message: str) -> None:
    parts = {
        "boxes": [np.array([[0, 0, 4, 4]], np.float32)],
        "labels": [np.array([1])],
        "difficult": [np.array([False])],
        "crowd": [np.array([False])],
    }
    parts |= change
    with pytest.raises(UserError, match=message):
        Boxed(ScenesSource(1, 8), num_classes=2, **parts)


def test_a_split_without_boxes_is_named(tmp_path: Path) -> None:
    data = Data({"test": Labelled(ScenesSource(2, 8), np.array([0, 1]), 2)})
    task = Task("detection", lambda folder, options: data, "AP50")
    measured = Measurement(PixelEncoder(8, (8, 8)), data, task, EvalOptions(), context(tmp_path))
    with pytest.raises(UserError, match="the train split is missing"):
        measured.split("train", Boxed, MISSING)
    with pytest.raises(UserError, match="images have no boxes"):
        measured.split("test", Boxed, MISSING)


def test_the_mean_over_no_class_is_nan() -> None:
    assert nanmean(np.array([np.nan, 0.5, 1.0])) == 0.75
    assert np.isnan(nanmean(np.array([np.nan])))


def test_thousands_of_images_are_scored_and_resampled_in_seconds() -> None:
    import time

    rng = np.random.default_rng(0)
    images, per_image = 400, 40
    counts = defaultdict(list)
    for _ in range(images):
        count = int(rng.integers(0, 12))
        counts["boxes"].append(random_boxes(rng, count))
        counts["labels"].append(rng.integers(0, 20, count))
        counts["flags"].append(rng.random(count) < 0.05)
    split = Boxed(ScenesSource(images, 8), counts["boxes"], counts["labels"], 20, counts["flags"], counts["flags"])
    found = Detections(
        np.arange(images).repeat(per_image),
        random_boxes(rng, images * per_image),
        rng.integers(0, 20, images * per_image),
        rng.random(images * per_image),
    )
    started = time.process_time()
    figure = score(found, Truth.of(split), "coco")[0]
    for _ in range(5):
        figure.resampled(rng.integers(0, 3, images))
    assert time.process_time() - started < 10
