"""Scores of depth maps, and the losses of the linear depth head (DINOv2 §7.4).
The scores are those of Eigen et al. (arXiv 1406.2283) as DINOv2 reports them: each over the valid pixels of one image,
then averaged over images. The losses are the scale-invariant and the multi-scale gradient loss, on logarithms of depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LOG_EPS = 1e-3  # metres, added before every logarithm of the losses
MEAN_WEIGHT = 0.15  # of the squared mean in the scale-invariant loss
OUTSIDE = 0.01  # share of depths beyond the limits, above which it is said
GRADIENT_STRIDES = (1, 2, 4, 6)  # pixels between those that the gradient loss looks at

# A crop is (top, bottom, left, right) in pixels of an image of the stated (height, width), ends exclusive.
Crop = tuple[tuple[int, int, int, int], tuple[int, int]]


def scaled_crop(crop: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a crop in an image of height x width pixels.

    For an image of another size than the crop is stated for the crop is scaled in proportion and rounded.
    """
    (top, bottom, left, right), (full_height, full_width) = crop
    rows = slice(round(top * height / full_height), round(bottom * height / full_height))
    columns = slice(round(left * width / full_width), round(right * width / full_width))
    return rows, columns


def valid_pixels(depth: np.ndarray, min_depth: float, max_depth: float, crop: Crop | None = None) -> np.ndarray:
    """(H, W) bool: min_depth < depth < max_depth, and inside the crop.

    depth                 (H, W) metres, 0 where unknown
    min_depth, max_depth  metres
    crop                  None: the whole image
    """
    valid = (depth > min_depth) & (depth < max_depth)
    if crop is not None:
        inside = np.zeros_like(valid)
        inside[scaled_crop(crop, *depth.shape)] = True
        valid &= inside
    return valid


def outside_limits(samples: Mapping[str, np.ndarray], low: float, high: float) -> list[str]:
    """Warnings on the splits of which more than a hundredth of the known depths is not between two limits.

    samples    {split: (n,) known depths in metres}
    low, high  metres
    """
    shares = {split: float(((depth <= low) | (depth >= high)).mean()) for split, depth in samples.items()}
    where = f"outside of {low:g} to {high:g} m (depth.min_depth, depth.max_depth)"
    return [
        f"unused truth: {share:.1%} of the known depths of {split} lie {where} and are not counted"
        for split, share in shares.items()
        if share > OUTSIDE
    ]


SCORES = ("rmse", "abs_rel", "sq_rel", "rmse_log", "log10", "delta1", "delta2", "delta3")


def depth_scores(predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """The scores of one image; NaN each where no pixel is valid.

    predicted, true  (H, W) metres, positive where valid
    valid            (H, W) bool
    returns          rmse in metres; abs_rel, rmse_log, log10 without a unit; sq_rel in metres; delta1..3 the shares of
                     pixels whose ratio to the truth, the larger over the smaller, is under 1.25, 1.25², 1.25³
    """
    p, t = predicted[valid].astype(np.float64), true[valid].astype(np.float64)
    if not len(t):
        return dict.fromkeys(SCORES, float("nan"))
    error = p - t
    log_error = np.log(p) - np.log(t)
    ratio = np.maximum(p / t, t / p)
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "abs_rel": float(np.mean(np.abs(error) / t)),
        "sq_rel": float(np.mean(error**2 / t)),
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "log10": float(np.mean(np.abs(log_error)) / np.log(10)),
        **{f"delta{power}": float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)},
    }


def mean_scores(images: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Every score (n,) averaged over the images that have one; NaN elsewhere."""
    return {key: float(np.nanmean(values)) for key, values in images.items()}


def scale_invariant_loss(predicted: Tensor, true: Tensor, valid: Tensor, warming_up: bool = False) -> Tensor:
    """sqrt(variance + 0.15 mean²) of the logarithms' differences over all valid pixels of a batch.

    The loss of Eigen et al. (arXiv 1406.2283) with lambda = 0.85, under a root.

    predicted, true  (B, H, W) metres
    valid            (B, H, W) bool
    warming_up       the variance is left out, so that the scale is found first
    returns          (), differentiable; 0 where no pixel is valid
    """
    g = (predicted[valid] + LOG_EPS).log() - (true[valid] + LOG_EPS).log()
    if not g.numel():
        return predicted.sum() * 0.0
    if warming_up:
        return MEAN_WEIGHT**0.5 * g.mean().abs()
    variance = g.var() if g.numel() > 1 else g.new_zeros(())
    # The root's slope at 0 is infinite; a perfect batch must not break the head.
    return (variance + MEAN_WEIGHT * g.mean() ** 2).clamp(min=1e-12).sqrt()


def gradient_loss(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """How much the logarithms' difference changes from a pixel to the next but one, over four subsamplings.

    predicted, true  (B, H, W) metres
    valid            (B, H, W) bool; a difference counts where both of its pixels are valid
    returns          () summed over both directions and the subsamplings, each divided by its number of valid pixels

    DINOv2's release takes these differences along the batch and channel axes of (B, 1, H, W), the first two; here they
    are along height and width, as in MegaDepth, from which the loss comes.
    """
    difference = (predicted + LOG_EPS).log() - (true.clamp(min=0) + LOG_EPS).log()
    difference = difference.where(valid, difference.new_zeros(()))
    total = predicted.new_zeros(())
    for stride in GRADIENT_STRIDES:
        d, v = difference[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = (d[:, :-2] - d[:, 2:]).abs() * (v[:, :-2] & v[:, 2:])
        right = (d[:, :, :-2] - d[:, :, 2:]).abs() * (v[:, :, :-2] & v[:, :, 2:])
        total = total + (down.sum() + right.sum()) / v.sum().clamp(min=1)
    return total
