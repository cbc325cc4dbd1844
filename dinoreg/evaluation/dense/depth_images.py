"""Pictures with their depth maps: read, cropped and augmented for training, shown as examples.
The augmentations are those of the NYU recipe behind DINOv2's: a border cut off, rotation by up to 2.5 degrees, flip,
random crop of 416 x 544, gamma, brightness and colour.
"""

import numpy as np
from PIL import Image

from dinoreg.evaluation.data import DepthMaps
from dinoreg.evaluation.dense.pictures import strip, widened
from dinoreg.evaluation.dense.windows import fit_size
from dinoreg.evaluation.features import images
from dinoreg.evaluation.features.images import Picture, read_picture, read_with_truth, resized, shown, size_of, to_array
from dinoreg.evaluation.metrics.depth import Crop, scaled_crop

CROP = (416, 544)  # height, width of training crops
ROTATION = 2.5  # degrees at most, either way
GAMMA, BRIGHTNESS, COLOUR = (0.9, 1.1), (0.75, 1.25), (0.9, 1.1)
PROBABILITY = 0.5  # of rotation, of the flip and of the change of colours
SIZES_READ = 64  # training images whose sizes decide the crop


def read_pair(split: DepthMaps, index: int) -> tuple[Picture, np.ndarray]:
    """An image and its depth (H, W) float32 metres, 0 where unknown.

    raises  UserError when their sizes differ or one cannot be read
    """
    image, (found,) = read_with_truth(split, index)
    depth = np.asarray(found, dtype=np.float32)
    return image, np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def seen_size(height: int, width: int, max_size: int, min_size: int = 1) -> tuple[int, int]:
    """Height and width in pixels, in proportion, with the short side at least `min_size` unless that would make the
    long side more than `max_size`."""
    return fit_size(height, width, max(min(height, width), min_size), max_size)


def as_seen(image: Picture, max_size: int, min_size: int = 1) -> Picture:
    """The image at its `seen_size`, bilinear; itself where it fits."""
    return resized(image, *seen_size(*size_of(image), max_size, min_size), "bilinear")


def crop_size(split: DepthMaps, border: Crop | None, max_size: int, min_size: int = 1) -> tuple[int, int]:
    """Height and width in pixels of training crops: 416 x 544, or in proportion less where images are smaller.

    The smallest of up to SIZES_READ images, evenly spaced, decides; an image that is smaller still is padded.

    border    the part of each image that crops are taken from; None: all of it
    max_size, min_size  pixels of the sides that images are brought to first, as `seen_size`
    raises    UserError for an image that cannot be read
    """
    smallest = [10**9, 10**9]
    for index in np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int)):
        height, width = seen_size(*size_of(read_picture(split.source, int(index))), max_size, min_size)
        if border is not None:
            rows, columns = scaled_crop(border, height, width)
            height, width = rows.stop - rows.start, columns.stop - columns.start
        smallest = [min(smallest[0], height), min(smallest[1], width)]
    scale = min(1.0, smallest[0] / CROP[0], smallest[1] / CROP[1])
    # The small addition keeps an exact fit from being rounded down.
    return max(int(CROP[0] * scale + 1e-6), 1), max(int(CROP[1] * scale + 1e-6), 1)


def training_crop(
    image: Picture, depth: np.ndarray, size: tuple[int, int], border: Crop | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One randomly augmented crop, and its depth.

    depth    (H, W) float32 metres, 0 where unknown; resized to the image if that was scaled
    size     (h, w) of the crop in pixels; what lies beyond the image is 0
    border   the part of the image that the crop is taken from; None: all of it
    returns  (h, w, C) float32 in [0, 1]; (h, w) float32 metres, 0 where unknown or padded
    """
    height, width = size_of(image)
    maps = Image.fromarray(depth).resize((width, height), Image.Resampling.NEAREST)
    if border is not None:
        rows, columns = scaled_crop(border, height, width)
        image = images.cropped(image, rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        maps = maps.crop((columns.start, rows.start, columns.stop, rows.stop))
    # Every number is drawn every time: what is done to an image depends on the step alone.
    rotates, flips, colours = rng.random(3) < PROBABILITY
    angle, down, right = rng.uniform(-ROTATION, ROTATION), rng.random(), rng.random()
    gamma, brightness, colour = (
        rng.uniform(*GAMMA),
        rng.uniform(*BRIGHTNESS),
        rng.uniform(*COLOUR, size=to_array(image).shape[2]),
    )
    if rotates:
        from torchvision.transforms.v2 import InterpolationMode, functional  # slow to import, with all its models

        image = functional.rotate(image, angle, InterpolationMode.BILINEAR)
        maps = maps.rotate(angle, Image.Resampling.NEAREST)  # a mean of two depths lies on neither surface
    pixels, metres = to_array(image), np.asarray(maps)
    if flips:
        pixels, metres = pixels[:, ::-1], metres[:, ::-1]
    height, width = metres.shape
    top, left = int(down * (max(height - size[0], 0) + 1)), int(right * (max(width - size[1], 0) + 1))
    part = (slice(top, top + size[0]), slice(left, left + size[1]))
    pixels, metres = pixels[part].astype(np.float32) / 255, metres[part]
    if colours:
        pixels = np.clip(pixels**gamma * brightness * colour, 0, 1).astype(np.float32)
    fill = ((0, size[0] - metres.shape[0]), (0, size[1] - metres.shape[1]))
    return np.pad(pixels, (*fill, (0, 0))), np.pad(metres, fill)


def example(image: Picture, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray, text: str) -> Image.Image:
    """Image | prediction | truth, near dark and far bright on one scale, black where the truth is unknown.

    predicted, true  (H, W) metres
    valid            (H, W) bool: the pixels whose 1st and 99th percentile span the scale, so that a stray one does not
    text             behind "prediction" in the caption
    """
    from matplotlib import colormaps

    low, high = np.percentile(true[valid], (1, 99)).tolist() if valid.any() else (0.0, 1.0)
    colours = colormaps["viridis"]

    def painted(depth: np.ndarray) -> np.ndarray:
        return (255 * colours((depth - low) / max(high - low, 1e-6))[..., :3]).astype(np.uint8)

    truth = painted(true)
    truth[true <= 0] = 0
    # Small pictures are enlarged too, such as 64 pixels, which show nothing at their own size.
    captions = ("image", f"prediction, {text}", f"truth, {low:.1f} (dark) to {high:.1f} m")
    return strip([widened(each) for each in (shown(image), painted(predicted), truth)], captions)
