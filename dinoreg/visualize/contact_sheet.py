"""Contact sheets: labelled tiles in rows, on a transparent ground that suits a light and a dark page."""

import io
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK = (128, 134, 144, 255)  # a grey that reads on white and on black
GAP = 6
LABEL = 18  # height of a line of text in pixels


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: images (B, C, H, W) -> uint8 (B, H, W, 3).

    One channel is shown as grey, two as their mean, of more than three the first three.
    """
    x = images.detach().float().cpu()
    scale, shift = (torch.tensor(list(values)).float()[:, None, None] for values in (std, mean))
    x = x * scale + shift
    if x.shape[1] == 2:
        x = x.mean(dim=1, keepdim=True)
    x = x[:, :3].expand(-1, 3, -1, -1)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def colour_map(values: np.ndarray, top: float | None = None, colours: str = "magma") -> np.ndarray:
    """values (h, w), at least 0 -> uint8 (h, w, 3), black at 0 and brightest at `top`, by default the maximum."""
    top = float(values.max()) if top is None else top
    shares = values / top if top > 0 else np.zeros_like(values)
    painted = matplotlib.colormaps[colours](shares)[..., :3] * (shares > 0)[..., None]
    return (painted * 255).round().astype(np.uint8)


def figure_image(figure: Figure) -> Image.Image:
    """A figure of matplotlib as a picture on a transparent ground."""
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with Image.open(buffer) as image:
        return image.convert("RGBA")


def tile(pixels: np.ndarray, height: int, width: int | None = None, smooth: bool = True) -> Image.Image:
    """pixels (h, w, 3) uint8 as a picture of `height` (and `width`, by default in proportion)."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if width is None:
        width = max(1, round(height * picture.width / picture.height))
    return picture.resize((width, height), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def map_row(pixels: np.ndarray, maps: Iterable[np.ndarray], height: int) -> list[Image.Image]:
    """An image (H, W, 3) uint8, and painted maps of it (h, w, 3) uint8, as tiles of one size side by side."""
    first = tile(pixels, height)
    return [first, *(tile(each, height, first.width, smooth=False) for each in maps)]


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Image.Image:
    """Rows of tiles under column headings, with a name to the left of each row; short rows leave room."""
    if not rows or not any(rows):
        raise ValueError("a contact sheet needs at least one tile")
    font = ImageFont.load_default(size=13)
    count = max(len(row) for row in rows)
    widths = [max((row[i].width for row in rows if i < len(row)), default=0) for i in range(count)]
    heights = [max((each.height for each in row), default=0) for row in rows]
    left = max((round(font.getlength(name)) + GAP for name in names), default=0)
    top = LABEL if columns else 0
    size = (left + sum(widths) + GAP * (count - 1), top + sum(heights) + GAP * (len(rows) - 1))
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    x = left
    for heading, width in zip(columns, widths):
        pen.text((x + width / 2, LABEL / 2 - 1), heading, fill=INK, font=font, anchor="mm")
        x += width + GAP
    y = top
    for number, (row, height) in enumerate(zip(rows, heights)):
        if number < len(names):
            pen.text((0, y + height / 2), names[number], fill=INK, font=font, anchor="lm")
        x = left
        for each, width in zip(row, widths):
            canvas.paste(each, (x, y))
            x += width + GAP
        y += height + GAP
    return canvas
