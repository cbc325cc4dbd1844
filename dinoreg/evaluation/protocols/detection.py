"""Detection by a linear probe of single patches: what a box head reads off frozen tokens without a detector.

Last block's patch tokens after the final norm, BatchNorm and one linear map to classes, a box and a centre-ness,
trained with flips; scored as VOC or COCO score detectors (`box_ap`). The protocol is ours: no purely linear one is
published, so every row says that published detectors are no measure for it. The head is FCOS (Tian et al., arXiv
1904.01355) without its towers and pyramid: a patch is assigned the box that its centre lies in, the smallest where
there are several.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.dense.pictures import PREDICTION, TRUTH, draw_boxes, strip
from dinoreg.evaluation.dense.windows import batches_of_one_shape, fit_size, pad_to_patches, training_batches
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.features.images import read_picture, resized, shown, size_of, to_array
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.metrics.box_ap import MISSING, RULES, Detections, Figure, Truth, areas, score
from dinoreg.evaluation.options import DetectionOptions
from dinoreg.evaluation.protocols.measurement import OFFICIAL, Measurement, choose_best
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import train_heads
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel

BACKGROUND, IGNORED = -1, -2  # labels of patches without a class: negatives of the loss; left out of it
PRIOR = 0.01  # probability of every class at the start, so that the many background patches do not swamp the rest
CANDIDATES = 1000  # pairs of patch and class of an image that enter the suppression
NOTE = "linear patch probe, not comparable with published detectors"
BOOTSTRAP = 300  # draws of the test images
HELD_OUT = 1000  # training images at most, a tenth at most, on which one of several rates is chosen
SHOWN_SCORE = 0.3  # of boxes in pictures


class Answers(NamedTuple):
    """The head's outputs for M patches, float32."""

    logits: Tensor  # (M, C) of the classes, each on its own
    reach: Tensor  # (M, 4) left, top, right, bottom from the patch's centre to the box's sides, in patches, positive
    centredness: Tensor  # (M,) logit of how central the patch is in its box


class Targets(NamedTuple):
    """The training targets of M patches."""

    labels: Tensor  # (M,) int64: a class, BACKGROUND or IGNORED
    reach: Tensor  # (M, 4) float32 as in `Answers`; zeros without a class


class LinearBoxHead(nn.Module):
    """BatchNorm1d(dim) and Linear(dim, C + 5). Weights are drawn from `seed`.

    dim    D, width of the patch tokens
    reach  initial distance from a patch's centre to each side of its box, in patches
    """

    def __init__(self, dim: int, num_classes: int, reach: float = 3.0, seed: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes + 5)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[:num_classes] = -math.log((1 - PRIOR) / PRIOR)
            self.linear.bias[num_classes : num_classes + 4] = math.log(math.expm1(reach))

    def forward(self, tokens: Tensor) -> Answers:
        """Patch tokens (M, D) float32, of any number of images one after the other -> Answers for each."""
        x = self.linear(self.norm(tokens))
        logits, reach, centredness = x.split([self.num_classes, 4, 1], dim=1)
        return Answers(logits, F.softplus(reach), centredness[:, 0])


def centres(grid: tuple[int, int], patch_size: int) -> Tensor:
    """(N, 2) float32 x and y of the patches' centres, in pixels of the padded image, row by row.

    grid        rows and columns of patches
    patch_size  pixels
    """
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return (torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5) * patch_size


