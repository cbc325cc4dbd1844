"""Images with boxes as the box head takes them: resized, mirrored, padded to whole patches, with targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.dense.box_head import Targets, assign
from dinoreg.evaluation.dense.windows import fit_size, pad_to_patches
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.evaluation.options import DetectionOptions


class Prepared(NamedTuple):
    """An image as the backbone takes it.

    number   of the image in its split
    image    (3, H, W) float32 in [0, 1], padded to whole patches
    size     (height, width) after resizing and before padding
    scale    resized over original pixels, along x and along y
    targets  of its patches, where it is learnt from
    """

    number: int
    image: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]
    targets: Targets | None = None


def prepare(
    split: Boxed, index: int, encoder: Encoder, options: DetectionOptions, flip: bool | None = None
) -> Prepared:
    """An image of a split, resized and padded; with targets where `flip` says whether it is mirrored."""
    picture = read_rgb(split.source, index)
    height, width = fit_size(picture.height, picture.width, options.size, options.max_size)
    scale = (width / picture.width, height / picture.height)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    image = pad_to_patches(pixels[:, ::-1] if flip else pixels, encoder.patch_size, encoder.mean)
    prepared = Prepared(index, image, (height, width), scale)
    if flip is None:
        return prepared
    boxes = np.asarray(split.boxes[index], dtype=np.float32).reshape(-1, 4) * np.array([*scale, *scale], np.float32)
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    ignored = np.asarray(split.difficult[index], dtype=bool) | np.asarray(split.crowd[index], dtype=bool)
    grid = encoder.grid(image.shape[1], image.shape[2])
    targets = assign(grid, encoder.patch_size, height, width, boxes, split.labels[index], ignored)
    return prepared._replace(targets=targets)


def typical_reach(targets: Iterable[Targets]) -> float:
    """Patches from one in an object to the sides of its box, on average: where training starts. At least half one."""
    reach = torch.cat([each.reach[each.labels >= 0] for each in targets])
    return max(float(reach.mean()), 0.5) if len(reach) else 3.0
