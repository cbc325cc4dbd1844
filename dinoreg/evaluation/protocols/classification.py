"""What the protocols of classification share: splits and metrics, features, rows of accuracy, pictures of mistakes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.features.images import CentreCrop, read_rgb
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, bootstrap_statistic, mean_per_class_accuracy, top1
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Row

PICTURE_SIZE = 224  # pixels of an example
GREEN, RED, GROUND = (21, 127, 91), (179, 50, 43), (24, 27, 33)  # of pictures' edges and what is around them
METRICS = {"top-1": top1, "mean per class": mean_per_class_accuracy}
MISSING = "the {name} split is missing, or its images do not have one class each"


class Classification(Measurement[Labelled]):
    """A measurement of images with one class each, by top-1 or the mean accuracy per class."""

    def __init__(self, data: Data, task: Task, context: Context, subject: str = "classification") -> None:
        super().__init__(data, task, context, Labelled, MISSING, subject, list(METRICS))

    def accuracy_rows(self, predicted: np.ndarray, **fields: Any) -> list[Row]:
        """Top-1 and mean per class of the test images' predicted classes (n,), the task's metric first."""
        order = sorted(METRICS, key=lambda metric: metric != self.task.metric)
        return [self.accuracy_row(predicted, metric=metric, **fields) for metric in order]

    def accuracy_row(self, predicted: np.ndarray, metric: str | None = None, **fields: Any) -> Row:
        """One of the metrics with its interval, by default the task's; both stand in the details. `fields` of Row."""
        test, metric = self.split("test"), metric or self.task.metric
        values = {name: function(predicted, test.labels) for name, function in METRICS.items()}
        shared: dict[str, Any] = {
            "n_train": len(self.split("train")),
            "n_test": len(test),
            "chance": 1.0 / test.num_classes,
            "details": {"micro and macro": values},
        }
        correct = predicted == test.labels
        interval = bootstrap_interval(correct) if metric == "top-1" else _per_class_interval(correct, test.labels)
        return self.row(values[metric], interval, metric=metric, **(shared | fields))


def class_tokens(encoder: Encoder, source: Source, context: Context, what: str, token: str = "cls") -> Tensor:
    """Frozen features of the centre crops of a source, (n, D), or (n, 2 D) for "cls+mean", on the CPU."""
    crop = CentreCrop(context.image_size, context.image_size)
    found = context.features.extract(encoder, source, crop, mean_patch=token == "cls+mean", what=f"features of {what}")
    return found.tensor(range(len(found.slots)))


def _per_class_interval(correct: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    if correct.all() or not correct.any():
        return bootstrap_interval(correct)
    _, classes = np.unique(labels, return_inverse=True)

    def mean_per_class(weights: np.ndarray) -> float:
        counts = np.bincount(classes, weights=weights)
        right = np.bincount(classes, weights=weights * correct)
        return float((right[counts > 0] / counts[counts > 0]).mean())

    return bootstrap_statistic(len(labels), mean_per_class)


def draw_mistakes(test: Labelled, predicted: np.ndarray, names: Sequence[str], context: Context, prefix: str) -> None:
    """Pictures of a few test images with their predicted class (n,); half of them mistakes, where there are any."""

    def name(label: int) -> str:
        return str(names[label]) if label < len(names) else str(label)

    def lines(index: int) -> list[str]:
        said, true = name(int(predicted[index])), name(int(test.labels[index]))
        return [said] if said == true else [f"said {said}", f"is {true}"]

    draw_predictions(test.source, predicted != test.labels, lines, context, prefix)


def draw_predictions(
    source: Source, wrong: np.ndarray, lines: Callable[[int], list[str]], context: Context, prefix: str
) -> None:
    """Pictures of a few images, with lines of text below and a red edge where `wrong` (n,) bool, else a green one."""
    if context.examples is None:
        return
    order = np.random.default_rng(context.seed).permutation(len(wrong))
    mistakes, right = order[wrong[order]], order[~wrong[order]]
    at_most = max(context.num_examples // 2, context.num_examples - len(right))
    picked = [*mistakes[:at_most], *right][: context.num_examples]
    for number, index in enumerate(int(each) for each in picked):
        picture = _captioned(read_rgb(source, index), lines(index), GREEN if not wrong[index] else RED)
        context.save_example(picture, prefix, number)


def _captioned(image: Image.Image, lines: list[str], edge: tuple[int, int, int]) -> Image.Image:
    picture = Image.fromarray(CentreCrop(PICTURE_SIZE, PICTURE_SIZE)(image))
    canvas = Image.new("RGB", (PICTURE_SIZE + 8, PICTURE_SIZE + 8 + 14 * len(lines)), GROUND)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, PICTURE_SIZE + 7, PICTURE_SIZE + 7), fill=edge)
    canvas.paste(picture, (4, 4))
    for number, line in enumerate(lines):
        draw.text((6, PICTURE_SIZE + 7 + 14 * number), line[:38], fill=(228, 232, 239))
    return canvas