def assign(
    points: Tensor, patch_size: int, size: tuple[int, int], boxes: np.ndarray, labels: np.ndarray, ignored: np.ndarray
) -> Targets:
    """The targets of an image's patches, by FCOS §3.1: which box each is assigned to, if any.

    points   (N, 2) float32 x and y of the patches' centres, in pixels
    size     (height, width) of the image before padding; a patch whose centre is in the padding is ignored
    boxes    (k, 4) x0, y0, x1, y1 in pixels; those that are empty are left out
    labels   (k,) int64 classes
    ignored  (k,) bool: difficult objects and crowds: no patch is assigned to them, but one inside is no background
    returns  Targets of N patches, distances in patches
    """
    outside = (points[:, 0] >= size[1]) | (points[:, 1] >= size[0])
    targets = Targets(torch.full((len(points),), BACKGROUND), torch.zeros(len(points), 4))
    corners = torch.from_numpy(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    if len(corners):
        # (N, k, 4): from the centre to the left, the top, the right and the bottom.
        reach = torch.cat([points[:, None] - corners[None, :, :2], corners[None, :, 2:] - points[:, None]], dim=2)
        inside = reach.min(dim=2).values > 0
        uncounted = torch.from_numpy(np.asarray(ignored, dtype=bool))
        targets.labels[(inside & uncounted).any(dim=1)] = IGNORED
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        smallest = torch.where(inside & ~uncounted, area, torch.inf).min(dim=1)
        owner = torch.isfinite(smallest.values)
        index = smallest.indices[owner]
        targets.labels[owner] = torch.from_numpy(np.asarray(labels, dtype=np.int64))[index]
        targets.reach[owner] = reach[owner, index] / patch_size
    targets.labels[outside] = IGNORED
    targets.reach[outside] = 0.0
    return targets


def centre_ness(reach: Tensor) -> Tensor:
    """FCOS eq. 3: 1 in the middle of the box, 0 on its edge.

    reach    (M, 4) distances to left, top, right and bottom, positive, in any unit
    returns  (M,) in [0, 1]
    """
    across, along = reach[:, [0, 2]], reach[:, [1, 3]]
    share = (across.amin(1) / across.amax(1)) * (along.amin(1) / along.amax(1))
    return share.clamp(0, 1).sqrt()


def around(points: Tensor | float, reach: Tensor) -> Tensor:
    """Boxes x0, y0, x1, y1 around points.

    points   (M, 2) x and y, or one number for both
    reach    (M, 4) distances to left, top, right and bottom, in the unit of `points`
    returns  (M, 4)
    """
    return torch.cat([points - reach[:, :2], points + reach[:, 2:]], dim=1)


def box_loss(answers: Answers, targets: Targets) -> Tensor:
    """FCOS's loss: focal loss over the patches; GIoU weighted by centre-ness, and centre-ness, over those in objects.

    Focal loss (arXiv 1708.02002) with alpha 0.25 and gamma 2; GIoU: arXiv 1902.09630. Patches with the label IGNORED
    must have been left out. Focal loss and centre-ness are divided by the number of patches in objects, GIoU by the sum
    of their centre-ness.

    answers, targets  of M patches
    returns           () float32; the focal part alone where no patch is in an object
    """
    with torch.autocast(answers.logits.device.type, enabled=False):
        positive = targets.labels >= 0
        count = positive.sum().clamp(min=1)
        one_hot = torch.zeros_like(answers.logits)
        one_hot[positive, targets.labels[positive]] = 1.0
        loss = sigmoid_focal_loss(answers.logits, one_hot, reduction="sum") / count
        if not bool(positive.any()):
            return loss
        reach = targets.reach[positive]
        central = centre_ness(reach)
        apart = generalized_box_iou_loss(around(0.0, answers.reach[positive]), around(0.0, reach))
        loss = loss + (apart * central).sum() / central.sum().clamp(min=1e-6)
        return loss + F.binary_cross_entropy_with_logits(answers.centredness[positive], central)


class Prepared(NamedTuple):
    """An image as the backbone takes it.

    number   of the image in its split
    image    (C, H, W) float32 in [0, 1], padded to whole patches
    size     (height, width) in pixels after resizing and before padding
    scale    resized over original pixels, along x and along y
    targets  of its patches; None outside training
    """

    number: int
    image: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]
    targets: Targets | None = None


