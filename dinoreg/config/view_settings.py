"""The options of crops, photometric augmentation and block masks, with DINOv2's defaults (its code)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CropSettings:
    """Geometry of the multi-crop views: two global crops and `num_local` local ones of every image."""

    global_size: int = 224  # pixels, height and width of a global crop; divisible by the patch size
    local_size: int = 98  # pixels, height and width of a local crop; divisible by the patch size
    num_local: int = 8  # local crops per image; 0 trains on the two global crops alone
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area that a global crop covers
    local_scale: tuple[float, float] = (0.05, 0.32)  # share of the image's area that a local crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the box before it is made square


@dataclass(frozen=True)
class AugmentSettings:
    """Colour, blur and normalisation of every crop. Probabilities are in 0..1 and drawn per crop."""

    hflip: float = 0.5  # probability of a left-right mirror
    vflip: float = 0.0  # probability of an up-down mirror; for images without an up (satellite, microscopy)
    jitter_probability: float = 0.8  # probability of the four colour changes below, in a random order
    brightness: float = 0.4  # factor drawn from 1 - x .. 1 + x
    contrast: float = 0.4  # factor drawn from 1 - x .. 1 + x
    saturation: float = 0.2  # factor drawn from 1 - x .. 1 + x
    hue: float = 0.1  # shift drawn from -x .. x, in turns of the colour circle; at most 0.5
    grayscale: float = 0.2  # probability of losing all colour
    blur_global1: float = 1.0  # probability of a Gaussian blur of the first global crop
    blur_global2: float = 0.1  # the same of the second global crop
    blur_local: float = 0.5  # the same of a local crop
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # standard deviation of the blur, in pixels
    blur_kernel: int = 9  # taps of the blur kernel, odd
    reference_blur: bool = False  # blur with 1 - p, as the reference implementation runs (0.0, 0.9, 0.5)
    solarize_global2: float = 0.2  # probability of inverting the bright pixels of the second global crop
    solarize_threshold: int = 128  # grey level (0..255) from which a pixel counts as bright
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per channel, of pixels in 0..1; one value serves all
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # per channel, of pixels in 0..1; one value serves all


@dataclass(frozen=True)
class MaskSettings:
    """Block masks that hide patches of the student's global crops."""

    probability: float = 0.5  # share of the global crops of a batch that are masked
    ratio: tuple[float, float] = (0.1, 0.5)  # share of a masked crop's patches, stratified over the batch
    min_patches: int = 4  # patches, the smallest block
    aspect: float = 0.3  # the most elongated block: height over width in aspect .. 1 / aspect
