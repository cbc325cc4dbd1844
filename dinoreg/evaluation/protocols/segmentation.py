"""Linear segmentation: what patch tokens know of the class of every pixel (DINOv2 §7.4).

The last block's patch tokens go through a batch norm and a 1x1 convolution, and the logits are upsampled to pixels.
Heads are trained on random crops and tested with a sliding window at one scale; several rates and weight decays are
trained at once behind one pass of the backbone. Where a crop or window had to be padded to whole patches, its padding
is cut off again after upsampling, so that logits lie over the pixels that they are for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoreg.data.display import as_rgb
from dinoreg.evaluation.backbones.encoder import PUBLISHED_SIZE, Encoder
from dinoreg.evaluation.comparison import with_majority
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import IGNORED, Segmented
from dinoreg.evaluation.dense.pictures import coloured, strip, widened
from dinoreg.evaluation.dense.windows import Windows, fit_size, patch_grid, training_batches, upsampling
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.features.images import Picture, read_with_truth, resized, size_of, stack_images, to_array
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.metrics.miou import Confusion, count_pixels
from dinoreg.evaluation.options import SegmentationOptions
from dinoreg.evaluation.protocols.measurement import Measurement, choose_best, resumable_map
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import linear, train_heads
from dinoreg.runtime.errors import UserError

SCALES = (0.5, 2.0)  # of training images, times the short side
LONGEST = 4  # long side at most, in short sides
MOST_OF_ONE_CLASS = 0.75  # of a training crop
INIT_STD = 0.01  # of the convolution's weights
CROP_TRIES = 10  # draws, after which a crop is taken even if it is not good
MISSING = "segmentation needs a split {name!r} with masks; the dataset has {splits}"


def evaluate(measured: Measurement) -> list[Row]:
    """mIoU in [0, 1] of linear heads. With several heads the first row is the best one's, and one row for each follows.

    The best is chosen on "val" where the dataset has one besides the reported "test", else on "test" itself, and
    `chosen_on` says so. UserError for a missing split and for masks that do not fit their images; RunError where every
    head diverges or a token is not finite.
    """
    train, test, val = measured.splits(Segmented, MISSING)
    probe = LinearProbe(measured.encoder, measured.options.segmentation, measured.context)
    heads, losses = probe.train(train)

    def scores(counts: Mapping[str, Confusion]) -> dict[str, float]:
        """By which the best head is chosen; one that diverged is only if all did."""
        return {key: each.miou() if math.isfinite(losses[key]) else math.nan for key, each in counts.items()}

    tried = scores(probe.count(heads, val, "val")) if len(heads) > 1 and val is not None else None
    counts = probe.count(heads, test, "test")
    best, chosen_on = choose_best(scores(counts), tried)
    probe.draw(heads[best], test)

    def row(key: str, note: str = "", **fields: Any) -> Row:
        note = note if math.isfinite(losses[key]) else "its training diverged"
        lr, decay = probe.combinations[key]
        settings = {**asdict(probe.settings), "warmup_steps": warmup(probe.settings), "lr": lr, "weight_decay": decay}
        shared = {"n_train": len(train), "settings": settings, "note": note}
        return miou_row(measured, counts[key], {"train_loss": losses[key]}, **shared, **fields)

    if len(heads) == 1:
        return [row(best)]
    others = [row(key, "the best of these" if key == best else "", variant=key) for key in heads]
    return [row(best, variant=f"best of {len(heads)}", chosen_on=chosen_on), *others]


def miou_row(measured: Measurement, counts: Confusion, details: Mapping[str, Any], **fields: Any) -> Row:
    """mIoU in [0, 1] beside that of always predicting the most frequent class, which is of the true classes alone.

    details, fields  of Row
    """
    names, seed = measured.data.names(counts.num_classes), measured.context.seed
    most_frequent, constant = counts.constant()
    everywhere = bootstrap_statistic(counts.num_images, lambda weights: counts.constant(weights)[1], seed=seed)
    found = {
        "pixel_accuracy": counts.pixel_accuracy(),
        "mean_accuracy": counts.mean_accuracy(),
        "most_frequent_class": names[most_frequent],
        "most_frequent_class_miou": constant,
        "iou": dict(zip(names, counts.iou().tolist())),
        **details,
    }
    interval = bootstrap_statistic(counts.num_images, counts.miou, seed=seed)
    row = measured.row(counts.miou(), interval, n_test=counts.num_images, details=found, **fields)
    return with_majority(row, measured.row(constant, everywhere, n_test=counts.num_images))


def warmup(settings: SegmentationOptions) -> int:
    """Steps of warm-up: the option's, or a tenth of all where that is less."""
    return min(settings.warmup_steps, settings.steps // 10)


class Segmenter:
    """Pictures of any size through one encoder over sliding windows: what heads say of their pixels.

    name    of the protocol
    size    of the short side and of the windows, in pixels
    stride  between windows, in pixels; None: two thirds of their size
    """

    def __init__(self, encoder: Encoder, context: Context, name: str, size: int, stride: int | None) -> None:
        self.encoder, self.context, self.name, self.size = encoder, context, name, size
        self.stride = stride or max(2 * size // 3, 1)
        # As many crops as take the backbone about the memory of `batch_size` images at 224 pixels.
        self.batch_size = max(int(context.batch_size * min((PUBLISHED_SIZE / size) ** 2, 1.0)), 1)

    def count(self, heads: Mapping[str, nn.Module], split: Segmented, name: str) -> dict[str, Confusion]:
        """Every head's counts of pixels over a split; an interrupted pass over as many images resumes.

        name    of the split
        raises  UserError for images and masks that do not fit, RunError where a token is not finite
        """

        def compute(index: int, loaded: tuple[np.ndarray, np.ndarray]) -> list[Tensor]:
            """What `count_pixels` gives of every head's prediction."""
            predicted = self._predict(heads, *loaded, split.source.name(index))
            return [torch.from_numpy(count_pixels(loaded[1], each, split.num_classes)) for each in predicted]

        key, what = (list(heads), len(split)), f"{self.name}, {name} ({self.encoder.name})"
        load = partial(self.load, split)
        images = resumable_map(self.context, f"{self.name}_{name}", key, len(split), compute, what, load)
        return {
            key: Confusion(split.num_classes, [counts[head].numpy() for counts in images])
            for head, key in enumerate(heads)
        }

    def draw(self, head: nn.Module, split: Segmented) -> None:
        """Save examples: image, prediction by one head and truth."""
        for number, index in enumerate(self.context.example_indices(len(split))):
            pixels, mask = self.load(split, index)
            (predicted,) = self._predict({"": head}, pixels, mask, split.source.name(index))
            maps = [widened(coloured(each, split.num_classes)) for each in (predicted, mask)]
            panels = [widened(as_rgb(pixels), Image.Resampling.BICUBIC), *maps]
            self.context.save_example(strip(panels, ("image", "prediction", "truth")), self.name, number)

    def load(self, split: Segmented, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image scaled for the sliding window, (h, w, C), and its mask at its own size, (H, W) uint8."""
        image, mask = read_pair(split, index)
        height, width = fit_size(*size_of(image), self.size, LONGEST * self.size)
        return to_array(resized(image, height, width, "bilinear")), mask

    @torch.no_grad()
    def _predict(
        self, heads: Mapping[str, nn.Module], pixels: np.ndarray, mask: np.ndarray, name: str
    ) -> list[np.ndarray]:
        """Every head's classes (H, W) int64 of one image, over sliding windows."""
        windows, tokens = self.tokens(pixels, name)
        return [windows.argmax(head(tokens), *mask.shape) for head in heads.values()]

    def tokens(self, pixels: np.ndarray, name: str) -> tuple[Windows, Tensor]:
        """The windows over an image (h, w, C), and their patch tokens (windows, D, rows, columns).

        name    of the image
        raises  RunError where a token is not finite
        """
        windows = Windows(pixels.shape[0], pixels.shape[1], self.size, self.stride, self.encoder.patch_size)
        tokens = patch_grid(self.encoder, windows.cut(stack_images([pixels])[0]), self.batch_size)
        require_finite(tokens[None], [name], self.encoder)
        return windows, tokens


class LinearProbe(Segmenter):
    """Linear heads on one encoder, one for every pair of rate and weight decay: training, counts and examples."""

    def __init__(self, encoder: Encoder, settings: SegmentationOptions, context: Context) -> None:
        super().__init__(encoder, context, "segmentation", settings.size, settings.stride)
        self.settings = settings
        self.combinations = {
            f"lr {lr}, wd {decay}": (lr, decay) for lr in settings.lrs for decay in settings.weight_decays
        }

    def train(self, split: Segmented) -> tuple[dict[str, nn.Module], dict[str, float]]:
        """The trained heads {key: head} and their last losses, NaN for one that diverged.

        raises  UserError for images and masks that do not fit, RunError where all diverge or a token is not finite
        """
        settings, encoder, context = self.settings, self.encoder, self.context
        size, steps = settings.size, settings.steps
        fill = [round(255 * value) for value in encoder.preprocessing.mean]
        blank = torch.zeros(1, encoder.in_channels, size, size, dtype=torch.uint8)
        _, dim, rows, columns = patch_grid(encoder, blank, 1).shape
        if settings.batch_size * rows * columns < 2:
            raise UserError(
                f"segmentation.batch_size={settings.batch_size}: a crop of {size} pixels is one patch, "
                "and a batch norm needs two; expected at least 2"
            )
        heads: dict[str, nn.Module] = {}
        optimizers = {}
        for key, (lr, decay) in self.combinations.items():
            heads[key] = LinearHead(dim, split.num_classes, context.seed).to(encoder.device)
            optimizers[key] = torch.optim.AdamW(heads[key].parameters(), lr=lr, weight_decay=decay)

        def load(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            return training_crop(*read_pair(split, index), size, fill, rng)

        def losses(_step: int, batch: list[tuple[int, tuple[np.ndarray, np.ndarray]]]) -> dict[str, Tensor]:
            indices, crops = zip(*batch)
            images = stack_images([pixels for pixels, _ in crops])
            labels = torch.from_numpy(np.stack([mask for _, mask in crops])).to(encoder.device).long()
            tokens = patch_grid(encoder, images, self.batch_size)
            require_finite(tokens, [split.source.name(index) for index in indices], encoder)
            return {key: pixel_loss(head(tokens), labels, encoder.patch_size) for key, head in heads.items()}

        batches = training_batches(load, len(split), settings.batch_size, steps, context)
        given: dict[str, Any] = {"schedule": linear, "warmup": warmup(settings), "shorter": "segmentation.steps"}
        return heads, train_heads(heads, optimizers, batches, losses, steps, context, "segmentation", **given)


class LinearHead(nn.Module):
    """Batch norm, then one logit per class and patch: (B, D, h, w) -> (B, K, h, w). Weights are drawn from `seed`."""

    def __init__(self, dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps of patch tokens (B, D, h, w) -> logits (B, K, h, w)."""
        return self.classify(self.norm(tokens))


def upsample(logits: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Logits on patches -> logits on pixels, bilinear; the padding of the images is cut off.

    logits   (B, K, h, w) on the patches of centrally padded images
    returns  (B, K, height, width) on the pixels of the images before padding
    """
    # As products of matrices, with gradients, two to three times as fast on a CPU as `interpolate`.
    vertical, horizontal = (torch.from_numpy(upsampling(side, patch_size)).to(logits) for side in (height, width))
    return vertical @ logits @ horizontal.mT


def pixel_loss(logits: Tensor, labels: Tensor, patch_size: int) -> Tensor:
    """Mean cross-entropy over all pixels of the batch that are not ignored; 0 when all are.

    logits   (B, K, h, w) on the patch grid of the padded crops
    labels   (B, H, W) int64 in [0, K), 255 where ignored
    returns  (), differentiable in logits
    """

    def summed(logits: Tensor, labels: Tensor) -> Tensor:
        full = upsample(logits, labels.shape[1], labels.shape[2], patch_size)
        return F.cross_entropy(full, labels, ignore_index=IGNORED, reduction="sum")

    # One image at a time, and in the backward pass again: full-size logits never exist for more than one image.
    losses = [checkpoint(summed, *each, use_reentrant=False) for each in zip(logits.split(1), labels.split(1))]
    return torch.stack(losses).sum() / (labels != IGNORED).sum().clamp(min=1)


def read_pair(split: Segmented, index: int) -> tuple[Picture, np.ndarray]:
    """An image and its mask (H, W) uint8; UserError when one is unreadable, sizes differ or a class is out of range."""
    image, (mask,) = read_with_truth(split, index)
    wrong = mask[(mask != IGNORED) & (mask >= split.num_classes)]
    if wrong.size:
        expected = f"expected 0..{split.num_classes - 1} or {IGNORED}"
        raise UserError(f"{split.source.name(index)}: its mask has class {wrong[0]}, {expected}")
    return image, mask.astype(np.uint8, copy=False)


def training_crop(
    image: Picture, mask: np.ndarray, size: int, fill: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random scale, crop, flip and distortion of colours.

    mask     (H, W) uint8 of the image's size
    size     side of the crop in pixels
    fill     colour, 0..255 for each channel, of pixels beyond the image; the mask's are 255
    returns  (size, size, C) uint8, or float32 in 0..255; (size, size) uint8
    """
    ratio = rng.uniform(*SCALES)
    height, width = fit_size(*size_of(image), max(int(size * ratio), 1), max(int(LONGEST * size * ratio), 1))
    pixels = to_array(resized(image, height, width, "bilinear"))
    labels = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    top, left = crop_origin(labels, size, rng)
    pixels, labels = pixels[top : top + size, left : left + size], labels[top : top + size, left : left + size]
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return pad_to(photometric_distortion(pixels, rng), size, fill), pad_to(labels, size, IGNORED)


def crop_origin(
    mask: np.ndarray, size: int, rng: np.random.Generator, most: float = MOST_OF_ONE_CLASS
) -> tuple[int, int]:
    """Top and left in pixels of a random crop of at most (size, size) pixels.

    mask  (height, width) classes: a crop counts as good when two classes occur and none takes the share `most` or more
          of the pixels that are not ignored; after CROP_TRIES the last one is taken
    """
    height, width = mask.shape
    top = left = 0
    for _ in range(CROP_TRIES):
        top = int(rng.integers(0, max(height - size, 0) + 1))
        left = int(rng.integers(0, max(width - size, 0) + 1))
        part = mask[top : top + size, left : left + size]
        counts = np.bincount(part[part != IGNORED].ravel())
        if np.count_nonzero(counts) > 1 and counts.max() < most * counts.sum():
            break
    return top, left


def pad_to(array: np.ndarray, size: int, value: int | Sequence[int]) -> np.ndarray:
    """An array padded to (size, size) to the right and below.

    array  (H, W) or (H, W, C), H and W at most `size` pixels
    value  of the padding: one number, or one for each channel
    """
    padded = np.empty((size, size, *array.shape[2:]), dtype=array.dtype)
    padded[:] = value
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """SSD's distortion of colours (Liu et al., arXiv 1512.02325): each part with probability one half.

    Brightness ±32 of 255, contrast and saturation x 0.5 to 1.5, hue ±36 degrees; contrast before or after the other
    two. Saturation and hue are left out where there are not three channels.

    image    (H, W, C) uint8, or float32 in 0..255
    returns  the same
    """
    x = image.astype(np.float32)
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    shift, gain = np.float32(rng.uniform(-32, 32)), np.float32(rng.uniform(0.5, 1.5))
    colour, turn = rng.uniform(0.5, 1.5), rng.uniform(-36, 36)
    if brightness:
        x = np.clip(x + shift, 0, 255)
    if contrast and contrast_first:
        x = np.clip(x * gain, 0, 255)
    colourful = image.shape[2] == 3
    if saturation and colourful:
        x = scale_saturation(x, colour)
    if hue and colourful:
        x = turn_hue(x, turn)
    if contrast and not contrast_first:
        x = np.clip(x * gain, 0, 255)
    return (x + 0.5).astype(np.uint8) if image.dtype == np.uint8 else x


def scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """An image with HSV's saturation times `factor`, at most 1.

    image    (H, W, 3) float32 in [0, 255]
    returns  the same
    """
    value = image.max(axis=2, keepdims=True)
    reach = value - image.min(axis=2, keepdims=True)  # saturation is reach / value
    limit = np.divide(value, reach, out=np.ones_like(value), where=reach > 0)
    return np.clip(value - (value - image) * np.minimum(np.float32(factor), limit), 0, 255)


def turn_hue(image: np.ndarray, degrees: float) -> np.ndarray:
    """An image with HSV's hue turned by `degrees`; saturation and value stay.

    image    (H, W, 3) float32 in [0, 255]
    returns  the same
    """
    from torchvision.transforms.v2.functional import adjust_hue  # slow to import, with all its models

    pixels = torch.from_numpy(image / 255).permute(2, 0, 1)
    return 255 * adjust_hue(pixels, degrees / 360).permute(1, 2, 0).numpy()
