"""What is done with a picture before a model sees it: decoded, its short side resized, its centre cropped, normalised.

The values belong to weights. They stand under "preprocessing" in the JSON beside a teacher file and in `model.json` of
every export, and in the configs of other libraries. `embed`, `view`, `registers`, evaluations of one's own pictures,
`dinoreg.transform` and the certificate of an export do what is stated there.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.config.schema import is_value_range
from dinoreg.config.view_settings import MAX_SIDE
from dinoreg.data.center_crop import INTERPOLATIONS, Interpolation, center_crop, to_encoder
from dinoreg.data.decode import BadImage, decode
from dinoreg.data.value_range import ValueRange
from dinoreg.models.vit import RegisterViT, as_pair
from dinoreg.runtime.device import per_channel
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.json_files import as_sides, is_number
from dinoreg.runtime.regular_files import read_regular

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PUBLISHED_SIZE = 224  # pixels; the side at which classification is published

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to a model's input; called with a picture, it does all of it.

    mean, std      one number per channel, on the scale of [0, 1]
    size           (height, width) of the centre crop in pixels
    short_side     pixels of a picture's short side before the crop, see `center_crop`
    interpolation  "bicubic" | "bilinear"; always antialiased
    value_range    of data with more than eight bits; None: what the type of a file says
    assumed        whether mean or std are not stated: ImageNet's for three channels, else 0.5 and 0.25
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    short_side: int
    interpolation: Interpolation = "bicubic"
    value_range: ValueRange | None = None
    assumed: bool = field(default=False, compare=False)

    @classmethod
    def of(
        cls, stated: Any, channels: int, image_size: tuple[int, int], patch_size: int, where: object
    ) -> "Preprocessing":
        """What weights state, checked, and a default for what they leave out.

        stated      from JSON: {"mean", "std", "image_size", "short_side", "interpolation", "range"}, or anything
        image_size  (height, width) that the model is native to; its crop, up to 224 pixels, where none is stated
        where       path of the weights, for messages
        raises      UserError for numbers that do not fit the channels, for std <= 0, and for what is no range
        """
        stated = stated if isinstance(stated, Mapping) else {}
        default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.25,))
        mean, std = (
            _per_channel(stated.get(key) or value, channels, key, where) for key, value in zip(("mean", "std"), default)
        )
        size = as_sides(stated.get("image_size"))
        if size is None or any(side % patch_size or side > MAX_SIDE for side in size):
            published = min(PUBLISHED_SIZE, *image_size) // patch_size * patch_size
            size = image_size if max(image_size) <= PUBLISHED_SIZE else (published or patch_size,) * 2
        short, how = stated.get("short_side"), stated.get("interpolation")
        return cls(
            mean,
            std,
            size,
            short if type(short) is int and min(size) <= short <= MAX_SIDE else min(size),
            how if how in INTERPOLATIONS else "bicubic",
            _range(stated.get("range"), where),
            assumed=not (stated.get("mean") and stated.get("std")),
        )

    @classmethod
    def of_model(cls, model: RegisterViT, where: object = "of the model") -> "Preprocessing":
        """What the weights state that a model was loaded from."""
        return cls.of(model.preprocessing, model.in_channels, model.image_size, model.patch_size, where)

    def as_json(self) -> dict[str, Any]:
        """As it stands in `model.json`."""
        limits = self.value_range
        return {
            "channels": len(self.mean),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": self.size[0] if self.size[0] == self.size[1] else list(self.size),
            "short_side": self.short_side,
            "interpolation": self.interpolation,
            "antialias": True,
            "range": None if limits is None else [value for pair in zip(*limits) for value in pair],
        }

    def at(self, size: int | Sequence[int] | None) -> "Preprocessing":
        """The same for crops of another size in pixels; as much of a picture's short side is seen. None: the same."""
        if size is None:
            return self
        pair = as_pair(size, "size")
        return replace(self, size=pair, short_side=round(self.short_side * min(pair) / min(self.size)))

    def crop(self, pixels: Tensor) -> Tensor:
        """The part of a decoded picture (C, H, W), uint8 or float32 in 0..255, that is seen: the same, of `size`."""
        return center_crop(pixels, self.size, self.short_side, interpolation=self.interpolation)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float in [0, 1], minus the mean, over the standard deviation: float32."""
        unit = to_unit(images)
        return (unit - per_channel(self.mean, unit.device)) / per_channel(self.std, unit.device)

    def __call__(self, picture: Picture) -> Tensor:
        """A picture as the model takes it: (C, height, width) float32, normalised.

        picture  a path, the bytes of a file, a Pillow image, or an array (H, W) or (H, W, C) of any real type
        raises   UserError for what cannot be read, and for channels that the model does not have
        """
        name = picture if isinstance(picture, str | os.PathLike) else type(picture).__name__
        with reworded(f"{name}: cannot be read as an image", BadImage, OSError):
            data = read_regular(picture) if isinstance(picture, str | os.PathLike) else picture
            pixels = decode(data, len(self.mean), value_range=self.value_range)
        return self.normalise(to_encoder([self.crop(pixels)]))[0]


def to_unit(images: Tensor) -> Tensor:
    """Pixels, uint8 or float in [0, 1], as float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _range(values: Any, where: object) -> ValueRange | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(map(is_number, values)) or not is_value_range(values):
        raise UserError(f"weights {where}: range={values!r}: expected LOW,HIGH with LOW below HIGH")
    return ValueRange.of(list(map(float, values)))


def _per_channel(values: Any, channels: int, key: str, where: object) -> tuple[float, ...]:
    fits = isinstance(values, (list, tuple)) and len(values) in (1, channels)
    if not fits or not all(map(is_number, values)):
        raise UserError(
            f"weights {where}: {key}={values!r}: expected one number or one for each of {channels} channels"
        )
    if key == "std" and min(values) <= 0:
        raise UserError(f"weights {where}: std={values!r}: expected positive numbers")
    return tuple(map(float, values)) * (channels // len(values))
