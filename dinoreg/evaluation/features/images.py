"""Pixels for evaluation, resized and cropped without chance.

Images of benchmarks are decoded and resized through Pillow, as the published numbers were and as torchvision's
transforms do: the file is believed by its content, `.convert("RGB")` always, EXIF orientation not applied, bicubic with
antialiasing. One's own images have the pixels of training.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from dinoreg.data.decode import BadImage
from dinoreg.data.source import Source
from dinoreg.runtime.environment import usable_cores
from dinoreg.runtime.errors import UserError, one_line

T = TypeVar("T")


def read_rgb(source: Source, index: int) -> Image.Image:
    """Image `index` as RGB; UserError naming it when it cannot be read.

    Of one's own data (`Source.as_trained`) the pixels that training has, to the nearest byte.
    """
    try:
        if source.as_trained:
            pixels = source.decode(index)
            return Image.fromarray(pixels.round().byte().permute(1, 2, 0).contiguous().numpy())
        data = source.read(index)
        if isinstance(data, np.ndarray):
            return Image.fromarray(data).convert("RGB")
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (BadImage, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{source.name(index)}: cannot be read as an image ({one_line(error, 200)})") from None


@dataclass(frozen=True)
class CentreCrop:
    """Short side to `resize` pixels (bicubic), then the (size, size) centre: torchvision's Resize and CenterCrop.

    resize, size  pixels
    """

    resize: int
    size: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) uint8."""
        scaled = functional.resize(image, [self.resize], InterpolationMode.BICUBIC)
        return np.asarray(functional.center_crop(scaled, [self.size]))


def parallel(function: Callable[[int], T], indices: Iterable[int], workers: int) -> Iterator[T]:
    """function(index) for each index in order, computed ahead in `workers` threads; 0: in the calling one.

    What the function raises is raised when its turn comes, and what was not begun is cancelled.
    """
    if workers <= 0:
        yield from map(function, indices)
        return
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for index in indices:
                ahead.append(pool.submit(function, index))
                if len(ahead) >= 4 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """Images (h, w, 3) of one size -> (b, 3, h, w) of their type, channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def default_workers() -> int:
    """Decoding threads: one for every core but one, at most 16."""
    return min(max(usable_cores() - 1, 1), 16)
