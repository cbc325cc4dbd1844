"""Linear box heads on a frozen encoder: how images are prepared, how heads are trained, what they detect."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.dense.box_head import IGNORED, LinearBoxHead, Targets, assign, box_loss, centres, detect
from dinoreg.evaluation.dense.windows import batches_of_one_shape, fit_size, pad_to_patches, training_stream
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.features.images import read_picture, resized, size_of, to_array
from dinoreg.evaluation.metrics.box_ap import Detections
from dinoreg.evaluation.options import DetectionOptions
from dinoreg.evaluation.solvers.train_heads import cosine, train_heads
from dinoreg.runtime.parallel import parallel


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

    def train(self, split: Boxed, indices: np.ndarray) -> tuple[dict[str, LinearBoxHead], dict[str, float]]:
        """The heads {rate: head} that did not diverge, with their last training loss; all start from the same weights.

        indices  (n,) of the split's images to train on
        raises   RunError where every head diverges or a token is not finite, UserError for an image that cannot be read
        """
        settings, encoder, context = self.settings, self.encoder, self.context
        count, steps = len(indices), settings.steps
        heads: dict[str, LinearBoxHead] = {}
        optimizers = {}

        def load(position: int, rng: np.random.Generator) -> Prepared:
            return prepare(split, int(indices[position]), encoder, settings, bool(rng.random() < 0.5))

        def losses(step: int) -> dict[str, Tensor]:
            tokens, labels, reach = [], [], []
            for each, patches in self._tokens((image for _, image in stream(step)), settings.batch_size, split):
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

        factor = partial(cosine, steps=steps, warmup=min(settings.warmup_steps, steps // 10))
        with training_stream(load, count, settings.batch_size, steps, context.seed, context.workers) as stream:
            first = [image for _, image in stream(0)[:count]]
            ((_, patches),) = self._tokens(first[:1], 1, split)
            start = typical_reach(each.targets for each in first if each.targets is not None)
            for rate in settings.lrs:
                head = LinearBoxHead(patches.shape[1], split.num_classes, start, context.seed).to(encoder.device)
                decay = settings.weight_decay
                heads[repr(rate)] = head
                optimizers[repr(rate)] = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=decay)
            running = (steps, factor, context, "detection")
            ended = train_heads(heads, optimizers, losses, *running, shorter="detection.steps")
        finite = {key: value for key, value in ended.items() if math.isfinite(value)}
        return {key: heads[key] for key in finite}, finite

    @torch.no_grad()
    def predict(
        self, heads: Mapping[str, LinearBoxHead], split: Boxed, indices: np.ndarray, what: str
    ) -> tuple[dict[str, Detections], np.ndarray]:
        """Every head's boxes on some images, which are numbered from 0.

        indices  (n,) of the split's images
        what     description of the images, beside the progress
        returns  {rate: detections in original pixels}, and the images' height and width in pixels (n, 2) int64
        raises   as `train`
        """
        encoder, settings, context = self.encoder, self.settings, self.context
        order = indices.tolist()
        images = parallel(lambda index: prepare(split, index, encoder, settings), order, context.workers)
        shown = context.progress(images, len(order), f"{what} ({encoder.name})")
        sizes: dict[int, tuple[int, int]] = {}
        boxes: dict[int, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
        for each, patches in self._tokens(shown, min(context.batch_size, settings.batch_size), split):
            height, width = each.size
            sizes[each.number] = round(height / each.scale[1]), round(width / each.scale[0])
            points = centres(encoder.grid(*each.image.shape[1:]), encoder.patch_size)
            within = (points[:, 0] < width) & (points[:, 1] < height)
            place = (points[within], encoder.patch_size, each.size, each.scale, settings.nms, settings.max_boxes)
            patches = patches[within.to(patches.device)]
            boxes[each.number] = {key: detect(head(patches), *place) for key, head in heads.items()}
        found = {key: Detections.of([boxes[index][key] for index in order]) for key in heads}
        return found, np.array([sizes[index] for index in order])

    def _tokens(self, images: Iterable[Prepared], batch_size: int, split: Boxed) -> Iterator[tuple[Prepared, Tensor]]:
        """Every image with its patch tokens (N, D) float32, in another order; RunError where they are not finite."""
        for batch in batches_of_one_shape(images, batch_size, lambda each: each.image.shape):
            tokens = self.encoder.tokens(torch.stack([each.image for each in batch])).patches
            require_finite(tokens, [split.source.name(each.number) for each in batch], self.encoder)
            yield from zip(batch, tokens, strict=True)