def detect(
    answers: Answers, points: Tensor, patch_size: int, seen: Prepared, settings: DetectionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes of an image as it was seen, in its original pixels, highest score first.

    answers  of M patches
    points   (M, 2) centres of these patches, in pixels of the resized image
    returns  boxes (k, 4) float32, labels (k,) int64, scores (k,) float32 in [0, 1], on the CPU; at most
             `settings.max_boxes`, none of which overlaps a surer one of its class by more than `settings.nms`
    """
    # Classes say what, centre-ness how well a patch is placed to say where: the geometric mean of both ranks the boxes.
    scores = (answers.logits.sigmoid() * answers.centredness.sigmoid()[:, None]).sqrt()
    best = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    patch, labels = best.indices // scores.shape[1], best.indices % scores.shape[1]
    boxes = around(points.to(scores.device)[patch], answers.reach[patch] * patch_size)
    boxes = clip_boxes_to_image(boxes, seen.size)
    boxes = boxes / boxes.new_tensor((*seen.scale, *seen.scale))
    remaining = batched_nms(boxes, best.values, labels, settings.nms)[: settings.max_boxes]
    return boxes[remaining].cpu(), labels[remaining].cpu(), best.values[remaining].cpu()


def evaluate(measured: Measurement) -> list[Row]:
    """AP50 by VOC's rules with 11 and with all points, or COCO's AP and AP50, in [0, 1]; the task's metric first.

    data    splits "train" and "test" of boxes, "val" where official; extra["rule"] is a key of `box_ap.RULES`, by
            default "coco" for the metric AP and "voc2007" for AP50
    raises  UserError for a metric that the rule does not have, missing splits, and a test split without boxes that
            count; RunError where every head diverges or a token is not finite
    """
    settings, metric, context = measured.options.detection, measured.task.metric, measured.context
    rule = str(measured.data.extra.get("rule", "coco" if metric == "AP" else "voc2007"))
    if metric not in RULES.get(rule, ()):
        raise UserError(f"metric {metric!r} with rule {rule!r}: detection has AP50 of VOC, AP and AP50 of COCO")
    train, test, val = measured.splits(Boxed, MISSING)
    names = measured.data.names(test.num_classes)
    truth = Truth.of(test)
    if truth.ignored.all():
        raise UserError("the test split has no boxes that count, so there is no average precision")
    learnt, held, words = _held_out(train, val, settings, context.seed)
    probe = BoxProbe(measured.encoder, settings, context)
    heads, losses = probe.train(learnt)

    def scored(found: Detections, truth: Truth) -> list[Figure]:
        """The figures, the task's metric first."""
        return sorted(score(found, truth, rule, names), key=lambda figure: figure.metric != metric)

    tried = None
    if len(heads) > 1 and held is not None:
        detections = probe.predict(heads, held, "boxes of the held-out images")
        reference = Truth.of(held)
        tried = {key: scored(each, reference)[0].value for key, each in detections.items()}
    detections = probe.predict(heads, test, "boxes of the test images")
    scores = {key: scored(each, truth) for key, each in detections.items()}
    best, _ = choose_best({key: each[0].value for key, each in scores.items()}, tried)
    _draw(measured, test, detections[best], names)
    settled = {**asdict(settings), "lr": float(best), "rule": rule}
    # The words hold also where all other rates diverged: the held-out images were not learned from.
    shared = {"chosen_on": words, "n_train": len(learnt), "n_test": len(test), "settings": settled, "note": NOTE}
    rows = []
    for place, figure in enumerate(scores[best]):
        details: dict[str, Any] = {"per class": figure.per_class}
        if len(settings.lrs) > 1:
            values = {key: each[place].value for key, each in scores.items()}
            details["by rate"] = {f"lr {rate:g}": values.get(repr(rate), "diverged") for rate in settings.lrs}
        details["training loss"] = losses[best]
        interval = bootstrap_statistic(len(test), figure.resampled, samples=BOOTSTRAP, seed=context.seed)
        fields: dict[str, Any] = {"metric": figure.metric, "variant": figure.variant, "details": details, **shared}
        rows.append(measured.row(figure.value, interval, **fields))
    return rows


def _held_out(
    train: Boxed, val: Boxed | None, settings: DetectionOptions, seed: int
) -> tuple[Boxed, Boxed | None, str]:
    """(training images to learn from, images that rates are chosen on, those in words); one rate needs no choice."""
    if len(settings.lrs) == 1:
        return train, None, ""
    if val is not None:
        return train, val, OFFICIAL
    if len(train) < 2:
        raise UserError("detection.lrs: to choose one of several rates, at least 2 training images are expected")
    count = min(max(len(train) // 10, 1), HELD_OUT)
    mixed = np.random.default_rng([seed, 8]).permutation(len(train))
    words = f"{count:,} held-out training images, seed {seed}"
    return train.chosen(np.sort(mixed[count:])), train.chosen(np.sort(mixed[:count])), words


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


def prepare(
    split: Boxed, index: int, encoder: Encoder, options: DetectionOptions, flip: bool | None = None
) -> Prepared:
    """An image of a split, resized and padded.

    flip    whether it is mirrored; targets are added unless None
    raises  UserError naming an image that cannot be read
    """
    picture = read_picture(split.source, index)
    rows, columns = size_of(picture)
    height, width = fit_size(rows, columns, options.size, options.max_size)
    scale = (width / columns, height / rows)
    pixels = to_array(resized(picture, height, width))
    image = pad_to_patches(pixels[:, ::-1] if flip else pixels, encoder.patch_size, encoder.preprocessing.mean)
    prepared = Prepared(index, image, (height, width), scale)
    if flip is None:
        return prepared
    boxes = np.asarray(split.boxes[index], dtype=np.float32).reshape(-1, 4) * np.array([*scale, *scale], np.float32)
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    ignored = np.asarray(split.difficult[index], dtype=bool) | np.asarray(split.crowd[index], dtype=bool)
    points = centres(encoder.grid(image.shape[1], image.shape[2]), encoder.patch_size)
    targets = assign(points, encoder.patch_size, (height, width), boxes, split.labels[index], ignored)
    return prepared._replace(targets=targets)


def typical_reach(targets: Iterable[Targets]) -> float:
    """Mean distance in patches from patches in objects to the sides of their boxes, at least 0.5.

    The heads' predictions start there. 3.0 where no patch is in an object.
    """
    reach = torch.cat([each.reach[each.labels >= 0] for each in targets])
    return max(float(reach.mean()), 0.5) if len(reach) else 3.0


class BoxProbe:
    """Linear box heads on one encoder, one for each learning rate: their training and their detections."""

    def __init__(self, encoder: Encoder, settings: DetectionOptions, context: Context) -> None:
        self.encoder, self.settings, self.context = encoder, settings, context

    def train(self, split: Boxed) -> tuple[dict[str, LinearBoxHead], dict[str, float]]:
        """The heads {rate: head} that did not diverge, with their last training loss; all start from the same weights.

        raises   RunError where every head diverges or a token is not finite, UserError for an image that cannot be read
        """
        settings, encoder, context = self.settings, self.encoder, self.context
        count, steps = len(split), settings.steps
        heads: dict[str, LinearBoxHead] = {}
        optimizers = {}

        def load(index: int, rng: np.random.Generator) -> Prepared:
            return prepare(split, index, encoder, settings, bool(rng.random() < 0.5))

        def losses(_step: int, batch: list[tuple[int, Prepared]]) -> dict[str, Tensor]:
            tokens, labels, reach = [], [], []
            for each, patches in self._tokens((image for _, image in batch), settings.batch_size, split):
                assert each.targets is not None
                counted = each.targets.labels != IGNORED
                tokens.append(patches[counted.to(patches.device)])
                labels.append(each.targets.labels[counted])
                reach.append(each.targets.reach[counted])
            x = torch.cat(tokens)
            targets = Targets(torch.cat(labels).to(x.device), torch.cat(reach).to(x.device))
            if len(x) < 2:  # BatchNorm cannot estimate a variance from a single patch
                return {key: head.linear.weight.sum() * 0.0 for key, head in heads.items()}
            return {key: box_loss(head(x), targets) for key, head in heads.items()}

        batches = training_batches(load, count, settings.batch_size, steps, context)
        first = [image for _, image in next(batches(0))[:count]]
        ((_, patches),) = self._tokens(first[:1], 1, split)
        start = typical_reach(each.targets for each in first if each.targets is not None)
        for rate in settings.lrs:
            head = LinearBoxHead(patches.shape[1], split.num_classes, start, context.seed).to(encoder.device)
            heads[repr(rate)] = head
            optimizers[repr(rate)] = torch.optim.AdamW(head.parameters(), rate, weight_decay=settings.weight_decay)
        given: dict[str, Any] = {"warmup": min(settings.warmup_steps, steps // 10), "shorter": "detection.steps"}
        ended = train_heads(heads, optimizers, batches, losses, steps, context, "detection", **given)
        finite = {key: value for key, value in ended.items() if math.isfinite(value)}
        return {key: heads[key] for key in finite}, finite

    @torch.no_grad()
    def predict(self, heads: Mapping[str, LinearBoxHead], split: Boxed, what: str) -> dict[str, Detections]:
        """{rate: its detections, in original pixels} on the images of a split.

        what    description of the images, beside the progress
        raises  as `train`
        """
        encoder, settings, context = self.encoder, self.settings, self.context
        images = parallel(lambda index: prepare(split, index, encoder, settings), range(len(split)), context.workers)
        shown = context.progress(images, len(split), f"{what} ({encoder.name})")
        boxes: dict[int, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
        for each, patches in self._tokens(shown, min(context.batch_size, settings.batch_size), split):
            height, width = each.size
            points = centres(encoder.grid(*each.image.shape[1:]), encoder.patch_size)
            within = (points[:, 0] < width) & (points[:, 1] < height)
            place = (points[within], encoder.patch_size, each, settings)
            patches = patches[within.to(patches.device)]
            boxes[each.number] = {key: detect(head(patches), *place) for key, head in heads.items()}
        return {key: Detections.of([boxes[index][key] for index in range(len(split))]) for key in heads}

    def _tokens(self, images: Iterable[Prepared], batch_size: int, split: Boxed) -> Iterator[tuple[Prepared, Tensor]]:
        """Every image with its patch tokens (N, D) float32, in another order; RunError where they are not finite."""
        for batch in batches_of_one_shape(images, batch_size, lambda each: each.image.shape):
            tokens = self.encoder.tokens(torch.stack([each.image for each in batch])).patches
            require_finite(tokens, [split.source.name(each.number) for each in batch], self.encoder)
            yield from zip(batch, tokens, strict=True)
