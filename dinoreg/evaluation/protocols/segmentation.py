"""Linear segmentation: what patch tokens know of the class of every pixel (DINOv2 §7.4).

The last block's patch tokens go through a batch norm and a 1x1 convolution, and the logits are upsampled to pixels.
Heads are trained on random crops and tested with a sliding window at one scale; several rates and weight decays are
trained at once behind one pass of the backbone. Where a crop or window had to be padded to whole patches, its padding
is cut off again after upsampling, so that logits lie over the pixels that they are for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinoreg.evaluation.backbones.encoder import PUBLISHED_SIZE, Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.evaluation.data import IGNORED, Data, Segmented
from dinoreg.evaluation.dense.label_maps import panel, save_triptych
from dinoreg.evaluation.dense.windows import (
    TrainingStream,
    Windows,
    centre_padding,
    crop_origin,
    fit_size,
    pad_to,
    patch_grid,
    photometric_distortion,
    require_finite,
    upsampling,
)
from dinoreg.evaluation.features.images import parallel, read_rgb
from dinoreg.evaluation.metrics.miou import Confusion
from dinoreg.evaluation.options import EvalOptions, SegmentationOptions
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import polynomial, train_heads
from dinoreg.runtime.errors import UserError

SCALES = (0.5, 2.0)  # of training images, times the short side
LONGEST = 4  # long side at most, in short sides
MOST_OF_ONE_CLASS = 0.75  # of a training crop
INIT_STD = 0.01  # of the convolution's weights


class LinearHead(nn.Module):
    """Batch norm, then one logit per class and patch: (B, D, h, w) -> (B, K, h, w)."""

    def __init__(self, dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.norm(tokens))


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Forward also takes the gradient, one image at a time: full-size logits never exist for more than one image."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, patch_size: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        total = logits.new_zeros(())
        gradient = torch.zeros_like(logits)
        count = (labels != IGNORED).sum().clamp(min=1)
        for index in range(len(logits)):
            with torch.enable_grad():
                small = logits[index : index + 1].detach().requires_grad_()
                full = upsample(small, labels.shape[1], labels.shape[2], patch_size)
                loss = F.cross_entropy(full, labels[index : index + 1], ignore_index=IGNORED, reduction="sum") / count
            gradient[index : index + 1] = torch.autograd.grad(loss, small)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        return upstream * ctx.saved_tensors[0], None, None


def upsample(logits: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """(B, K, h, w) on the patches of a centrally padded image -> (B, K, height, width) on its own pixels, bilinear."""
    # As products of matrices, with gradients, two to three times as fast on a CPU as `interpolate`.
    vertical, horizontal = (torch.from_numpy(upsampling(side, patch_size)).to(logits) for side in (height, width))
    return vertical @ logits @ horizontal.mT


def pixel_loss(logits: Tensor, labels: Tensor, patch_size: int) -> Tensor:
    """Mean cross-entropy over all pixels of the batch that are not ignored; 0 when all are.

    logits   (B, K, h, w) on the patch grid of the padded crops
    labels   (B, H, W) int64, 255 where ignored
    returns  (), differentiable in logits
    """
    return _UpsampledCrossEntropy.apply(logits, labels, patch_size)  # type: ignore[no-untyped-call]


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """mIoU of linear heads. With several heads the first row is the best of them, and one row for each follows.

    The best is chosen on "val" where the dataset has one besides the reported "test", else on "test" itself, and
    `chosen_on` says so. UserError for a missing split and for masks that do not fit their images.
    """
    began = time.monotonic()
    settings = options.segmentation
    train, test = _split(data, "train"), _split(data, "test")
    combinations = {f"lr {lr}, wd {decay}": (lr, decay) for lr in settings.lrs for decay in settings.weight_decays}
    heads, losses = _train(encoder, train, combinations, settings, context)
    chosen_on = ""
    if len(heads) > 1 and "val" in data.splits:
        tried, _ = _predict(encoder, heads, data.splits["val"], settings, context, "val")
        chosen_on = "the official validation split"
    counts, pictures = _predict(encoder, heads, test, settings, context, "test")
    if len(heads) > 1 and "val" not in data.splits:
        tried, chosen_on = counts, "the reported split itself"
    best = next(iter(heads))
    if len(heads) > 1:  # one that diverged only if all did
        best = max(tried, key=lambda key: (math.isfinite(losses[key]), _or_less(tried[key].miou())))
    if context.examples is not None:
        for number, (image, truth, predicted) in enumerate(pictures):
            path = context.examples / f"segmentation_{number:02d}.png"
            save_triptych(path, image, predicted[best], truth, test.num_classes)

    names = class_keys(data.class_names, test.num_classes)

    def row(key: str, variant: str = "", chosen: str = "", note: str = "") -> Row:
        found = counts[key]
        low, high = found.interval(seed=context.seed)
        common, constant = found.constant()
        lr, decay = combinations[key]
        return Row(
            protocol="linear segmentation",
            metric=task.metric,
            value=found.miou(),
            low=low,
            high=high,
            variant=", ".join(part for part in (data.variant, variant) if part),
            chosen_on=chosen,
            seeds=(context.seed,),
            n_train=len(train),
            n_test=len(test),
            hours=(time.monotonic() - began) / 3600,
            chance=constant,
            settings=_described(settings, encoder, lr, decay),
            details={
                "pixel_accuracy": found.pixel_accuracy(),
                "mean_accuracy": found.mean_accuracy(),
                "most_frequent_class": names[common],
                "most_frequent_class_miou": constant,
                "train_loss": losses[key],
                "iou": dict(zip(names, found.iou().tolist())),
            },
            note=note if math.isfinite(losses[key]) else "its training diverged",
        )

    if len(heads) == 1:
        return [row(best)]
    others = [row(key, key, note="the best of these" if key == best else "") for key in heads]
    return [row(best, f"best of {len(heads)}", chosen_on), *others]


def class_keys(names: Sequence[str], num_classes: int) -> list[str]:
    """A distinct name for every class; its number is the name, or part of it, where names are missing or repeated."""
    if len(names) != num_classes:
        return [f"class {number}" for number in range(num_classes)]
    repeated = len(set(names)) < num_classes
    return [f"{name} ({number})" if repeated else name for number, name in enumerate(names)]


def warmup(settings: SegmentationOptions) -> int:
    """Steps of warm-up: as asked, or a tenth of a training that would be over before it."""
    return settings.warmup_steps if settings.warmup_steps < settings.steps else settings.steps // 10


def training_crop(
    image: Image.Image, mask: np.ndarray, size: int, fill: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random scale, crop, flip and distortion of colours.

    fill     colour of pixels beyond the image; the mask's are 255

    returns  (size, size, 3) uint8, (size, size) uint8
    """
    ratio = rng.uniform(*SCALES)
    height, width = fit_size(image.height, image.width, max(int(size * ratio), 1), max(int(LONGEST * size * ratio), 1))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    labels = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    top, left = crop_origin(height, width, size, rng, labels, MOST_OF_ONE_CLASS)
    pixels, labels = pixels[top : top + size, left : left + size], labels[top : top + size, left : left + size]
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return pad_to(photometric_distortion(pixels, rng), size, fill), pad_to(labels, size, IGNORED)


