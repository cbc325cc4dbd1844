"""P1, the linear grid of ImageNet, iNaturalist and Places: every head trained at once on the same frozen features.

DINOv2 appendix B.3 and its code: heads over learning rates, last blocks and pooling; SGD,
momentum 0.9 and a cosine to zero, random resized crops and flips. The published figure is that of the best head *on the
reported split*: a row chosen so says so, and `linear.choose_on=train` chooses on held-out images instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.features.cache import Features
from dinoreg.evaluation.features.images import CentreCrop, parallel, read_rgb
from dinoreg.evaluation.options import EvalOptions, LinearOptions
from dinoreg.evaluation.protocols.classification import Classification, draw_mistakes
from dinoreg.evaluation.protocols.knn import RESIZE
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.softmax_regression import balanced_split
from dinoreg.evaluation.solvers.train_heads import cosine, generator, train_heads
from dinoreg.runtime.errors import UserError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop: share of the area, width over height
HELD_OUT = 0.1  # of train, for choosing the head where the reported split is not to be looked at
ORDER, CROP = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class Kind:
    """What a head sees: the class tokens of the last `blocks` blocks, and the mean patch token or not."""

    blocks: int
    avgpool: bool

    def slots(self, depth: int) -> list[int]:
        """Of (cls of each of the last `depth` asked blocks, mean patch token)."""
        return [*range(depth - self.blocks, depth), *([depth] if self.avgpool else [])]

    def __str__(self) -> str:
        return f"{self.blocks} block{'s' * (self.blocks > 1)}{' + mean patch' * self.avgpool}"


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """A row of the best head, and of each kind of input at its best rate; the grid is in the first one's settings."""
    chosen = options.linear
    if chosen.choose_on not in ("test", "train"):
        raise UserError(f"linear.choose_on={chosen.choose_on}: expected test or train")
    measured = Classification(data, task, context)
    train, test, val = measured.splits()
    deepest = min(max(chosen.blocks), encoder.depth)
    kinds = [
        Kind(blocks, bool(pool))
        for blocks in sorted({min(each, encoder.depth) for each in chosen.blocks})
        for pool in sorted({min(each, int(encoder.pools)) for each in chosen.avgpool})
    ]
    grid = Grid(encoder, train, kinds, deepest, chosen, context)
    if val is None and chosen.choose_on == "train":
        held_out = balanced_split(torch.from_numpy(train.labels), HELD_OUT, context.seed).numpy()
        grid.use(np.flatnonzero(~held_out))
    grid.train()
    if val is not None:
        scores, where = grid.scores(grid.features(val, "val"), val.labels), "the official validation split"
    elif chosen.choose_on == "train":
        kept = np.flatnonzero(held_out)
        scores = grid.scores(grid.features(train, "train"), train.labels, kept)
        where = f"a class-balanced {HELD_OUT:.0%} of train that no head was trained on, seed {context.seed}"
    else:
        scores, where = {}, "the reported split itself, as published"
    features = grid.features(test, "test")
    reported = grid.scores(features, test.labels)
    scores = scores or reported
    best = max(scores, key=lambda name: scores[name])
    predicted = grid.predict(best, features)
    draw_mistakes(test, predicted, data.class_names, context, "linear")
    common: dict[str, Any] = {
        "chosen_on": where,
        "n_train": len(grid.rows),
    }
    settings = {
        "steps": grid.steps,
        "batch_size": grid.batch_size,
        "augment": chosen.augment,
        "image_size": context.image_size,
        "optimizer": "SGD, momentum 0.9, cosine to 0",
        "best": best,
        "grid": reported,
    }
    rows = measured.accuracy_rows(predicted, settings=settings, **common)
    for kind in kinds if len(kinds) > 1 else ():
        name = max((each for each in scores if grid.kinds[each] == kind), key=lambda each: scores[each])
        own = {**common, "variant": str(kind), "settings": {"best": name}}
        rows.append(measured.accuracy_row(grid.predict(name, features), **own))
    return rows


