"""Contact sheets of labelled tiles, and galleries that save them and write the page around them.

A sheet has a transparent background that suits a light and a dark page. A gallery's pictures are PNG files in
`OUT/<view>/`, and `OUT/<view>.html` holds them all.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dinoreg.checkpoint.atomic import write_atomic, write_picture
from dinoreg.config.overwrite import check_folder
from dinoreg.data.display import as_rgb, channels_shown
from dinoreg.reports import html
from dinoreg.runtime.errors import RunError, reworded
from dinoreg.runtime.json_files import read_json
from dinoreg.visualize.subject import Images, open_subject, picture_size, read_pictures, view_folder

GREY = (128, 134, 144)  # legible on white and on black
INK = "#808690"  # the same
GAP = 6
WIDEST = 8  # width over height of a tile; what is longer is squeezed, so that it takes no gigabytes
LABEL = 18  # height of a line of text in pixels
FORMAT = "dinoreg-view"
RECORD = "view.json"
Size = int | Sequence[int] | None
Out = str | None
Num = int | None
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.png")


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: images (B, C, H, W) -> uint8 (B, H, W, 3) on the CPU, channels as `as_rgb` shows them.

    mean, std  one number per channel, on the scale of [0, 1]
    """
    x = images.detach().float().cpu()
    scale, shift = (torch.tensor(list(values)).float()[:, None, None] for values in (std, mean))
    return as_rgb((255 * (x * scale + shift)).permute(0, 2, 3, 1).numpy())


def colour_map(values: np.ndarray, top: float | None = None, colours: str = "magma") -> np.ndarray:
    """A map in colours, uint8 (h, w, 3), black at 0 and brightest at `top`.

    values   (h, w), at least 0
    top      None: the maximum
    colours  name of a colour map of matplotlib
    """
    top = float(values.max()) if top is None else top
    painted = matplotlib.colormaps[colours](values / (top or 1.0))[..., :3] * (values > 0)[..., None]
    return (painted * 255).round().astype(np.uint8)


def figure_image(figure: Figure) -> Image.Image:
    """A figure of matplotlib as an RGBA picture with a transparent background."""
    figure.patch.set_alpha(0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()).copy())


def tile(pixels: np.ndarray, height: int, width: int | None = None, smooth: bool = True) -> Image.Image:
    """Pixels (h, w, 3) uint8 as a picture of `height` and `width` pixels, by default in proportion, up to WIDEST.

    smooth  bicubic; else the nearest pixel, for maps
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if width is None:
        width = min(max(1, round(height * picture.width / picture.height)), WIDEST * height)
    return picture.resize((width, height), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def map_row(pixels: np.ndarray, maps: Iterable[np.ndarray], height: int) -> list[Image.Image]:
    """An image (H, W, 3) uint8, and coloured maps of it (h, w, 3) uint8, as tiles of one size, `height` pixels high."""
    first = tile(pixels, height)
    return [first, *(tile(each, height, first.width, smooth=False) for each in maps)]


def sheet(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str] = (), names: Sequence[str] = ()) -> Image.Image:
    """Rows of tiles under column headings, with a name to the left of each row; short rows leave room."""
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


# ------------------------------------------------------------------------------------------------------------
# Galleries


class Gallery:
    """Collects the pictures of one view as they are drawn, then writes the page around them.

    Pictures that the same view of the same images left there before are removed, other files are not touched.
    """

    def __init__(self, view: str, out: Path, about: Mapping[str, Any]) -> None:
        """Checks `out` and writes nothing; raises UserError when it cannot be a folder.

        about  part of the record that says of what the view is; where the last one here was of something else, it
               stays, and this one is called `VIEW-1a2b3c4d`
        """
        self.view, self.out, self.name = view, out, view
        self.about = json.loads(json.dumps(dict(about)))
        before = read_json(out / view / RECORD)
        if before.get("format") == FORMAT and any(before.get(key, value) != value for key, value in self.about.items()):
            self.name = f"{view}-{sha256(json.dumps(self.about).encode()).hexdigest()[:8]}"
        self.folder = out / self.name
        for path in (*reversed(out.parents), out, self.folder):
            check_folder(path, f"out={out}: {path}")
        self.saved: list[str] = []  # names of the pictures

    def picture(self, stem: str, image: Image.Image, description: str, note: str = "") -> html.Picture | None:
        """Save a picture as `STEM.png`; returns what shows it on the page, None where it cannot be read again.

        description  for those who cannot see it
        note         printed below it
        raises       RunError where it cannot be written
        """
        path = self.folder / f"{stem}.png"
        with self._writing():
            if not self.saved:
                self._remove_last()
            write_picture(path, image)
        self.saved.append(path.name)
        return html.picture(path, description, note)

    def write_page(self, title: str, record: Mapping[str, Any], folder: str = "visualize", **values: Any) -> Path:
        """Write the page and the record of numbers beside the pictures; returns the page's path.

        record  what `view.json` holds besides the names of the pictures, fit for JSON
        folder  of `dinoreg/`, in which `templates/<view>.html.j2` is; it is given `values`
        raises  RunError where the page cannot be written
        """
        page = self.out / f"{self.name}.html"
        written = {"format": FORMAT, "view": self.view, **self.about, **record, "pictures": self.saved}
        content = html.page(f"{folder}/templates/{self.view}.html.j2", title, **values)
        with self._writing():
            write_atomic(self.folder / RECORD, json.dumps(written, indent=1) + "\n")
            write_atomic(page, content)
        return page

    def _writing(self) -> AbstractContextManager[None]:
        return reworded(f"out={self.out}: cannot be written", OSError, into=RunError)

    def _remove_last(self) -> None:
        """Remove the pictures that a record of ours names; without one nothing is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = read_json(self.folder / RECORD)
        names = before.get("pictures") if before.get("format") == FORMAT else None
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and _PICTURE.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)


class ModelGallery(Gallery):
    """A view of a model on some images.

    size      (height, width) of the images in pixels
    grid      (rows, columns) of their patches
    pictures  the images as the model gets them
    pixels    (B, H, W, 3) uint8: the images to show
    """

    def __init__(
        self, view: str, *, weights: str, images: Images, columns: str, out: Out, size: Size, num: Num, device: str
    ) -> None:
        """The arguments are those of `dinoreg view`; writes nothing; raises UserError for what does not fit."""
        self.subject = open_subject(weights, device)
        self.model = self.subject.model
        self.size = picture_size(self.model, size)
        self.grid = (self.size[0] // self.model.patch_size, self.size[1] // self.model.patch_size)
        self.pictures = read_pictures(self.subject, images, num, self.size, columns)
        about = {"weights": self.subject.name, "identity": self.subject.encoder.identity, "images": self.pictures.names}
        super().__init__(view, Path(out) if out else view_folder(self.subject), about)
        preprocessing = self.subject.own.preprocessing
        self.pixels = to_pixels(self.pictures.images, preprocessing.mean, preprocessing.std)

    def finish(self, title: str, record: Mapping[str, Any], **values: Any) -> Path:
        """Write the page, with the model, the resolution, the images and those left out; returns its path."""
        name, record = self.subject.name, {"size": self.size, **record}
        channels = channels_shown(self.model.in_channels)
        values |= {"gallery": self, "skipped": self.pictures.skipped, "channels": channels}
        return self.write_page(f"{title} of {name}", record, **values)
