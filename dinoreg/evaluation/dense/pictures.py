"""Pictures of predictions: panels side by side, boxes on an image, label maps and flow in colours."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw

from dinoreg.evaluation.data import IGNORED

PANEL = 296  # pixels; widest of three panels
TALLEST = 8  # height over width of a panel
BOX_PANEL = (290, 400)  # pixels; width and height that an image with boxes is fitted into
GAP, LINE = 4, 18  # pixels between panels, and of a line of text below them
BACKGROUND, TEXT = (24, 27, 33), (230, 232, 238)
TRUTH, PREDICTION = (70, 200, 120), (240, 90, 70)  # green and red
HUE_STEP = 0.56  # of a turn from one class to the next: tried, 150 colours are as far apart as with any
UNKNOWN = (70, 74, 82)  # of pixels without trustworthy ground truth


def strip(panels: Sequence[Image.Image], captions: Sequence[str] = ()) -> Image.Image:
    """Panels in a row, each above its caption of one line or several."""
    width = sum(panel.width + GAP for panel in panels) - GAP
    height, lines = max(panel.height for panel in panels), max((len(each.splitlines()) for each in captions), default=0)
    canvas = Image.new("RGB", (width, height + LINE * lines), BACKGROUND)
    left = 0
    for number, panel in enumerate(panels):
        canvas.paste(panel, (left, 0))
        if captions:
            ImageDraw.Draw(canvas).text((left + 4, height + 3), captions[number], fill=TEXT)
        left += panel.width + GAP
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


def palette(count: int) -> np.ndarray:
    """(count, 3) uint8: colours apart from one another and from black; a palette begins every longer one."""
    number = np.arange(count)
    value, saturation = np.array([1, 0.8, 0.6])[number % 3], np.array([1, 0.7])[number // 3 % 2]
    hsv = np.stack([number * HUE_STEP % 1, saturation, value], axis=1)
    return (255 * hsv_to_rgb(hsv)).astype(np.uint8)


def coloured(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) uint8 classes -> (H, W, 3) uint8 by the palette; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:num_classes] = palette(num_classes)
    table[IGNORED] = 0
    return table[mask]


def draw_flow(frame: Image.Image, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray, text: str) -> Image.Image:
    """Frame, predicted flow and true flow side by side, in the colours of Baker et al. (ICCV 2007): hue is the
    direction, saturation the speed.

    predicted, true  (H, W, 2) pixels; full colour is the 99th percentile of the true speeds, at least 1 pixel
    valid            (H, W) bool; elsewhere the true flow is grey
    text             below the prediction
    """
    from torchvision.utils import flow_to_image  # slow to import, with all its models

    speeds = np.linalg.norm(true[valid], axis=-1)
    fastest = max(float(np.quantile(speeds, 0.99)) if len(speeds) else 0.0, 1.0)
    flows = torch.from_numpy(np.stack([predicted, np.where(valid[..., None], true, 0)])).float().movedim(-1, 1)
    flows = flows * (fastest / flows.norm(dim=1, keepdim=True).clamp(min=fastest))
    found, known = flow_to_image(flows).movedim(1, -1).numpy()
    known[~valid] = UNKNOWN
    panels = [widened(frame, Image.Resampling.BICUBIC), widened(found), widened(known)]
    captions = ("first frame", text, f"truth; full colour: {float(flows.norm(dim=1).max()):.1f} px")
    return strip(panels, captions)