class Grid:
    """All heads of the grid, the images that they learn from, and the features that they are scored on."""

    def __init__(
        self,
        encoder: Encoder,
        train: Labelled,
        kinds: list[Kind],
        deepest: int,
        options: LinearOptions,
        context: Context,
    ) -> None:
        self.encoder, self.split, self.deepest, self.options, self.context = encoder, train, deepest, options, context
        self.blocks = tuple(range(encoder.depth - deepest, encoder.depth))
        self.pooled = any(kind.avgpool for kind in kinds)
        self.batch_size = min(options.batch_size, len(train))
        self.rows = np.arange(len(train))
        self.kinds = {f"{kind}, lr {lr:g}": kind for kind in kinds for lr in options.lrs}
        self.rates = {f"{kind}, lr {lr:g}": lr for kind in kinds for lr in options.lrs}
        self.heads: dict[str, nn.Module] = {}
        per_epoch = options.epoch_steps or math.ceil(len(train) / self.batch_size)
        self.steps = options.epochs * per_epoch
        self._stream: Iterator[np.ndarray] | None = None
        self._order: tuple[int, np.ndarray] = (-1, self.rows)

    def use(self, rows: np.ndarray) -> None:
        """Learn from these training images only."""
        self.rows = rows
        self.batch_size = min(self.batch_size, len(rows))

    def features(self, split: Labelled, what: str) -> Features:
        """Centre-crop features of a split, cached: class tokens of the asked blocks, and the mean patch token."""
        crop = CentreCrop(round(self.context.image_size * RESIZE), self.context.image_size)
        return self.context.features.extract(
            self.encoder, split.source, crop, self.blocks, self.pooled, what=f"features of {what}"
        )

    def train(self) -> None:
        cached = None if self.options.augment else self.features(self.split, "train")
        if cached is not None:
            dim = cached.rows.shape[2]
        else:
            dim = self._encode(_stacked([self._augmented(0, int(self.rows[0]))])).shape[2]
        device = self.encoder.device
        widths = {kind: len(kind.slots(self.deepest)) * dim for kind in set(self.kinds.values())}
        torch_generator = torch.Generator().manual_seed(self.context.seed)
        for name, kind in self.kinds.items():
            head = nn.Linear(widths[kind], self.split.num_classes)
            nn.init.normal_(head.weight, std=0.01, generator=torch_generator)
            nn.init.zeros_(head.bias)
            self.heads[name] = head.to(device)
        scale = self.batch_size / 256
        optimizers = {
            name: torch.optim.SGD(head.parameters(), lr=self.rates[name] * scale, momentum=0.9)
            for name, head in self.heads.items()
        }

        def losses(step: int) -> Mapping[str, Tensor]:
            rows = self._batch(step)
            if cached is not None:
                rows = np.sort(rows)  # the file is read in one direction
                x = torch.from_numpy(np.asarray(cached.rows[rows])).float().to(device)
            else:
                x = self._encode(self._images(step))
            y = torch.from_numpy(self.split.labels[rows]).to(device)
            inputs = {kind: x[:, kind.slots(self.deepest)].flatten(1) for kind in widths}
            return {name: F.cross_entropy(head(inputs[self.kinds[name]]), y) for name, head in self.heads.items()}

        train_heads(
            self.heads, optimizers, losses, self.steps, lambda step: cosine(step, self.steps), self.context, "linear"
        )

    @torch.no_grad()
    def predict(self, name: str, features: Features, rows: np.ndarray | None = None) -> np.ndarray:
        """Classes (n,) by one head; all of `features`, or some rows of it."""
        slots, head = self.kinds[name].slots(self.deepest), self.heads[name]
        found = []
        for x in _chunks(features, rows):
            found.append(head(x[:, slots].flatten(1).to(self.encoder.device)).argmax(dim=-1).cpu().numpy())
        return np.concatenate(found)

    @torch.no_grad()
    def scores(self, features: Features, labels: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float]:
        """Top-1 of every head; -1 for one whose training went wrong."""
        truth = labels if rows is None else labels[rows]
        correct = dict.fromkeys(self.heads, 0)
        start = 0
        for x in _chunks(features, rows):
            x, y = x.to(self.encoder.device), torch.from_numpy(truth[start : start + len(x)]).to(self.encoder.device)
            inputs = {kind: x[:, kind.slots(self.deepest)].flatten(1) for kind in set(self.kinds.values())}
            for name, head in self.heads.items():
                logits = head(inputs[self.kinds[name]])
                finite = bool(torch.isfinite(logits).all())
                correct[name] += int((logits.argmax(dim=-1) == y).sum()) if finite else -len(truth)
            start += len(x)
        return {name: max(count / len(truth), -1.0) for name, count in correct.items()}

    def _encode(self, images: Tensor) -> Tensor:
        """(b, slots, D) on the device."""
        found = []
        for part in images.split(self.context.batch_size):
            layers = self.encoder.layers(part, self.blocks)
            slots = [tokens.cls for tokens in layers]
            if self.pooled:
                slots.append(layers[-1].patches.mean(dim=1))
            found.append(torch.stack(slots, dim=1))
        return torch.cat(found)

    def _batch(self, step: int) -> np.ndarray:
        """The training images of a step."""
        draws = range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self._draw(draw) for draw in draws])

    def _draw(self, draw: int) -> int:
        """Every image once per epoch, in an order of its own."""
        epoch, place = divmod(draw, len(self.rows))
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.context.seed, epoch, ORDER).permutation(self.rows))
        return int(self._order[1][place])

    def _images(self, step: int) -> Tensor:
        """Augmented training images of a step (batch_size, 3, S, S) uint8, read ahead in threads."""
        if self._stream is None:
            draws = range(step * self.batch_size, self.steps * self.batch_size)
            order = {}  # type: dict[int, int]

            def load(draw: int) -> np.ndarray:
                return self._augmented(draw, order.pop(draw))

            def planned() -> Iterator[int]:
                for draw in draws:
                    order[draw] = self._draw(draw)
                    yield draw

            self._stream = parallel(load, planned(), self.context.workers)
        return _stacked([next(self._stream) for _ in range(self.batch_size)])

    def _augmented(self, draw: int, index: int) -> np.ndarray:
        """A random resized crop, flipped half of the time: (S, S, 3) uint8."""
        return random_resized_crop(
            read_rgb(self.split.source, index), self.context.image_size, generator(self.context.seed, draw, CROP)
        )


def _stacked(images: list[np.ndarray]) -> Tensor:
    """Images (S, S, 3) uint8 as one batch (b, 3, S, S)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Inception's crop as torchvision draws it, resized bicubically, then a flip with probability one half.

    returns (size, size, 3) uint8
    """
    width, height = image.size
    box = None
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            box = (left, top, left + w, top + h)
            break
    if box is None:  # an image too long for the ratios: the largest central crop that they allow
        ratio = min(max(width / height, RATIO[0]), RATIO[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        box = (left, top, left + w, top + h)
    # Cropped first, as torchvision does, so that the filter sees no pixels from beyond the crop.
    pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


def _chunks(features: Features, rows: np.ndarray | None, size: int = 4096) -> Iterator[Tensor]:
    """(b, slots, D) float32 of all or some rows, in order."""
    total = len(features) if rows is None else len(rows)
    for start in range(0, total, size):
        part = features.rows[start : start + size] if rows is None else features.rows[rows[start : start + size]]
        yield torch.from_numpy(np.array(part, dtype=np.float32))
