"""The subject of a view: the model that `weights=` means, with the preprocessing it was trained with, and some images.
Any model that RegisterViT can hold; a bare name gets random weights, the same ones every time.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dinoreg.config.load import load_config
from dinoreg.config.schema import DataConfig
from dinoreg.data.center_crop import to_encoder
from dinoreg.data.decode import BadImage
from dinoreg.data.folder_index import EXTENSIONS, PathBlock
from dinoreg.data.open import open_source
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.source import JoinedSource, PathSource, Source
from dinoreg.evaluation.backbones.open import Opened, open_native
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.device import pick_device
from dinoreg.runtime.errors import UserError, one_line
from dinoreg.runtime.places import is_url
from dinoreg.runtime.printable import multiples

Images = str | Sequence[str] | None  # as `open_images` takes them; None: the data that the run was trained on
NUM_IMAGES = 8
MIN_GRID = 16  # patches a side below which pictures are enlarged, so that maps show something
MAX_SIZE = 672  # pixels a side to which they are enlarged at most


class Pictures(NamedTuple):
    """Images as the model gets them, and those that could not be read."""

    images: Tensor  # (B, C, H, W) float32, normalised, on the model's device
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)


def open_subject(weights: str, device: str = "auto") -> Opened:
    """The model of a run folder, a weight file or a name; UserError, in one line, for weights missing or damaged.

    device  "auto" or a name of PyTorch
    """
    return open_native(weights, pick_device(device))


def view_folder(subject: Opened) -> Path:
    """The default folder of its views: `RUN/view/<step>/`, or `view/<name>/`."""
    own = subject.run and subject.run / "view" / f"{subject.step:07d}"
    return own or Path("view") / safe_name(subject.name)


# ------------------------------------------------------------------------------------------------------------
# Images


def open_images(spec: str | Sequence[str], key: str = "images", columns: str = "", root: str | None = None) -> Source:
    """A source of images: a file, or what `open_source` opens, or several of these; UserError without an image.

    key            option that messages name
    columns, root  of tables, as for `open_source`
    """
    if not isinstance(spec, str):
        parts = [open_images(each, key, columns, root) for each in spec]
        if not parts:
            raise UserError(f"{key}=[]: expected at least one image, folder or list")
        return parts[0] if len(parts) == 1 else JoinedSource(parts)
    path = Path(os.path.expanduser(spec))
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return PathSource(os.path.abspath(path.parent), PathBlock.of([path.name]))
    return open_source(spec, columns=columns, root=root)


def picture_size(model: RegisterViT, size: int | Sequence[int] | None = None) -> tuple[int, int]:
    """(height, width) in pixels: `size`, else the model's own, or a whole multiple where that has few patches a side.

    raises  UserError for a side that the patch size does not divide
    """
    patch = model.patch_size
    if size is None:
        short = min(model.image_size)
        factor = max(1, math.ceil(MIN_GRID * patch / short))
        scaled = min(short * factor, max(short, MAX_SIZE // patch * patch))
        height, width = (scaled * side // short // patch * patch for side in model.image_size)
        return height, width
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    for side in (height, width):
        if side < patch or side % patch:
            raise UserError(f"size={side}: expected {multiples(side, patch)}")
    return height, width


def read_pictures(subject: Opened, spec: Images, num: int | None, size: tuple[int, int], columns: str = "") -> Pictures:
    """Evenly spaced images of a source, normalised for the model; for a bag of channels each channel is one.

    spec, columns  as for `open_images`; None: the data that the run was trained on
    num            images at most; None: 8, or as many as `spec` names one by one
    size           (height, width) in pixels
    raises         UserError without any image, and where none can be read
    """
    if spec is None:
        source = run_source(subject)
    else:
        source = open_images(spec, columns=columns)
        source.value_range = subject.encoder.preprocessing.value_range
    named = 1 if spec is None or isinstance(spec, str) else len(spec)
    found, skipped = crops_of(source, subject.encoder.preprocessing.at(size), num or max(NUM_IMAGES, named))
    if not found:
        raise UserError(f"images: none of {len(skipped)} could be read; the first: {skipped[0][0]}: {skipped[0][1]}")
    images, names = subject.encoder.prepare(to_encoder(list(found.values()))), [*map(source.name, found)]
    if subject.own is not subject.encoder:
        names = [f"{name}, channel {channel}" for name in names for channel in range(images.shape[1])]
        images = images.flatten(0, 1).unsqueeze(1)
    return Pictures(images, tuple(names), tuple(skipped))


def crops_of(source: Source, preprocessing: Preprocessing, num: int) -> tuple[dict[int, Tensor], list[tuple[str, str]]]:
    """{index: crop (C, H, W)} of evenly spaced images, `num` at most, and (name, reason) of unreadable ones."""
    crops, skipped, total = {}, [], len(source)
    for index in range(total) if total <= num else [total * (2 * each + 1) // (2 * num) for each in range(num)]:
        try:
            crops[index] = preprocessing.crop(source.decode(index, len(preprocessing.mean)))
        except (BadImage, OSError) as error:
            skipped.append((source.name(index), one_line(error)))
    return crops, skipped


def run_source(subject: Opened) -> Source:
    """The images of the run that the weights belong to.

    raises  UserError without a run, and where its config names none or a URL: the run may come from a stranger
    """
    if subject.run is None:
        raise UserError("images: missing; name an image, a folder, a list of paths, or scenes")
    data = load_config(subject.run).data
    places = [data.source] if isinstance(data.source, str) else list(data.source or ())
    if urls := [place for place in (*places, data.root) if place and is_url(place)]:
        raise UserError(f"images: missing; the data of {subject.run} are at a URL, which you name: images={urls[0]}")
    return config_source(data, f"images: missing, and {subject.run} does not name its data")


def config_source(data: DataConfig, missing: str) -> Source:
    """The images that a config trains on; UserError with the text `missing` when it names none."""
    if data.source is None:
        raise UserError(missing)
    return open_source(data.source, data.weights, data.index_dir or None, data.root, data.range, data.columns)


def safe_name(text: str, length: int = 60) -> str:
    """A text as a file name of at most `length` characters: letters, digits, "-", "_" and "."; never empty."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:length] or "model"
