"""The linear segmentation head, its loss on full-size labels, and the crops that it learns from (DINOv2 §7.4)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoreg.evaluation.data import IGNORED, Segmented
from dinoreg.evaluation.dense.windows import crop_origin, fit_size, pad_to, upsampling
from dinoreg.evaluation.features.images import Picture, read_picture, resized, size_of, to_array
from dinoreg.runtime.errors import UserError

SCALES = (0.5, 2.0)  # of training images, times the short side
LONGEST = 4  # long side at most, in short sides
MOST_OF_ONE_CLASS = 0.75  # of a training crop
INIT_STD = 0.01  # of the convolution's weights


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
    image, mask, name = read_picture(split.source, index), split.mask(index), split.source.name(index)
    height, width = size_of(image)
    if mask.shape != (height, width):
        raise UserError(f"{name}: its mask is {' x '.join(map(str, mask.shape))} pixels, the image {height} x {width}")
    wrong = mask[(mask != IGNORED) & (mask >= split.num_classes)]
    if wrong.size:
        raise UserError(f"{name}: its mask has class {wrong[0]}, expected 0..{split.num_classes - 1} or {IGNORED}")
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
    top, left = crop_origin(height, width, size, rng, labels, MOST_OF_ONE_CLASS)
    pixels, labels = pixels[top : top + size, left : left + size], labels[top : top + size, left : left + size]
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return pad_to(photometric_distortion(pixels, rng), size, fill), pad_to(labels, size, IGNORED)


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


def distortion(in_channels: int) -> str:
    """What `photometric_distortion` does to pictures of so many channels, in words."""
    kept = "" if in_channels == 3 else f" (no saturation and hue, which need 3 channels: there are {in_channels})"
    return f"photometric distortion{kept}"


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
