"""The linear grid of ImageNet, iNaturalist and Places: every head trained at once on the same frozen features.
DINOv2 appendix B.3 and its code: heads over learning rates, last blocks and pooling; SGD, momentum 0.9 and a cosine to
zero, random resized crops and flips. The published figure is that of the best head *on the reported split*: a row
chosen so says so, and `linear.choose_on=train` chooses on held-out images instead.

The attention probe is a grid, too: a learnt query gathers patch tokens and the class token for a linear classifier. It
shows what is in the patches and not in the class token (as in CAPI, arXiv 2502.08769). The best of its rates is chosen
on held-out training images. The tokens of all images are too many to be kept: they are encoded when they are needed,
unless they are few.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.evaluation.backbones.encoder import Encoder, seeded
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.dense.windows import shuffled, training_batches
from dinoreg.evaluation.features.cache import extract_features, slots
from dinoreg.evaluation.features.images import Picture, cropped, read_picture, resized, size_of, stack_images, to_array
from dinoreg.evaluation.protocols import classification
from dinoreg.evaluation.protocols.classification import RESIZE
from dinoreg.evaluation.protocols.measurement import OFFICIAL, REPORTED, Fold, Measurement, choose_best, per_fold
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.regularisation_path import balanced_split
from dinoreg.evaluation.solvers.train_heads import train_heads
from dinoreg.runtime.parallel import parallel

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop: share of the area, width over height
HELD_OUT = 0.1  # of train, for choosing the head where the reported split is not to be looked at
CHUNK = 4096  # rows of features that are scored at once
HEAD_DIM = 64  # of one of the heads of the attention probe's query, about
KEPT_TOKENS = 1 << 30  # bytes of a split's tokens that are kept


@dataclass(frozen=True)
class Kind:
    """The input of a head: the class tokens of the last `blocks` blocks, and the mean patch token or not."""

    blocks: int
    avgpool: bool

    def slots(self, depth: int) -> list[int]:
        """Its slots among the class tokens of the last `depth` blocks and, last, the mean patch token."""
        return [*range(depth - self.blocks, depth), *([depth] if self.avgpool else [])]

    def __str__(self) -> str:
        return f"{self.blocks} block{'s' * (self.blocks > 1)}{' + mean patch' * self.avgpool}"


def evaluate(measured: Measurement) -> list[Row]:
    """The rows of DINOv2's grid, as `grid_rows`."""
    return grid_rows(measured, "linear", Grid)


def attention(measured: Measurement) -> list[Row]:
    """The rows of the attention heads, as `grid_rows`."""
    return grid_rows(measured, "attention", AttentionGrid)


def grid_rows(measured: Measurement, name: str, kind_of_grid: type["Grid"]) -> list[Row]:
    """A row of the best head, and of each kind of input at its best rate; the grid is in the first one's settings.

    name  of the protocol, and of its options

    Accuracy in [0, 1]. Raises as `labelled_folds` and `extract_features`, and RunError where every head diverges.
    """
    test, folds = classification.labelled_folds(measured)
    chosen, grids = getattr(measured.options, name), list[Grid]()
    for number, fold in enumerate(folds, 1):
        title = f"{name}, fold {number} of {len(folds)}" if len(folds) > 1 else name
        grids.append(kind_of_grid.of(measured, chosen, fold, title))
    grid, chosen_on = grids[0], grids[0].chosen_on

    def pooled(kind: Kind | None) -> tuple[np.ndarray, str | list[str]]:
        """What the best heads, of one kind of input or of any, say of all test images, and which they are."""
        names, predicted = [], np.empty(len(test), dtype=np.int64)
        for each, fold in zip(grids, folds):
            names.append(each.best(kind))
            predicted[fold.rows] = each.said[names[-1]]
        return predicted, per_fold(names)

    predicted, best = pooled(None)
    classification.draw_mistakes(measured, test, predicted, name)
    settings = {
        "steps": grid.steps,
        "batch_size": grid.batch_size,
        "augment": chosen.augment,
        "image_size": measured.context.image_size,
        "best": best,
        "grid": {name: per_fold([each.reported[name] for each in grids]) for name in grids[0].reported},
    }
    shared: dict[str, Any] = {
        "chosen_on": chosen_on + ", as published" * (chosen_on == REPORTED),
        "n_train": round(np.mean([len(each.rows) for each in grids])),
    }
    rows = classification.accuracy_rows(measured, test, predicted, settings=settings, **shared)
    for kind in grid.kinds if len(grid.kinds) > 1 else ():
        predicted, best = pooled(kind)
        fields = {"variant": str(kind), "settings": {"best": best}, **shared}
        rows.append(classification.accuracy_row(measured, test, predicted, measured.task.metric, **fields))
    return rows


