"""Pictures for evaluation: read, resized, cropped without chance, handed to an encoder, shown to a person.

Images of benchmarks are decoded and resized through Pillow, as the published numbers were and as torchvision's
transforms do: the file is believed by its content, `.convert("RGB")` always, EXIF orientation not applied, bicubic with
antialiasing. One's own images are the tensors that training, `embed` and `view` have: any number of channels, floats
where the file has more than eight bits, and the same resize.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoreg.data.center_crop import Interpolation, center_crop
from dinoreg.data.decode import BadImage, pillow_rgb
from dinoreg.data.display import as_rgb
from dinoreg.data.source import Source
from dinoreg.evaluation.data import Split
from dinoreg.runtime.errors import UserError, reworded

# Pillow's image in RGB or L, or (C, H, W) uint8 or float32 on the scale of bytes, 0 to 255.
Picture = Image.Image | Tensor
UNREADABLE = (BadImage, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
MAX_ASPECT = 8  # of a picture that is resized whole; of a longer one only what its centre crop needs


def read_picture(source: Source, index: int) -> Picture:
    """Image `index` with the channels that the encoder takes (`Source.in_channels`); UserError when it cannot be read.

    Of one's own data (`Source.as_trained`) the pixels that training has, as a tensor; of a benchmark Pillow's RGB, or
    its grey for an encoder of one channel.
    """
    with reworded(f"{source.name(index)}: cannot be read as an image", *UNREADABLE):
        if source.as_trained:
            return source.decode(index, source.in_channels)
        data = source.read(index)
        rgb = pillow_rgb(data) if isinstance(data, bytes) else Image.fromarray(np.asarray(data)).convert("RGB")
        return rgb.convert("L") if source.in_channels == 1 else rgb


def read_with_truth(split: Split, index: int) -> tuple[Picture, list[np.ndarray]]:
    """Image `index` of a split, and what lies over its pixels, in the order and the shapes of `PIXELS`.

    raises  UserError when one cannot be read or sizes differ
    """
    picture = read_picture(split.source, split.image(index))
    height, width = size_of(picture)
    truths = [getattr(split, name)(index) for name, _, _ in split.PIXELS]
    for (_, what, numbers), each in zip(split.PIXELS, truths):
        if each.shape != ((height, width) if numbers == 1 else (height, width, numbers)):
            sizes = f"its {what} is {' x '.join(map(str, each.shape))} pixels, the image {height} x {width}"
            raise UserError(f"{split.source.name(split.image(index))}: {sizes}")
    return picture, truths


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width) in pixels."""
    width, height = picture.size if isinstance(picture, Image.Image) else (picture.shape[2], picture.shape[1])
    return height, width


def resized(picture: Picture, height: int, width: int, how: Interpolation = "bicubic") -> Picture:
    """A picture at another size in pixels, antialiased; itself where it has that size."""
    if size_of(picture) == (height, width):
        return picture
    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling[how.upper()])
    scaled = F.interpolate(picture[None], (height, width), mode=how, antialias=True)[0]
    return scaled.clamp_(0, 255)  # a bicubic filter overshoots; bytes cannot


def cropped(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """A part of a picture, in pixels."""
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    return picture[:, top : top + height, left : left + width]


def to_array(picture: Picture) -> np.ndarray:
    """(h, w, C) uint8, or float32 in 0..255, read only where it is Pillow's."""
    if isinstance(picture, Tensor):
        return picture.permute(1, 2, 0).contiguous().numpy()
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[:, :, None]


def shown(picture: Picture) -> Image.Image:
    """A picture as a person can look at it, RGB; see `as_rgb` for other than three channels."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    return Image.fromarray(np.ascontiguousarray(as_rgb(to_array(picture))))


@dataclass(frozen=True)
class CentreCrop:
    """Short side to `resize` pixels, then the (size, size) centre: torchvision's Resize and CenterCrop for Pillow's.

    resize, size   pixels
    interpolation  of one's own pictures, which are tensors; Pillow's are resized bicubic
    """

    resize: int
    size: int
    interpolation: Interpolation = "bicubic"

    def __call__(self, picture: Picture) -> np.ndarray:
        """(size, size, C) uint8, or float32 in 0..255; memory is bounded whatever the picture's shape."""
        if isinstance(picture, Tensor):
            return to_array(center_crop(picture, self.size, self.resize, interpolation=self.interpolation))
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            return to_array(self._of_a_strip(picture))
        width, height = (int(self.resize * side / min(picture.size)) for side in picture.size)
        return to_array(self._centre_of(picture.resize((width, height), Image.Resampling.BICUBIC)))

    def _of_a_strip(self, image: Image.Image) -> Image.Image:
        """The same of a very long image, which is cut before it is resized: whole it could take many gigabytes.

        It is cut where the grids before and after meet, if that is near: Pillow takes places in single precision, and
        elsewhere one pixel of some hundreds differs by one level.
        """
        short = min(image.size)
        parts, sides, wanted = [], [], []
        for length in image.size:
            scaled = int(self.resize * length / short)  # pixels of this side, as torchvision rounds it
            kept = min(scaled, self.size)
            start = round((scaled - kept) / 2)
            step = scaled // math.gcd(scaled, length)
            step = step if step <= MAX_ASPECT * self.resize else 1
            first, last = start // step * step, -(-(start + kept) // step) * step
            parts.append((first * length / scaled, last * length / scaled))
            sides.append(last - first)
            wanted.append((start - first, start - first + kept))
        # Pillow's filter reads beyond the part, so that its pixels are those of the whole image resized.
        reach = 4 * math.ceil(max(short / self.resize, 1))  # pixels of the filter to either side, and more
        left, top = (max(math.floor(low) - reach, 0) for low, _ in parts)
        right, bottom = (min(math.ceil(high) + reach, side) for (_, high), side in zip(parts, image.size))
        (x0, x1), (y0, y1) = parts
        box = (x0 - left, y0 - top, x1 - left, y1 - top)
        part = image.crop((left, top, right, bottom)).resize((sides[0], sides[1]), Image.Resampling.BICUBIC, box)
        (x0, x1), (y0, y1) = wanted
        return self._centre_of(part.crop((x0, y0, x1, y1)))

    def _centre_of(self, image: Image.Image) -> Image.Image:
        """Half of an odd rest to even, as torchvision."""
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """Images (h, w, C) of one size as an encoder takes them, channels last in memory.

    images   uint8, or float32 in 0..255
    returns  (b, C, h, w) uint8, or float32 in 0..1 where one of them is of floats
    """
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels if pixels.dtype == torch.uint8 else pixels.float() / 255
