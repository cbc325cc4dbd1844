"""Pictures of optical flow: hue is the direction, saturation the speed, with a wheel that says which is which."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dinoreg.evaluation.dense.pictures import strip, widened

UNKNOWN = (70, 74, 82)  # of pixels without trustworthy ground truth


def colours(flow: np.ndarray, fastest: float) -> np.ndarray:
    """Flow (H, W, 2) -> (H, W, 3) uint8: no motion is white, `fastest` pixels and more have the full colour.

    Hues go round with the angle of (u, v): right is red, down yellow-green, left cyan, up violet.
    """
    speed = np.clip(np.linalg.norm(flow, axis=-1) / max(fastest, 1e-6), 0, 1)
    sector = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) * 6
    # Each channel falls from 1 where the hue is far from its own: the hexagon of HSV at full value.
    distance = np.stack([(offset + sector) % 6 for offset in (5, 3, 1)], axis=-1)
    fall = np.clip(np.minimum(distance, 4 - distance), 0, 1)
    return np.round(255 * (1 - speed[..., None] * fall)).astype(np.uint8)


def wheel(radius: int) -> Image.Image:
    """The key to the colours: every direction and speed in its place, clear outside the circle."""
    along = np.arange(-radius, radius + 1)
    flow = np.stack(np.meshgrid(along, along), axis=-1).astype(np.float64)
    inside = np.linalg.norm(flow, axis=-1) <= radius
    return Image.fromarray(np.dstack([colours(flow, radius), (255 * inside).astype(np.uint8)]))


def draw(frame: Image.Image, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray, text: str) -> Image.Image:
    """Frame, predicted flow and true flow side by side.

    predicted, true  (H, W, 2) pixels; both on the scale of the true one's fast pixels
    valid            (H, W) bool; elsewhere the true flow is grey
    text             below the prediction
    """
    speeds = np.linalg.norm(true[valid], axis=-1)
    fastest = max(float(np.quantile(speeds, 0.99)) if len(speeds) else 0.0, 1.0)
    shown = colours(np.where(valid[..., None], true, 0), fastest)
    shown[~valid] = UNKNOWN
    panels = [widened(frame, Image.Resampling.BICUBIC), widened(colours(predicted, fastest)), widened(shown)]
    canvas = strip(panels, ("first frame", text, f"truth; full colour: {fastest:.0f} px"))
    height = panels[0].height
    key = wheel(min(18, height // 6))
    canvas.paste(key, (canvas.width - key.width - 3, height - key.height - 3), key)
    return canvas
