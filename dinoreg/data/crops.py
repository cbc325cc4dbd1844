"""Crop geometry: where the crops of an image lie, and cutting them out as uint8 (multi-crop, arXiv 2006.09882).

The boxes follow RandomResizedCrop: an area and an aspect ratio per try, ten tries, then the largest central
box of an allowed ratio. Boxes are known before an image is decoded, so that a JPEG can be decoded at a
reduced scale.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.config.view_settings import CropSettings

TRIES = 10
NUMBERS_PER_VIEW = TRIES * 4  # uniform numbers that the geometry of one view takes


def relative_boxes(numbers: np.ndarray, settings: CropSettings) -> np.ndarray:
    """Boxes that do not know their image yet.

    numbers  (B, V, NUMBERS_PER_VIEW) uniform in [0, 1); views 0 and 1 are the global crops
    returns  (B, V, TRIES, 4) height and width as shares of the square root of the image's area, then the
             uniform numbers that place the box from top and left
    """
    numbers = numbers.reshape(*numbers.shape[:2], TRIES, 4)
    scales = np.array([settings.global_scale] * 2 + [settings.local_scale] * settings.num_local)  # (V, 2)
    area = scales[:, :1] + (scales[:, 1:] - scales[:, :1]) * numbers[..., 0]
    low, high = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    root_ratio = np.exp(0.5 * (low + (high - low) * numbers[..., 1]))
    root_area = np.sqrt(area)
    return np.stack([root_area / root_ratio, root_area * root_ratio, numbers[..., 2], numbers[..., 3]], axis=-1)


def place_boxes(
    relative: np.ndarray, height: int, width: int, ratio: tuple[float, float]
) -> list[tuple[int, int, int, int]]:
    """The boxes (top, left, height, width) in pixels of an image; every box has at least one pixel.

    relative  (V, TRIES, 4) one image's part of `relative_boxes`
    """
    side = math.sqrt(height * width)
    boxes = []
    for tries in relative.tolist():
        for relative_height, relative_width, top, left in tries:
            box_height, box_width = round(side * relative_height), round(side * relative_width)
            if 0 < box_height <= height and 0 < box_width <= width:
                top, left = int(top * (height - box_height + 1)), int(left * (width - box_width + 1))
                boxes.append((top, left, box_height, box_width))
                break
        else:
            boxes.append(_central_box(height, width, ratio))
    return boxes


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def places(boxes: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Where the local crops of images lie in their global crops, as both are seen.

    boxes    (B, V, 4) top, left, height and width of every view, the two global ones first
    turns    (B, V, 2, 2) how the crops are mirrored and turned, see `augment.orientations`
    returns  (2, L, B, 2, 3) float32: affine maps of places (x, y, 1) in a local crop to places (x, y) in a global one,
             both -1 .. 1 from edge to edge, as `F.affine_grid` takes them
    """
    half = boxes[..., [3, 2]] / 2  # (B, V, 2), x before y from here on
    centre = boxes[..., [1, 0]] + half
    to_image = half[:, 2:, :, None] * turns[:, 2:].swapaxes(-2, -1)  # a turn's inverse, then pixels from the centre
    to_global = turns[:, :2] / half[:, :2, None]  # (B, 2, 2, 2)
    linear = np.einsum("bgij,bljk->glbik", to_global, to_image)
    shift = np.einsum("bgij,bglj->glbi", to_global, centre[:, None, 2:] - centre[:, :2, None])
    return np.concatenate([linear, shift[..., None]], axis=-1).astype(np.float32)


def reduction_for(boxes: list[tuple[int, int, int, int]], sizes: list[int]) -> int:
    """The largest JPEG reduction (1, 2, 4 or 8) at which no box has fewer pixels a side than its crop."""
    slack = min(min(box[2], box[3]) / size for box, size in zip(boxes, sizes))
    return 8 if slack >= 8 else 4 if slack >= 4 else 2 if slack >= 2 else 1


def reduce_box(box: tuple[int, int, int, int], reduction: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The same box on the reduced image of `height` x `width` pixels, to the nearest pixel and inside it."""
    top, left = round(box[0] / reduction), round(box[1] / reduction)
    bottom = min(height, max(top + 1, round((box[0] + box[2]) / reduction)))
    right = min(width, max(left + 1, round((box[1] + box[3]) / reduction)))
    top, left = min(top, bottom - 1), min(left, right - 1)
    return top, left, bottom - top, right - left


def cut_crop(image: Tensor, box: tuple[int, int, int, int], out: Tensor) -> None:
    """Cut one box and resample it with an antialiased bicubic kernel, rounding to uint8 as Pillow does.

    image  (C, H, W) uint8 or float32 in 0..255; quickest when the channels lie innermost in memory, as a decoder
           leaves them
    out    (1, C, h, w) uint8, or float32 for data sets of more than eight bits; written in place; channels innermost
    """
    top, left, height, width = box
    source = image[None, :, top : top + height, left : left + width]
    if image.dtype != torch.uint8 or out.dtype != torch.uint8:
        pixels = F.interpolate(source.float(), out.shape[-2:], mode="bicubic", antialias=True).clamp_(0, 255)
        out.copy_(pixels if out.dtype != torch.uint8 else pixels.round_())
        return
    # The out= form writes into the batch buffer: allocating each crop costs as much as computing it.
    torch.ops.aten._upsample_bicubic2d_aa.out(source, out.shape[-2:], False, None, None, out=out)
