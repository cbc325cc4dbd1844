"""P8, detection by a linear probe of single patches: what a box head reads off frozen tokens without a detector.

Last block's patch tokens after the final norm, BatchNorm and one linear map (`box_head`), trained with flips; scored as
VOC or COCO score detectors (`box_scores`). The protocol is ours: no purely linear one is published (reference
datasets, P8), so every row says that published detectors are no measure for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Boxed, Data
from dinoreg.evaluation.dense.box_head import IGNORED, LinearBoxHead, Targets, assign, box_loss, centres, detect
from dinoreg.evaluation.features.images import parallel, read_rgb
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.metrics.box_ap import Detections, Truth
from dinoreg.evaluation.metrics.box_scores import RULES, Figure, Scores, score, whole_images
from dinoreg.evaluation.metrics.boxes import PREDICTION, TRUTH, areas, boxed, draw_boxes, padded, side_by_side
from dinoreg.evaluation.options import DetectionOptions, EvalOptions
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import cosine, generator, train_heads
from dinoreg.runtime.errors import RunError, UserError

PROTOCOL = "linear patch detection"
NOTE = "linear patch probe, not comparable with published detectors"
BOOTSTRAP = 300  # draws of the test images
HELD_OUT = 1000  # training images at most, a tenth at most, on which one of several rates is chosen
SHOWN_SCORE = 0.3  # of boxes in pictures


class Prepared(NamedTuple):
    """An image as the backbone takes it.

    place    of the image in the split that is gone through
    image    (3, H, W) float32 in [0, 1], padded to whole patches
    size     (height, width) after resizing and before padding
    scale    resized over original pixels, along x and along y
    targets  of its patches, where it is learnt from
    """

    place: int
    image: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]
    targets: Targets | None = None


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """AP50 by VOC's rules with 11 and with all points, or COCO's AP and AP50; the task's metric first.

    data  splits "train" and "test" of boxes, "val" where official; extra["rule"] is a key of `box_scores.RULES`, by
          default "coco" for the metric AP and "voc2007" for AP50
    """
    chosen, started = options.detection, time.monotonic()
    rule = str(data.extra.get("rule", "coco" if task.metric == "AP" else "voc2007"))
    if rule not in RULES or task.metric not in RULES[rule]:
        raise UserError(f"metric {task.metric!r} with rule {rule!r}: detection has AP50 of VOC, AP and AP50 of COCO")
    train, test = boxed(data, "train"), boxed(data, "test")
    learnt, held, choice = _held_out(train, data, chosen, context.seed)
    heads, losses = _train(encoder, train, learnt, chosen, context)
    everything = np.arange(len(test))
    truth = Truth.of(test, everything)
    if truth.ignored.all():
        raise UserError("the test split has no boxes that count, so there is no average precision")
    best = next(iter(heads))
    if len(heads) > 1 and held is not None:
        split, indices = held
        tried, _ = predict(encoder, heads, split, indices, chosen, context, "boxes of the held-out images")
        reference = Truth.of(split, indices)
        values = {key: score(each, reference, rule, data.class_names).of(task.metric) for key, each in tried.items()}
        best = max(values, key=lambda key: values[key] if math.isfinite(values[key]) else -1.0)
    found, sizes = predict(encoder, heads, test, everything, chosen, context, "boxes of the test images")
    scores = {key: score(each, truth, rule, data.class_names) for key, each in found.items()}
    often = np.bincount(np.concatenate([train.labels[index] for index in learnt]), minlength=train.num_classes)
    trivial = score(whole_images(sizes, often), truth, rule, data.class_names)
    if context.examples is not None:
        _draw(test, found[best], data.class_names, context)
    rates = {repr(rate): f"lr {rate:g}" for rate in chosen.lrs}
    common: dict[str, Any] = {
        "chosen_on": choice,
        "seeds": (context.seed,),
        "n_train": len(learnt),
        "n_test": len(test),
        "hours": (time.monotonic() - started) / 3600,
        "settings": {**asdict(chosen), "lr": float(best), "rule": rule},
        "note": NOTE,
    }
    return [
        _row(figure, place, scores, best, trivial, rates, losses, data.variant, common, context.seed)
        for place, figure in sorted(enumerate(scores[best].figures), key=lambda pair: pair[1].metric != task.metric)
    ]


def _row(
    figure: Figure,
    place: int,
    scores: Mapping[str, Scores],
    best: str,
    trivial: Scores,
    rates: Mapping[str, str],
    losses: Mapping[str, float],
    variant: str,
    common: dict[str, Any],
    seed: int,
) -> Row:
    low, high = bootstrap_statistic(common["n_test"], figure.resampled, samples=BOOTSTRAP, seed=seed)
    details: dict[str, Any] = {"whole-image boxes": trivial.figures[place].value, **scores[best].details}
    details["per class"] = figure.per_class
    if len(rates) > 1:
        details["by rate"] = {
            name: scores[key].figures[place].value if key in scores else "diverged" for key, name in rates.items()
        }
    details["training loss"] = losses[best]
    name = ", ".join(filter(None, (figure.variant, variant)))
    return Row(PROTOCOL, figure.metric, figure.value, low, high, variant=name, details=details, **common)


def fit(width: int, height: int, size: int, max_size: int) -> tuple[int, int]:
    """(width, height) of an image whose short side is to be `size`, unless its long side would exceed `max_size`."""
    scale = min(size / min(width, height), max_size / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def prepare(
    split: Boxed, index: int, place: int, encoder: Encoder, chosen: DetectionOptions, flip: bool | None = None
) -> Prepared:
    """An image of a split, resized and padded; with targets where `flip` says whether it is mirrored."""
    picture = read_rgb(split.source, index)
    width, height = fit(*picture.size, chosen.size, chosen.max_size)
    scale = (width / picture.width, height / picture.height)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    image = padded(pixels[:, ::-1] if flip else pixels, encoder.patch_size, encoder.mean)
    found = Prepared(place, image, (height, width), scale)
    if flip is None:
        return found
    boxes = np.asarray(split.boxes[index], dtype=np.float32).reshape(-1, 4) * np.array([*scale, *scale], np.float32)
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    aside = np.asarray(split.difficult[index], dtype=bool) | np.asarray(split.crowd[index], dtype=bool)
    grid = encoder.grid(image.shape[1], image.shape[2])
    return found._replace(targets=assign(grid, encoder.patch_size, height, width, boxes, split.labels[index], aside))


def alike(images: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Batches of equal shape, so that no image is padded for its neighbours' sake, which its tokens would show.

    Holds four batches at most; the order changes.
    """
    waiting: dict[tuple[int, ...], list[Prepared]] = {}
    held = 0
    for each in images:
        shape = tuple(each.image.shape)
        waiting.setdefault(shape, []).append(each)
        held += 1
        full = len(waiting[shape]) == batch_size
        if full or held >= 4 * batch_size:
            batch = waiting.pop(shape if full else max(waiting, key=lambda key: len(waiting[key])))
            held -= len(batch)
            yield batch
    yield from waiting.values()


