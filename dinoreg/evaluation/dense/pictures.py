"""Pictures of predictions: panels side by side, boxes on an image, label maps and flow in colours.

Label maps have a palette of distinct colours. Of a flow, hue is the direction and saturation the speed, with a wheel
that says which is which.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from dinoreg.evaluation.data import IGNORED

PANEL = 296  # pixels; widest of three panels
TALLEST = 8  # height over width of a panel
BOX_PANEL = (290, 400)  # pixels; width and height that an image with boxes is fitted into
GAP, LINE = 4, 18  # pixels between panels, and of the line of text below them
BACKGROUND, TEXT = (24, 27, 33), (230, 232, 238)
TRUTH, PREDICTION = (70, 200, 120), (240, 90, 70)  # green and red
SEEN = np.array([2, 4, 3])  # weights of red, green and blue in the squared distance that the eye sees between colours
UNKNOWN = (70, 74, 82)  # of pixels without trustworthy ground truth


def strip(panels: Sequence[Image.Image | np.ndarray], captions: Sequence[str] = (), gap: int = GAP) -> Image.Image:
    """Panels in a row, each above its caption.

    panels  images, or arrays (h, w, 3) uint8
    gap     pixels between panels
    """
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
    """An image, or array (h, w, 3) uint8, scaled to the width of a panel; small ones are enlarged.

    One that is far higher than wide is squeezed to TALLEST panels' width, so that it takes no gigabytes.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    height = min(max(round(image.height * PANEL / image.width), 1), TALLEST * PANEL)
    return image.resize((PANEL, height), resample)


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, colour: tuple[int, int, int], captions: Sequence[str] = ()
) -> Image.Image:
    """A copy of a picture as large as a panel, with the outlines of boxes.

    boxes     (k, 4) x0, y0, x1, y1 in the picture's own pixels
    captions  of the first boxes
    """
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


@lru_cache(maxsize=8)
def palette(count: int) -> np.ndarray:
    """(count, 3) uint8, read only: colours far from each other and from black; always the same ones.

    Each colour in turn is the one of a grid that is farthest from all before it; a palette is the beginning of every
    longer one.
    """
    steps = np.linspace(0, 255, 14).round()
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    chosen = [0, len(grid) - 1]  # black and white, which are no colours of classes
    nearest = np.full(len(grid), np.inf)
    while len(chosen) < count + 2:
        for taken in chosen[-2:]:
            apart = ((grid - grid[taken]) ** 2) @ SEEN
            nearest = np.minimum(nearest, apart)
        chosen.append(int(nearest.argmax()))
    colours = grid[chosen[2:]].astype(np.uint8)
    colours.flags.writeable = False
    return colours


def coloured(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) uint8 classes -> (H, W, 3) uint8 by the palette; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:num_classes] = palette(num_classes)
    table[IGNORED] = 0
    return table[mask]


def panel(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """An array resized to a panel that shows (height, width) pixels, at most PANEL pixels wide.

    array  image (H, W, 3) or mask (H, W), uint8; masks by the nearest pixel
    """
    shown = min(width, PANEL)
    size = (shown, max(round(height * shown / width), 1))
    kind = Image.Resampling.NEAREST if array.ndim == 2 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(array).resize(size, kind))


def triptych(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> Image.Image:
    """Image | prediction | truth.

    image              (h, w, 3) uint8
    prediction, truth  (h, w) uint8 classes in [0, num_classes); 255 is black
    """
    return strip([image, coloured(prediction, num_classes), coloured(truth, num_classes)], gap=6)


def flow_colours(flow: np.ndarray, fastest: float) -> np.ndarray:
    """Flow (H, W, 2) in pixels -> (H, W, 3) uint8: no motion is white, `fastest` pixels and more have the full colour.

    Hues go round with the angle of (u, v): right is red, down yellow-green, left cyan, up violet.
    """
    speed = np.clip(np.linalg.norm(flow, axis=-1) / max(fastest, 1e-6), 0, 1)
    sector = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) * 6
    # Each channel falls from 1 where the hue is far from its own: the hexagon of HSV at full value.
    distance = np.stack([(offset + sector) % 6 for offset in (5, 3, 1)], axis=-1)
    fall = np.clip(np.minimum(distance, 4 - distance), 0, 1)
    return np.round(255 * (1 - speed[..., None] * fall)).astype(np.uint8)


def wheel(radius: int) -> Image.Image:
    """The key to the flow's colours, RGBA of 2 radius + 1 pixels a side; transparent outside the circle."""
    along = np.arange(-radius, radius + 1)
    flow = np.stack(np.meshgrid(along, along), axis=-1).astype(np.float64)
    inside = np.linalg.norm(flow, axis=-1) <= radius
    return Image.fromarray(np.dstack([flow_colours(flow, radius), (255 * inside).astype(np.uint8)]))


def draw_flow(frame: Image.Image, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray, text: str) -> Image.Image:
    """Frame, predicted flow and true flow side by side.

    predicted, true  (H, W, 2) pixels; full colour is the 99th percentile of the true speeds, at least 1 pixel
    valid            (H, W) bool; elsewhere the true flow is grey
    text             below the prediction
    """
    speeds = np.linalg.norm(true[valid], axis=-1)
    fastest = max(float(np.quantile(speeds, 0.99)) if len(speeds) else 0.0, 1.0)
    shown = flow_colours(np.where(valid[..., None], true, 0), fastest)
    shown[~valid] = UNKNOWN
    panels = [widened(frame, Image.Resampling.BICUBIC), widened(flow_colours(predicted, fastest)), widened(shown)]
    canvas = strip(panels, ("first frame", text, f"truth; full colour: {fastest:.0f} px"))
    height = panels[0].height
    key = wheel(min(18, height // 6))
    canvas.paste(key, (canvas.width - key.width - 3, height - key.height - 3), key)
    return canvas
