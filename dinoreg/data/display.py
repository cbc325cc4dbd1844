"""Pictures of any number of channels as a person can look at them."""

import numpy as np


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any number of channels as red, green and blue.

    One channel is shown as grey, two as the grey of their mean, of more than three the first three (`channels_shown`).

    pixels   (..., C) on the scale of bytes, 0 to 255
    returns  (..., 3) uint8; three channels of bytes are returned as they are
    """
    if pixels.shape[-1] == 2:
        pixels = pixels.mean(axis=-1, keepdims=True, dtype=np.float32)
    if pixels.dtype != np.uint8:
        pixels = pixels.clip(0, 255).round().astype(np.uint8)
    return pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]


def channels_shown(in_channels: int) -> str:
    """What `as_rgb` shows of a model's channels, in words; "" where that needs none, as for grey and RGB."""
    if in_channels == 2:
        return "the mean of 2 channels as grey"
    return f"channels 1, 2 and 3 of {in_channels} as red, green and blue" if in_channels > 3 else ""