class Grid:
    """All heads of the grid, the images that they learn from, and the features that they are scored on.

    rows        (m,) indices into the training split of the images that the heads learn from
    kinds       of input; the heads of one kind, which differ by their rate, are one linear map side by side
    maps        {kind: its heads' map to (rates x classes) logits}, once trained
    said        {head: classes (n,) int64} of the test images
    reported    {head: score} on the test images
    validation  {head: score} on what heads are chosen by, the first of equals; where that is held out of train, those
                of lower loss come first. None: by `reported`
    chosen_on   in words
    """

    chunk = CHUNK
    said: dict[str, np.ndarray]
    reported: dict[str, float]
    validation: dict[str, float] | None = None
    chosen_on: str

    def __init__(self, encoder: Encoder, train: Labelled, rows: np.ndarray, options: Any, context: Context) -> None:
        self.encoder, self.split, self.rows, self.options, self.context = encoder, train, rows, options, context
        self.batch_size = min(options.batch_size, len(rows))
        self.rates = [lr * (self.batch_size / 256) for lr in options.lrs]
        self.kinds = self.inputs_of(options)
        self.steps = options.epochs * (options.epoch_steps or math.ceil(len(rows) / self.batch_size))
        self.no_answers = np.setdiff1d(np.arange(train.num_classes), train.answers)
        self.maps: dict[Any, Any] = {}

    @classmethod
    def of(cls, measured: Measurement, chosen: Any, fold: Fold[Labelled], name: str) -> "Grid":
        """A grid that was trained and scored in one fold; `name` is that of the saved state."""
        context, metric = measured.context, measured.task.metric
        train, test, val, words = fold.train, fold.test, fold.val, OFFICIAL
        held_out = np.zeros(len(train), dtype=bool)
        if val is None and chosen.choose_on == "train":
            held_out = balanced_split(torch.from_numpy(train.labels), HELD_OUT, context.seed, train.pictures).numpy()
        grid = cls(measured.encoder, train, np.flatnonzero(~held_out), chosen, context)
        features = grid.features(test, "test")
        grid.train(features.shape[2], name)
        grid.reported, grid.said, _ = grid.scores(features, test.labels, metric)
        if val is not None:
            grid.validation, _, _ = grid.scores(grid.features(val, "val"), val.labels, metric)
        elif held_out.any():
            known = grid.features(train, "train")
            # A tenth of a small set tells few heads apart.
            scores, _, loss = grid.scores(known, train.labels, metric, np.flatnonzero(held_out))
            grid.validation = {name: scores[name] for name in sorted(scores, key=lambda name: loss[name])}
            words = f"a class-balanced {HELD_OUT:.0%} of train that no head was trained on, seed {context.seed}"
        grid.chosen_on = choose_best(grid.reported, grid.validation, words)[1]
        return grid

    def best(self, kind: Any) -> str:
        """The best head, of one kind of input or, with None, of any."""
        names = self.reported if kind is None else self.names(kind)
        own = None if self.validation is None else {name: at for name, at in self.validation.items() if name in names}
        return choose_best({name: self.reported[name] for name in names}, own)[0]

    def inputs_of(self, options: Any) -> list[Any]:
        """The kinds of input that the options ask for and the encoder has."""
        encoder = self.encoder
        self.deepest = min(max(options.blocks), encoder.depth)
        self.blocks = tuple(range(encoder.depth - self.deepest, encoder.depth))
        blocks = sorted({min(each, encoder.depth) for each in options.blocks})
        pools = sorted({min(each, int(encoder.pools)) for each in options.avgpool})
        self.pooled = bool(pools[-1])
        return [Kind(number, bool(pool)) for number in blocks for pool in pools]

    def names(self, kind: Kind) -> list[str]:
        """The names of the heads of one kind of input, one for each learning rate."""
        return [f"{kind}, lr {lr:g}" for lr in self.options.lrs]

    def features(self, split: Labelled, what: str) -> Any:
        """Centre-crop features (n, slots, D), cached: class tokens of the blocks in use, and the mean patch token.

        what    description of the images, beside the progress
        raises  as `extract_features`
        """
        crop, what = self.context.crop(split.source, RESIZE), f"features of {what}"
        return extract_features(self.context, self.encoder, split.source, crop, self.blocks, self.pooled, what)

    def logits(self, x: Tensor) -> dict[Any, Tensor]:
        """Every head's logits: {kind: (b, rates, classes)} of features (b, slots, D)."""
        seen = {kind: each(x[:, kind.slots(self.deepest)].flatten(1)) for kind, each in self.maps.items()}
        return {kind: each.view(len(x), len(self.options.lrs), -1) for kind, each in seen.items()}

    def losses(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{head: () its mean cross-entropy times its rate} of features (b, slots, D) with labels (b,) int64.

        SGD at the rate 1 then moves a head as SGD at the head's own rate would: momentum is linear in the gradient. The
        rates are the options' times batch size / 256, as in DINOv2's code.
        """
        found: dict[str, Tensor] = {}
        for kind, logits in self.logits(x).items():
            losses = _cross_entropies(logits, labels).mean(dim=0)  # (rates,)
            found |= dict(zip(self.names(kind), (losses * losses.new_tensor(self.rates)).unbind()))
        return found

    def start(self, width: int) -> None:
        """Fresh heads over tokens of width D: weights N(0, 0.01²) drawn from the seed, biases 0."""
        random = torch.Generator().manual_seed(self.context.seed)
        for kind in self.kinds:
            size = len(kind.slots(self.deepest)) * width
            self.maps[kind] = nn.Linear(size, len(self.options.lrs) * self.split.num_classes)
            nn.init.normal_(self.maps[kind].weight, std=0.01, generator=random)
            nn.init.zeros_(self.maps[kind].bias)
            self.maps[kind].to(self.encoder.device)

    def optimize(self, heads: Any) -> torch.optim.Optimizer:
        """An optimizer of the heads of one kind of input."""
        return torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)

    def train(self, width: int, name: str = "linear") -> None:
        """Train fresh heads over tokens of width D; RunError where all of them diverge.

        name  of the saved state
        """
        self.start(width)
        heads = {str(kind): each for kind, each in self.maps.items()}
        optimizers = {key: self.optimize(each) for key, each in heads.items()}
        cached = None if self.options.augment else self.features(self.split, "train")
        crops = training_batches(self._crop, len(self.rows), self.batch_size, self.steps, self.context)

        def batches(first: int) -> Iterator[tuple[Tensor, np.ndarray]]:
            if cached is None:
                yield from map(self.augmented, crops(first))
            else:
                yield from (self.stored(cached, step) for step in range(first, self.steps))

        def losses(_step: int, batch: tuple[Tensor, np.ndarray]) -> dict[str, Tensor]:
            x, rows = batch
            return self.losses(x, torch.from_numpy(self.split.labels[rows]).to(x.device))

        train_heads(heads, optimizers, batches, losses, self.steps, self.context, name)

    def stored(self, features: np.ndarray, step: int) -> tuple[Tensor, np.ndarray]:
        """Cached features (b, slots, D) float32 of the training images of a step, and their indices (b,) in the split.

        features  (n, slots, D) of the whole training split
        """
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        picked = [shuffled(position, len(self.rows), self.context.seed) for position in positions]
        rows = np.sort(self.rows[picked])  # in order, so that the file is read sequentially
        return torch.from_numpy(np.asarray(features[rows])).float().to(self.encoder.device), rows

    def augmented(self, samples: Sequence[tuple[int, np.ndarray]]) -> tuple[Tensor, np.ndarray]:
        """Features (b, slots, D) float32 of the crops of a step, and the indices (b,) of their images in the split.

        samples  (position in `rows`, crop (S, S, C) uint8, or float32 in 0..255) of each
        """
        features = self.encoded([crop for _, crop in samples])
        return features, self.rows[[index for index, _ in samples]]

    def encoded(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Features (b, slots, D) float32 of crops (S, S, C) uint8, or float32 in 0..255."""
        parts = stack_images(crops).split(self.context.batch_size)
        return torch.cat([self.tokens(part) for part in parts])

    def tokens(self, images: Tensor) -> Tensor:
        """What heads see of images (b, C, H, W): (b, slots, D) float32."""
        return slots(self.encoder, images, self.blocks, self.pooled)

    @torch.no_grad()
    def scores(
        self, features: np.ndarray, labels: np.ndarray, metric: str, rows: np.ndarray | None = None
    ) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
        """Of every head the accuracy in [0, 1], -1 where a logit is not finite, its classes (m,) int64, and its mean
        cross-entropy, infinite where it is not finite.

        features, labels  (n, slots, D) and (n,)
        metric            "top-1", else mean per class
        rows              (m,) of them that count; None: all
        """
        rows = np.arange(len(labels)) if rows is None else rows
        parts: dict[str, list[np.ndarray]] = {name: [] for kind in self.kinds for name in self.names(kind)}
        broken, losses = set[str](), dict.fromkeys(parts, 0.0)
        for some in np.split(rows, range(self.chunk, len(rows), self.chunk)):
            x = torch.from_numpy(features[some].astype(np.float32)).to(self.encoder.device)
            for kind, logits in self.logits(x).items():
                total = _cross_entropies(logits, torch.from_numpy(labels[some]).to(x.device)).cpu().double().sum(dim=0)
                finite = torch.isfinite(logits).all(dim=-1).all(dim=0).tolist()
                logits[..., self.no_answers] = -torch.inf
                said = logits.argmax(dim=-1).T.cpu().numpy()
                for name, classes, sound, loss in zip(self.names(kind), said, finite, total.tolist()):
                    parts[name].append(classes)
                    losses[name] += loss
                    broken |= set() if sound else {name}
        classes_of = {name: np.concatenate(each) for name, each in parts.items()}
        score = classification.METRICS[metric]
        scores = {name: -1.0 if name in broken else score(each, labels[rows]) for name, each in classes_of.items()}
        means = {name: math.inf if math.isnan(loss) else loss / len(rows) for name, loss in losses.items()}
        return scores, classes_of, means

    def _crop(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """A random resized crop of one of the images learnt from, flipped half of the time: (S, S, C)."""
        picture = read_picture(self.split.source, int(self.rows[index]))
        return random_resized_crop(picture, self.context.image_size, rng)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(b, rates) of logits (b, rates, classes) with labels (b,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")


def random_resized_crop(picture: Picture, size: int, rng: np.random.Generator) -> np.ndarray:
    """Inception's crop as torchvision draws it, resized bicubically, then a flip with probability one half.

    size     side in pixels
    returns  (size, size, C) uint8, or float32 in 0..255
    """
    height, width = size_of(picture)
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            break
    else:  # an image too long for the ratios: the largest central crop that they allow
        ratio = min(max(width / height, RATIO[0]), RATIO[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
    # Cropped first, as torchvision does, so that the filter sees no pixels from beyond the crop.
    pixels = to_array(resized(cropped(picture, top, left, h, w), size, size))
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


class AttentionHead(nn.Module):
    """One query's multi-head attention over tokens of width D, and a linear classifier of what it gathers.

    The query does not depend on the tokens, so that its product with the keys' map is one vector of width D for each of
    H heads, and values are mapped after they were gathered: what `nn.MultiheadAttention` computes, for less.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        heads = next(count for count in range(max(dim // HEAD_DIM, 1), 0, -1) if dim % count == 0)
        self.query = nn.Parameter(torch.randn(heads, dim) / math.sqrt(dim))
        self.value = nn.Parameter(torch.randn(heads, dim, dim // heads) / math.sqrt(dim))
        self.classify = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.classify.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, T, D) -> logits (b, classes)."""
        weights = (tokens @ self.query.mT).softmax(dim=1)  # (b, T, H)
        return self.classify(torch.einsum("bhd,hdv->bhv", weights.mT @ tokens, self.value).flatten(1))


class Encoded:
    """The tokens of a split's centre crops, (n, T, D) float32, read and encoded as rows of them are asked for."""

    def __init__(self, grid: Grid, split: Labelled) -> None:
        self.grid, self.source, self.crop = grid, split.source, grid.context.crop(split.source, RESIZE)
        self.shape = (len(split), *self[np.arange(1)].shape[1:])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        load, workers = lambda index: self.crop(read_picture(self.source, index)), self.grid.context.workers
        return self.grid.encoded([*parallel(load, rows.tolist(), workers)]).cpu().numpy()


class AttentionGrid(Grid):
    """Attention heads on one encoder, one for each rate."""

    def inputs_of(self, options: Any) -> list[Any]:
        """All tokens are the only kind of input."""
        self.rates, self.chunk = [1.0] * len(options.lrs), self.context.batch_size
        return ["attention"]

    def features(self, split: Labelled, what: str) -> Any:
        """The tokens of a split: an array where they are few, else encoded again for every use."""
        encoded = Encoded(self, split)
        return encoded[np.arange(len(split))] if 4 * math.prod(encoded.shape) <= KEPT_TOKENS else encoded

    def tokens(self, images: Tensor) -> Tensor:
        """The class token, where it has the patches' width, and the patches (b, T, D)."""
        found = self.encoder.tokens(images)
        return torch.cat([found.cls[:, None], found.patches], dim=1) if self.encoder.pools else found.patches

    def start(self, width: int) -> None:
        """Fresh heads over tokens of width D, drawn from the seed."""
        with seeded(self.context.seed):
            heads = [AttentionHead(width, self.split.num_classes) for _ in self.options.lrs]
        self.maps = {"attention": nn.ModuleList(heads).to(self.encoder.device)}

    def optimize(self, heads: Any) -> torch.optim.Optimizer:
        """AdamW with a rate for each head."""
        groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, self.options.lrs)]
        return torch.optim.AdamW(groups, weight_decay=self.options.weight_decay)

    def logits(self, x: Tensor) -> dict[Any, Tensor]:
        """{"attention": (b, rates, classes)} of tokens (b, T, D)."""
        return {kind: torch.stack([head(x) for head in heads], dim=1) for kind, heads in self.maps.items()}