def _train(
    encoder: Encoder,
    split: Segmented,
    combinations: Mapping[str, tuple[float, float]],
    settings: SegmentationOptions,
    context: Context,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The trained heads and their last losses."""
    size, patch = settings.size, encoder.patch_size
    fill = [round(255 * value) for value in encoder.mean]
    at_once = _images_at_once(size, context)
    with torch.no_grad():
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        _, dim, rows, columns = patch_grid(encoder, blank, 1).shape
    if settings.batch_size * rows * columns < 2:
        raise UserError(
            f"segmentation.batch_size={settings.batch_size}: a crop of {size} pixels is one patch, "
            "and a batch norm needs two; expected at least 2"
        )
    heads: dict[str, nn.Module] = {
        key: LinearHead(dim, split.num_classes, context.seed).to(encoder.device) for key in combinations
    }
    optimizers = {
        key: torch.optim.AdamW(heads[key].parameters(), lr=lr, weight_decay=decay)
        for key, (lr, decay) in combinations.items()
    }

    def load(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, mask = _read(split, index)
        return training_crop(image, mask, size, fill, rng)

    with TrainingStream(load, len(split), settings.batch_size, settings.steps, context.seed, context.workers) as stream:

        def step_losses(step: int) -> dict[str, Tensor]:
            indices, crops = zip(*stream(step))
            images = torch.from_numpy(np.stack([pixels for pixels, _ in crops])).permute(0, 3, 1, 2)
            labels = torch.from_numpy(np.stack([mask for _, mask in crops])).to(encoder.device).long()
            tokens = patch_grid(encoder, images, at_once)
            require_finite(tokens, [split.source.name(index) for index in indices], encoder)
            return {key: pixel_loss(head(tokens), labels, patch) for key, head in heads.items()}

        warm = warmup(settings)
        losses = train_heads(
            heads,
            optimizers,
            step_losses,
            settings.steps,
            lambda step: polynomial(step, settings.steps, warm),
            context,
            "segmentation",
        )
    return heads, losses


@torch.no_grad()
def _predict(
    encoder: Encoder,
    heads: Mapping[str, nn.Module],
    split: Segmented,
    settings: SegmentationOptions,
    context: Context,
    name: str,
) -> tuple[dict[str, Confusion], list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]]:
    """Every head's counts over a split, and the first images with their truth and every head's prediction.

    Resumes where an earlier pass over the same number of images was stopped, at an image's precision.
    """
    counts = {key: Confusion(split.num_classes) for key in heads}
    state = f"segmentation_{name}"
    saved = context.load_state(state)
    start = 0
    if saved is not None and set(saved["counts"]) == set(heads) and saved["images"] == len(split):
        start = int(saved["done"])
        for key in heads:
            counts[key].load_state(saved["counts"][key])
    wanted = context.num_examples if context.examples is not None and name == "test" else 0
    at_once = _images_at_once(settings.size, context)
    pictures: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = _read(split, index)
        height, width = fit_size(image.height, image.width, settings.size, LONGEST * settings.size)
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)), mask

    def answer(pixels: np.ndarray, mask: np.ndarray, index: int) -> dict[str, np.ndarray]:
        height, width, _ = pixels.shape
        windows = Windows(height, width, settings.size, settings.stride, encoder.patch_size)
        # The array of an image is read-only, and torch would warn that it might be written to.
        cut = windows.cut(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        tokens = patch_grid(encoder, cut, at_once)
        require_finite(tokens.flatten(0)[None], [split.source.name(index)], encoder)
        return {key: windows.argmax(head(tokens), *mask.shape) for key, head in heads.items()}

    # Pictures of images that an earlier pass has counted are drawn again.
    shown = [*range(min(wanted, start)), *range(start, len(split))]
    last_saved = time.monotonic()
    loaded = zip(shown, parallel(load, shown, context.workers))
    for index, (pixels, mask) in context.progress(loaded, len(shown), f"segmentation, {name} ({encoder.name})"):
        found = answer(pixels, mask, index)
        if index < wanted:
            shapes = mask.shape
            masks = {key: panel(predicted.astype(np.uint8), *shapes) for key, predicted in found.items()}
            pictures.append((panel(pixels, *shapes), panel(mask, *shapes), masks))
        if index < start:
            continue
        for key, predicted in found.items():
            counts[key].add(mask, predicted)
        if time.monotonic() - last_saved > SAVE_SECONDS:
            last_saved = time.monotonic()
            tables = {key: each.state() for key, each in counts.items()}
            context.save_state(state, {"done": index + 1, "images": len(split), "counts": tables})
    return counts, pictures


def _read(split: Segmented, index: int) -> tuple[Image.Image, np.ndarray]:
    """An image and its mask (H, W) uint8; UserError when they do not fit."""
    image, mask, name = read_rgb(split.source, index), split.mask(index), split.source.name(index)
    if mask.shape != (image.height, image.width):
        raise UserError(
            f"{name}: its mask is {' x '.join(map(str, mask.shape))} pixels, the image {image.height} x {image.width}"
        )
    wrong = mask[(mask != IGNORED) & (mask >= split.num_classes)]
    if wrong.size:
        raise UserError(f"{name}: its mask has class {wrong[0]}, expected 0..{split.num_classes - 1} or {IGNORED}")
    return image, mask.astype(np.uint8, copy=False)


def _images_at_once(size: int, context: Context) -> int:
    """As many crops as take the backbone about the memory of `batch_size` images at 224 pixels."""
    return max(int(context.batch_size * min((PUBLISHED_SIZE / size) ** 2, 1.0)), 1)


def _split(data: Data, name: str) -> Segmented:
    split = data.splits.get(name)
    if not isinstance(split, Segmented) or not len(split):
        raise UserError(f"segmentation needs a split {name!r} with masks; the dataset has {', '.join(data.splits)}")
    return split


def _or_less(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def _described(settings: SegmentationOptions, encoder: Encoder, lr: float, decay: float) -> dict[str, object]:
    padded = sum(centre_padding(settings.size, encoder.patch_size)) + settings.size
    return {
        "head": "last block's patch tokens after the final norm, batch norm, 1x1 convolution, bilinear upsampling",
        "lr": lr,
        "weight_decay": decay,
        "steps": settings.steps,
        "warmup_steps": warmup(settings),
        "batch_size": settings.batch_size,
        "schedule": "linear warm-up, then linear to 0 (poly, power 1)",
        "optimizer": "AdamW",
        "size": settings.size,
        "padded_size": padded,
        "stride": settings.stride,
        "scales": list(SCALES),
        "cat_max_ratio": MOST_OF_ONE_CLASS,
        "augmentation": "scale, crop, horizontal flip, photometric distortion",
        "test": f"short side {settings.size}, sliding window, one scale, no flip",
    }
