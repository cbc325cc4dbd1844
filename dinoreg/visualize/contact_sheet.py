"""Contact sheets: labelled tiles in rows, on a transparent ground that suits a light and a dark page."""

import io
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GREY = (128, 134, 144)  # reads on white and on black
INK = "#808690"  # the same
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


def sheet(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str] = (), names: Sequence[str] = ()) -> Image.Image:
    """Rows of tiles under column headings, with a name to the left of each row; short rows leave room."""
    if not rows or not any(rows):
        raise ValueError("a contact sheet needs at least one tile")
    font = ImageFont.load_default(size=13)
    widths = [max(tile.width for tile in column if tile) for column in zip_longest(*rows)]
    heights = [max(each.height for each in row) for row in rows]
    left = max((round(font.getlength(name)) + GAP for name in names), default=0)
    *lefts, right = accumulate((width + GAP for width in widths), initial=left)
    *tops, bottom = accumulate((height + GAP for height in heights), initial=LABEL if columns else 0)
    canvas = Image.new("RGBA", (right - GAP, bottom - GAP), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    for heading, x, width in zip(columns, lefts, widths):
        pen.text((x + width / 2, LABEL / 2 - 1), heading, fill=INK, font=font, anchor="mm")
    for name, y, height in zip(names, tops, heights):
        pen.text((0, y + height / 2), name, fill=INK, font=font, anchor="lm")
    for row, y in zip(rows, tops):
        for each, x in zip(row, lefts):
            canvas.paste(each, (x, y))
    return canvas
