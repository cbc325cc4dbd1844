"""Pictures of predictions: panels side by side with a line of text below each, and boxes drawn on an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

PANEL = 296  # pixels; widest of three panels
BOX_PANEL = (290, 400)  # pixels; width and height that an image with boxes is fitted into
GAP, LINE = 4, 18  # pixels between panels, and of the line of text below them
BACKGROUND, TEXT = (24, 27, 33), (230, 232, 238)
TRUTH, PREDICTION = (70, 200, 120), (240, 90, 70)  # green and red


def strip(panels: Sequence[Image.Image | np.ndarray], captions: Sequence[str] = (), gap: int = GAP) -> Image.Image:
    """Panels in a row, each above its caption; panels are images or arrays (h, w, 3) uint8."""
    images = [Image.fromarray(panel) if isinstance(panel, np.ndarray) else panel for panel in panels]
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    height = max(image.height for image in images)
    canvas = Image.new("RGB", (width, height + (LINE if captions else 0)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = 0
    for number, image in enumerate(images):
        canvas.paste(image, (left, 0))
        if captions:
            draw.text((left + 4, height + 3), captions[number], fill=TEXT)
        left += image.width + gap
    return canvas


def widened(image: Image.Image | np.ndarray, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """An image scaled to the width of a panel; small ones are enlarged."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return image.resize((PANEL, max(round(image.height * PANEL / image.width), 1)), resample)


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, colour: tuple[int, int, int], captions: Sequence[str] = ()
) -> Image.Image:
    """A copy of a picture as large as a panel, with the outlines of boxes (k, 4) that are in its own pixels."""
    scale = min(BOX_PANEL[0] / image.width, BOX_PANEL[1] / image.height)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for number, (x0, y0, x1, y1) in enumerate(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale):
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=2)
        if number < len(captions):
            place = (x0 + 3, max(y0 + 2, 0))
            draw.rectangle(draw.textbbox(place, captions[number]), fill=BACKGROUND)
            draw.text(place, captions[number], fill=colour)
    return canvas