def patch_tokens(encoder: Encoder, batch: Sequence[Prepared], split: Boxed, indices: Sequence[int]) -> Tensor:
    """(b, N, D) float32 tokens of images of equal shape; RunError naming one whose tokens are not finite."""
    found = encoder.tokens(torch.stack([each.image for each in batch])).patches
    bad = (~torch.isfinite(found).flatten(1).all(dim=1)).nonzero()
    if len(bad):
        index = indices[batch[int(bad[0])].place]
        raise RunError(f"{split.source.name(int(index))}: its feature is not finite ({encoder.name})")
    return found


@torch.no_grad()
def predict(
    encoder: Encoder,
    heads: Mapping[str, LinearBoxHead],
    split: Boxed,
    indices: np.ndarray,
    chosen: DetectionOptions,
    context: Context,
    what: str,
) -> tuple[dict[str, Detections], np.ndarray]:
    """Every head's boxes on some images, which are numbered from 0; and the images' height and width (n, 2)."""
    sizes = np.zeros((len(indices), 2), dtype=np.int64)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {key: [_nothing()] * len(indices) for key in heads}
    images = parallel(
        lambda place: prepare(split, int(indices[place]), place, encoder, chosen), range(len(indices)), context.workers
    )
    shown = context.progress(images, len(indices), f"{what} ({encoder.name})")
    for batch in alike(shown, min(context.batch_size, chosen.batch_size)):
        tokens = patch_tokens(encoder, batch, split, indices.tolist())
        points = centres(encoder.grid(*batch[0].image.shape[1:]), encoder.patch_size)
        for each, patches in zip(batch, tokens, strict=True):
            height, width = each.size
            sizes[each.place] = round(height / each.scale[1]), round(width / each.scale[0])
            within = (points[:, 0] < width) & (points[:, 1] < height)
            for key, head in heads.items():
                answers = head(patches[within.to(patches.device)])
                found[key][each.place] = detect(
                    answers, points[within], encoder.patch_size, each.size, each.scale, chosen.nms, chosen.max_boxes
                )
    return {key: _joined(each) for key, each in found.items()}, sizes


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def _joined(found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Detections:
    boxes, labels, scores = (torch.cat([each[part] for each in found]).numpy() for part in range(3))
    image = np.repeat(np.arange(len(found)), [len(each[1]) for each in found])
    return Detections(image, boxes, labels, scores)


def _held_out(
    train: Boxed, data: Data, chosen: DetectionOptions, seed: int
) -> tuple[np.ndarray, tuple[Boxed, np.ndarray] | None, str]:
    """(training images to learn from, what rates are chosen on, that in words); one rate needs no choice."""
    everything = np.arange(len(train))
    if len(chosen.lrs) == 1:
        return everything, None, ""
    if "val" in data.splits:
        val = boxed(data, "val")
        return everything, (val, np.arange(len(val))), "the official validation split"
    if len(train) < 2:
        raise UserError("detection.lrs: to choose one of several rates, at least 2 training images are expected")
    count = min(max(len(train) // 10, 1), HELD_OUT)
    mixed = np.random.default_rng([seed, 8]).permutation(len(train))
    words = f"{count:,} held-out training images, seed {seed}"
    return np.sort(mixed[count:]), (train, np.sort(mixed[:count])), words


def _train(
    encoder: Encoder, train: Boxed, indices: np.ndarray, chosen: DetectionOptions, context: Context
) -> tuple[dict[str, LinearBoxHead], dict[str, float]]:
    """The heads {rate: head} that did not diverge, with their last training loss; all start from the same weights."""
    count, images = chosen.batch_size, len(indices)

    @lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return generator(context.seed, epoch, stream=1).permutation(images)

    def load(position: int) -> Prepared:
        place = int(order(position // images)[position % images])
        flip = bool(generator(context.seed, position, stream=2).random() < 0.5)
        return prepare(train, int(indices[place]), place, encoder, chosen, flip)

    first = list(parallel(load, range(min(count, images)), context.workers))
    dim = patch_tokens(encoder, first[:1], train, indices.tolist()).shape[2]
    start = typical_reach(each.targets for each in first if each.targets is not None)
    heads = {
        repr(rate): LinearBoxHead(dim, train.num_classes, start, context.seed).to(encoder.device) for rate in chosen.lrs
    }
    optimizers: dict[str, torch.optim.Optimizer] = {
        key: torch.optim.AdamW(head.parameters(), lr=float(key), weight_decay=chosen.weight_decay)
        for key, head in heads.items()
    }
    ahead: Iterator[Prepared] | None = None

    def losses(step: int) -> dict[str, Tensor]:
        nonlocal ahead
        if ahead is None:  # from the step on at which a training that was stopped goes on
            ahead = parallel(load, range(step * count, chosen.steps * count), context.workers)
        tokens, labels, reach = [], [], []
        for batch in alike((next(ahead) for _ in range(count)), count):
            found = patch_tokens(encoder, batch, train, indices.tolist())
            for each, patches in zip(batch, found, strict=True):
                assert each.targets is not None
                known = each.targets.labels != IGNORED
                tokens.append(patches[known.to(patches.device)])
                labels.append(each.targets.labels[known])
                reach.append(each.targets.reach[known])
        x = torch.cat(tokens)
        targets = Targets(torch.cat(labels).to(x.device), torch.cat(reach).to(x.device))
        if len(x) < 2:  # BatchNorm cannot tell a spread from a single patch, and there is nothing to learn
            return {key: head.linear.weight.sum() * 0.0 for key, head in heads.items()}
        return {key: box_loss(head(x), targets) for key, head in heads.items()}

    warmup = min(chosen.warmup_steps, chosen.steps // 10)
    ends = train_heads(
        heads, optimizers, losses, chosen.steps, lambda step: cosine(step, chosen.steps, warmup), context, "detection"
    )
    healthy = {key: value for key, value in ends.items() if math.isfinite(value)}
    return {key: heads[key] for key in healthy}, healthy


def typical_reach(targets: Iterable[Targets]) -> float:
    """Patches from one in an object to the sides of its box, on average: where training starts. At least half one."""
    reach = torch.cat([each.reach[each.labels >= 0] for each in targets])
    return max(float(reach.mean()), 0.5) if len(reach) else 3.0


def _draw(test: Boxed, found: Detections, names: Sequence[str], context: Context) -> None:
    """Pictures of a few images with the surest boxes beside the true ones."""
    assert context.examples is not None
    context.examples.mkdir(parents=True, exist_ok=True)
    picked = np.unique(np.linspace(0, len(test) - 1, min(context.num_examples, len(test))).astype(np.int64))

    def name(label: int) -> str:
        return str(names[label]) if label < len(names) else str(label)

    for number, index in enumerate(picked.tolist()):
        image = read_rgb(test.source, index)
        rows = np.flatnonzero(found.image == index)
        sure = rows[: max(int((found.scores[rows] >= SHOWN_SCORE).sum()), 3)][:20]
        said = [f"{name(int(found.labels[row]))} {found.scores[row]:.2f}" for row in sure]
        true = np.argsort(-areas(test.boxes[index]), kind="stable")
        panels = (
            draw_boxes(image, np.zeros((0, 4)), PREDICTION),
            draw_boxes(image, found.boxes[sure], PREDICTION, said),
            draw_boxes(image, test.boxes[index][true], TRUTH, [name(int(test.labels[index][row])) for row in true]),
        )
        side_by_side(panels, ("image", "found", "truth")).save(context.examples / f"detection_{number:02d}.png")
