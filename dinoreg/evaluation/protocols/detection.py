"""Detection by a linear probe of single patches: what a box head reads off frozen tokens without a detector.

Last block's patch tokens after the final norm, BatchNorm and one linear map (`box_head`), trained with flips; scored as
VOC or COCO score detectors (`box_ap`). The protocol is ours: no purely linear one is published, so every row says
that published detectors are no measure for it.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.dense.box_probe import BoxProbe
from dinoreg.evaluation.dense.pictures import PREDICTION, TRUTH, draw_boxes, strip
from dinoreg.evaluation.features.images import read_picture, shown
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.metrics.box_ap import RULES, Detections, Truth, score, whole_images
from dinoreg.evaluation.metrics.boxes import MISSING, areas, check_boxes
from dinoreg.evaluation.options import DetectionOptions
from dinoreg.evaluation.protocols.measurement import OFFICIAL, Measurement, choose_best
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import UserError

NOTE = "linear patch probe, not comparable with published detectors"
BOOTSTRAP = 300  # draws of the test images
HELD_OUT = 1000  # training images at most, a tenth at most, on which one of several rates is chosen
SHOWN_SCORE = 0.3  # of boxes in pictures


def evaluate(measured: Measurement) -> list[Row]:
    """AP50 by VOC's rules with 11 and with all points, or COCO's AP and AP50, in [0, 1]; the task's metric first.

    data    splits "train" and "test" of boxes, "val" where official; extra["rule"] is a key of `box_ap.RULES`, by
            default "coco" for the metric AP and "voc2007" for AP50
    raises  UserError for a metric that the rule does not have, missing splits, boxes out of shape or range, and a test
            split without boxes that count; RunError where every head diverges or a token is not finite
    """
    settings, metric, context = measured.options.detection, measured.task.metric, measured.context
    rule = str(measured.data.extra.get("rule", "coco" if metric == "AP" else "voc2007"))
    if metric not in RULES.get(rule, ()):
        raise UserError(f"metric {metric!r} with rule {rule!r}: detection has AP50 of VOC, AP and AP50 of COCO")
    train, test, val = measured.splits(Boxed, MISSING)
    check_boxes(train, "train")
    check_boxes(test, "test")
    names = measured.data.names(test.num_classes)
    all_test = np.arange(len(test))
    truth = Truth.of(test, all_test)
    if truth.ignored.all():
        raise UserError("the test split has no boxes that count, so there is no average precision")
    indices, validation, words = _held_out(train, val, settings, context.seed)
    probe = BoxProbe(measured.encoder, settings, context)
    heads, losses = probe.train(train, indices)

    tried = None
    if len(heads) > 1 and validation is not None:
        detections, _ = probe.predict(heads, *validation, "boxes of the held-out images")
        reference = Truth.of(*validation)
        tried = {key: score(each, reference, rule, names).of(metric) for key, each in detections.items()}
    detections, sizes = probe.predict(heads, test, all_test, "boxes of the test images")
    scores = {key: score(each, truth, rule, names) for key, each in detections.items()}
    best, _ = choose_best({key: each.of(metric) for key, each in scores.items()}, tried)
    often = np.bincount(np.concatenate([train.labels[index] for index in indices]), minlength=train.num_classes)
    trivial = score(whole_images(sizes, often), truth, rule, names)
    _draw(measured, test, detections[best], names)
    rows = []
    for place, figure in enumerate(scores[best].figures):
        details: dict[str, Any] = {"whole-image boxes": trivial.figures[place].value, **scores[best].details}
        details["per class"] = figure.per_class
        if len(settings.lrs) > 1:
            values = {key: each.figures[place].value for key, each in scores.items()}
            details["by rate"] = {f"lr {rate:g}": values.get(repr(rate), "diverged") for rate in settings.lrs}
        details["training loss"] = losses[best]
        row = measured.row(
            figure.value,
            bootstrap_statistic(len(test), figure.resampled, samples=BOOTSTRAP, seed=context.seed),
            metric=figure.metric,
            variant=figure.variant,
            chosen_on=words,  # also where all other rates diverged: the held-out images were not learned from
            n_train=len(indices),
            n_test=len(test),
            settings={**asdict(settings), "lr": float(best), "rule": rule},
            details=details,
            note=NOTE,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: row.metric != metric)


def _held_out(
    train: Boxed, val: Boxed | None, settings: DetectionOptions, seed: int
) -> tuple[np.ndarray, tuple[Boxed, np.ndarray] | None, str]:
    """(training images to learn from, images that rates are chosen on, those in words); one rate needs no choice."""
    everything = np.arange(len(train))
    if len(settings.lrs) == 1:
        return everything, None, ""
    if val is not None:
        check_boxes(val, "val")
        return everything, (val, np.arange(len(val))), OFFICIAL
    if len(train) < 2:
        raise UserError("detection.lrs: to choose one of several rates, at least 2 training images are expected")
    count = min(max(len(train) // 10, 1), HELD_OUT)
    mixed = np.random.default_rng([seed, 8]).permutation(len(train))
    words = f"{count:,} held-out training images, seed {seed}"
    return np.sort(mixed[count:]), (train, np.sort(mixed[:count])), words


def _draw(measured: Measurement, test: Boxed, found: Detections, names: list[str]) -> None:
    """Pictures of a few images with the surest boxes beside the true ones."""
    for number, index in enumerate(measured.context.example_indices(len(test))):
        image = shown(read_picture(test.source, index))
        rows = np.flatnonzero(found.image == index)
        sure = rows[: max(int((found.scores[rows] >= SHOWN_SCORE).sum()), 3)][:20]
        captions = [f"{names[found.labels[row]]} {found.scores[row]:.2f}" for row in sure]
        true = np.argsort(-areas(test.boxes[index]), kind="stable")
        labels = [names[label] for label in np.asarray(test.labels[index])[true]]
        panels = (
            draw_boxes(image, np.zeros((0, 4)), PREDICTION),
            draw_boxes(image, found.boxes[sure], PREDICTION, captions),
            draw_boxes(image, test.boxes[index][true], TRUTH, labels),
        )
        measured.context.save_example(strip(panels, ("image", "found", "truth")), "detection", number)
