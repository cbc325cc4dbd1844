"""The part of a picture that a model sees: the short side resized, the centre cropped, nothing random.

One rule for everything that takes still pictures, so that a model sees a file in one way only:

| consumer                              | short side     | half of an odd rest | resized by              |
| ------------------------------------- | -------------- | ------------------- | ----------------------- |
| embed, view, registers, online probe  | as weights say | down                | `center_crop`           |
| transformers' image processor         | as weights say | down                | torch, the same bytes   |
| timm's transform                      | as weights say | to even             | Pillow, within 2 levels |
| eval, published k-NN and linear       | 256/224 x crop | to even             | Pillow, within 2 levels |
| eval of one's own pictures            | as weights say | down                | `center_crop`           |

Resizing is bicubic, or bilinear where weights say so, with antialiasing, on bytes where the picture has bytes, and
rounds the long side down. Where what is over leaves 3 when divided by 4, crops of the two "to even" begin one pixel
later than the others: the libraries differ and cannot be told otherwise, and transformers' way is ours. What weights
say of the short side is the crop's own side unless they came with another (`preprocess`).
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.data.value_range import BadImage

MAX_ASPECT = 8  # of a resized picture over its crop, in either direction; above, only the crop is computed
ANTIALIASED_SLOPE = -0.5  # of the cubic kernel in PyTorch's antialiased resampling, as in Pillow's

Interpolation = Literal["bicubic", "bilinear"]
INTERPOLATIONS = ("bicubic", "bilinear")


def center_crop(
    image: Tensor, size: int | tuple[int, int], short_side: int | None = None, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Resize a picture until it covers `short_side` (antialiased), then crop its centre to `size`.

    The memory taken is bounded by picture and crop: of a picture that is much longer than the crop, only the crop is
    resized. That differs from the crop of the whole by rounding alone.

    image       (C, H, W) uint8, or float32 in 0..255
    size        (height, width) of the crop in pixels, or one for both
    short_side  pixels, of a square crop at least its side; None: that of the crop. A crop that is not square is covered
                by the resized picture, with the same factor to spare
    returns     (C, height, width) of the same type
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape = resized_shape((image.shape[1], image.shape[2]), (height, width), short_side)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    if shape == tuple(image.shape[1:]):
        return image[:, top : top + height, left : left + width]
    if shape[0] > MAX_ASPECT * height or shape[1] > MAX_ASPECT * width:
        return _resize_window(image, shape, (top, left), (height, width), interpolation)
    resized = F.interpolate(image[None], size=shape, mode=interpolation, antialias=True)[0].clamp_(0, 255)
    return resized[:, top : top + height, left : left + width]


def resized_shape(shape: tuple[int, int], size: tuple[int, int], short_side: int | None = None) -> tuple[int, int]:
    """Height and width in pixels that a picture of `shape` is resized to before it is cropped, see `center_crop`.

    A square crop has the short side exactly, and the long side rounded down.
    """
    (rows, columns), (height, width) = shape, size
    side = min(size) if short_side is None else short_side
    if height == width:
        short = min(shape)
        return side * rows // short, side * columns // short
    spare = side / min(size)
    scale = max(height * spare / rows, width * spare / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def _resize_window(
    image: Tensor, shape: tuple[int, int], start: tuple[int, int], size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """What the picture resized to `shape` shows from `start` on, computed from the pixels below that window alone.

    image   (C, H, W) uint8 or float32; columns first, then rows, each rounded to bytes for uint8, as PyTorch does
    start   (top, left) in the resized picture; size is (height, width)
    """
    rows, columns = (
        _taps(image.shape[1 + axis], shape[axis], start[axis], size[axis], interpolation) for axis in (0, 1)
    )
    block = image[:, rows[0] : rows[0] + rows[1].shape[1], columns[0] : columns[0] + columns[1].shape[1]].float()
    for axis, weights in ((2, columns[1]), (1, rows[1])):
        block = torch.tensordot(block, weights, dims=([axis], [1])).movedim(-1, axis)
        if image.dtype == torch.uint8:
            block = block.clamp_(0, 255).round_()
    return block.clamp_(0, 255).to(image.dtype)


def _taps(length: int, resized: int, start: int, count: int, interpolation: Interpolation) -> tuple[int, Tensor]:
    """The first sample below a window of one axis, and the weights (count, samples) float32 of the samples from there.

    length   samples of the axis, which is resampled to `resized`; the window is `count` of these from `start` on
    """
    scale = length / resized
    widen = max(scale, 1.0)  # of the kernel, which reaches over two samples of the coarser of both grids
    centers = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale
    first = max(int(centers[0] - 2 * widen), 0)
    last = min(int(centers[-1] + 2 * widen) + 1, length)
    distance = (torch.arange(first, last, dtype=torch.float64) + 0.5 - centers[:, None]) / widen
    bicubic = interpolation == "bicubic"
    weights = cubic_kernel(distance.abs(), ANTIALIASED_SLOPE) if bicubic else (1 - distance.abs()).clamp(min=0)
    return first, (weights / weights.sum(dim=1, keepdim=True)).float()


def cubic_kernel(x: Tensor, slope: float) -> Tensor:
    """Keys' kernel at distances x >= 0: one at 0, zero at 1, at 2 and beyond."""
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = slope * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def center_crops(source: Source, indices: Iterable[int], size: int, in_channels: int = 3) -> tuple[Tensor, list[int]]:
    """Centre crops of some images of a source; unreadable ones are left out.

    returns (n, C, size, size) uint8, or float32 in 0..255 where one of them has more than eight bits, and the n indices
            that could be read
    """
    images, readable = [], []
    for index in indices:
        try:
            images.append(center_crop(source.decode(index, in_channels), size))
        except (BadImage, OSError):
            continue
        readable.append(index)
    if not images:
        return torch.empty(0, in_channels, size, size, dtype=torch.uint8), []
    return stack_pixels(images), readable


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Images (C, H, W) of one size side by side: (n, C, H, W) uint8, or float32 in 0..255 where one is of floats."""
    deep = any(image.dtype != torch.uint8 for image in images)
    return torch.stack([image.float() if deep else image for image in images])


def to_encoder(images: Sequence[Tensor]) -> Tensor:
    """The same as an encoder takes them: (n, C, H, W) uint8, or float32 in 0..1."""
    pixels = stack_pixels(images)
    return pixels if pixels.dtype == torch.uint8 else pixels / 255
