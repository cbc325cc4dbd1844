"""What the dense protocols share: padding to whole patches, sliding windows, and the batches that heads learn from.

Images are never assumed to have a common size. All that happens to logits between the patch grid and the pixels of the
answer (upsampling windows, averaging where they overlap, scaling to the original size) is linear, one matrix for rows
and one for columns: `Windows.rows_of` streams the answer in blocks of rows, whatever the image's size.
The geometry of windows is that of mmsegmentation, the toolbox which DINOv2 used.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.data.preprocess import to_unit
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.solvers.train_heads import generator
from dinoreg.runtime.device import per_channel
from dinoreg.runtime.parallel import parallel

T = TypeVar("T")
ORDER_STREAM, SAMPLE_STREAM = 1, 2  # of random numbers


def fit_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) in pixels, scaled to the largest with sides of at most `short` and `long`, keeping the ratio."""
    factor = min(short / min(height, width), long / max(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def centre_padding(length: int, multiple: int) -> tuple[int, int]:
    """Pixels to add before and after so that `length` becomes a multiple; an odd pixel goes after."""
    missing = -length % multiple
    return missing // 2, missing - missing // 2


def centre_pad(images: Tensor, multiple: int, value: Sequence[float] = (0.0,)) -> Tensor:
    """Images padded centrally to whole multiples.

    images   (B, C, H, W)
    value    of the padding: one for all channels, or one for each
    returns  (B, C, H', W')
    """
    top, bottom = centre_padding(images.shape[2], multiple)
    left, right = centre_padding(images.shape[3], multiple)
    return pad(images, (left, top, right, bottom), value)


def pad(images: Tensor, sides: tuple[int, int, int, int], value: Sequence[float]) -> Tensor:
    """Images (..., C, H, W) with `value`, one for all channels or each, to (left, top, right, bottom) of them."""
    left, top, right, bottom = sides
    height, width = images.shape[-2:]
    colour = per_channel(value, images.device, images.dtype)
    padded = colour.expand(*images.shape[:-2], top + height + bottom, left + width + right).clone()
    padded[..., top : top + height, left : left + width] = images
    return padded


def pad_to_patches(pixels: np.ndarray, patch_size: int, mean: Sequence[float]) -> Tensor:
    """An image padded at the bottom and right to multiples of the patch size, as a tensor.

    pixels   (h, w, C) uint8, or float32 in 0..255
    mean     colour of the padding, in [0, 1], which the encoder's normalisation turns into zeros
    returns  (C, H, W) float32 in [0, 1]
    """
    height, width = pixels.shape[:2]
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    return pad(image, (0, 0, -width % patch_size, -height % patch_size), mean)


def batches_of_one_shape(
    items: Iterable[T], batch_size: int, shape: Callable[[T], tuple[int, ...]]
) -> Iterator[list[T]]:
    """Batches of items of equal shape, since an image padded to its neighbours' size would have other tokens.

    Holds four batches at most; the order changes. The last batch of a shape may be smaller than `batch_size`.
    """
    waiting: dict[tuple[int, ...], list[T]] = {}
    count = 0
    for each in items:
        key = tuple(shape(each))
        waiting.setdefault(key, []).append(each)
        count += 1
        full = len(waiting[key]) == batch_size
        if full or count >= 4 * batch_size:
            batch = waiting.pop(key if full else max(waiting, key=lambda other: len(waiting[other])))
            count -= len(batch)
            yield batch
    yield from waiting.values()


def patch_grid(encoder: Encoder, images: Tensor, batch_size: int) -> Tensor:
    """Normalised patch tokens of the last block as a map, float32 on the encoder's device.

    images      (B, C, H, W) uint8, or float in [0, 1], of any size; padded centrally with the backbone's mean colour
                to whole patches
    batch_size  images that the backbone sees at once

    returns     (B, D, rows, columns)
    """
    maps = []
    for part in images.split(max(batch_size, 1)):
        padded = centre_pad(to_unit(part.to(encoder.device)), encoder.patch_size, encoder.preprocessing.mean)
        rows, columns = encoder.grid(*padded.shape[2:])
        maps.append(encoder.tokens(padded).patches.mT.unflatten(2, (rows, columns)))
    return torch.cat(maps)


def bilinear_matrix(out: int, length: int) -> np.ndarray:
    """(out, length) float64: the weights of bilinear resizing along one axis, with align_corners=False."""
    units = torch.eye(length, dtype=torch.float64)[:, None]
    return F.interpolate(units, size=out, mode="linear", align_corners=False)[:, 0].T.numpy()


def upsampling(length: int, patch_size: int) -> np.ndarray:
    """(length, patches) float64: bilinear, from the patches of a centrally padded axis to its own pixels."""
    before, after = centre_padding(length, patch_size)
    padded = before + length + after
    return bilinear_matrix(padded, padded // patch_size)[before : before + length]


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """First pixels of windows of `size` that are `stride` apart; the last one is moved back to end with the image."""
    count = max(length - size + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - size), 0) for index in range(count)]


@dataclass(frozen=True)
class Windows:
    """Equal windows over an image of (height, width) pixels, each padded centrally to whole patches.

    A window is `size` pixels high and wide, or as the image where that is less; windows are `stride` pixels apart.
    """

    height: int
    width: int
    size: int
    stride: int
    patch_size: int

    @property
    def tops(self) -> list[int]:
        """First rows of the windows, in pixels, ascending."""
        return window_starts(self.height, self.size, self.stride)

    @property
    def lefts(self) -> list[int]:
        """First columns of the windows, in pixels, ascending."""
        return window_starts(self.width, self.size, self.stride)

    def cut(self, image: Tensor) -> Tensor:
        """The windows of an image (C, H, W), row by row: (windows, C, h, w) of its type."""
        height, width = min(self.size, self.height), min(self.size, self.width)
        return torch.stack(
            [image[:, top : top + height, left : left + width] for top in self.tops for left in self.lefts]
        )

    def rows_of(self, maps: Tensor, height: int, width: int, elements: int = 1 << 24) -> Iterator[tuple[slice, Tensor]]:
        """The windows' maps, upsampled, averaged where they overlap and scaled to (height, width), in blocks of rows.

        maps           (windows, K, rows, columns) on the patch grids of the padded windows
        height, width  of the output in pixels
        elements       numbers in a block at most (but at least one row)
        yields         (which rows, (K, rows, width) of the type of `maps`)
        """
        down, across = len(self.tops), len(self.lefts)
        # (K, down h, across w)
        grid = maps.unflatten(0, (down, across)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        vertical = torch.from_numpy(self._axis(self.height, self.tops, height)).to(maps)
        horizontal = torch.from_numpy(self._axis(self.width, self.lefts, width)).to(maps)
        step = max(elements // (maps.shape[1] * width), 1)
        for start in range(0, height, step):
            block = slice(start, min(start + step, height))
            yield block, vertical[block] @ grid @ horizontal.mT

    def argmax(self, maps: Tensor, height: int, width: int, elements: int = 1 << 24) -> np.ndarray:
        """The index of the largest of K maps at each pixel: (height, width) int64. Arguments as for `rows_of`."""
        strongest = np.empty((height, width), dtype=np.int64)
        for rows, block in self.rows_of(maps, height, width, elements):
            strongest[rows] = block.argmax(dim=0).cpu().numpy()
        return strongest

    def _axis(self, length: int, starts: Sequence[int], out: int) -> np.ndarray:
        """(out, windows x patches): from the patch grids along one axis to the pixels of the answer."""
        size = min(self.size, length)
        upsample = upsampling(size, self.patch_size)
        covered = np.zeros(length)
        parts = np.zeros((len(starts), length, upsample.shape[1]))
        for part, start in zip(parts, starts):
            part[start : start + size] = upsample
            covered[start : start + size] += 1
        parts /= covered[:, None]
        # Windows form a grid, so that an average over windows is one over rows and one over columns.
        joined = np.concatenate(list(parts), axis=1)
        return joined if out == length else bilinear_matrix(out, length) @ joined


def shuffled(position: int, count: int, seed: int) -> int:
    """The image, below `count`, at a position of an endless stream: each once per pass, in another order every time."""
    return int(_order(position // count, count, seed)[position % count])


@lru_cache(maxsize=4)
def _order(turn: int, count: int, seed: int) -> np.ndarray:
    return generator(seed, turn, ORDER_STREAM).permutation(count)


def training_batches(
    load: Callable[[int, np.random.Generator], T], count: int, batch_size: int, steps: int, context: Context
) -> Callable[[int], Iterator[list[tuple[int, T]]]]:
    """The batches [(image, sample)] of a training from a step on, loaded ahead in threads until nobody asks any more.

    load     (image, rng) -> sample; all randomness comes from `rng`, which is a function of the seed and the position,
             so that a step has the same samples in a resumed training
    count    images, each of which comes once in every pass
    """

    def sample(position: int) -> tuple[int, T]:
        index = shuffled(position, count, context.seed)
        return index, load(index, generator(context.seed, position, SAMPLE_STREAM))

    def batches(first: int) -> Iterator[list[tuple[int, T]]]:
        samples = parallel(sample, range(first * batch_size, steps * batch_size), context.workers)
        while batch := list(islice(samples, batch_size)):
            yield batch

    return batches
