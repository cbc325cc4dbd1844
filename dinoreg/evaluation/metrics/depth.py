"""Scores of depth maps: those of Eigen et al. (arXiv 1406.2283) as DINOv2 reports them, each over the valid pixels of
one image, then averaged over images.
"""

from collections.abc import Mapping

import numpy as np

OUTSIDE = 0.01  # share of depths beyond the limits, above which it is said

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
