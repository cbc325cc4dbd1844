"""Generated photographs: something a JPEG encoder and a crop find natural."""

from __future__ import annotations

import numpy as np
from PIL import Image


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth colour fields with edges and grain, the same for the same seed and size."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = []
    for _ in range(3):
        a, b, c, d = rng.uniform(1, 9, size=4)
        planes.append(np.sin(a * x + b * y) + np.cos(c * x * y + d))
    image = np.stack(planes, axis=-1)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    image[top : top + height // 3, left : left + width // 3] = rng.uniform(-2, 2, size=3)
    image += rng.normal(scale=0.05, size=image.shape)
    return Image.fromarray(np.uint8(np.clip((image + 2) / 4, 0, 1) * 255))
