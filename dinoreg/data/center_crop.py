"""Images as an evaluation sees them: short side resized, centre cropped, nothing random."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.data.value_range import BadImage


def center_crop(image: Tensor, size: int) -> Tensor:
    """Resize the short side to `size` (antialiased bicubic) and crop the centre: torchvision's Resize and CenterCrop.

    image   (C, H, W) uint8, or float32 in 0..255
    returns (C, size, size) of the same type
    """
    height, width = image.shape[1:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    if shape != (height, width):
        image = F.interpolate(image[None], size=shape, mode="bicubic", antialias=True)[0].clamp_(0, 255)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return image[:, top : top + size, left : left + size]


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
