"""What is exported: a model, the pixels it expects, and the run it came from; and image files for its certificate.

Of these files it is compared what dinoreg sees of them, and what the artefact's own processor makes of them: that of
the library wherever it takes such pictures, else numpy and Pillow by the numbers in `model.json`. Card and certificate
have one code for it, so that a card is right or is not written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dinoreg.checkpoint.run_folder import run_of
from dinoreg.data.decode import ORIENTATION_TAG
from dinoreg.data.preprocess import Preprocessing
from dinoreg.models.vit import RegisterViT, as_pair, patch_grid
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import multiples
from dinoreg.runtime.templates import render
from dinoreg.weights.load import load, load_reported, rebuilt, resample_pos_embed, select_channels
from dinoreg.weights.names import random_name
from dinoreg.weights.resolve import find_weights


class Source:
    """A model to export: float32, on the CPU, in evaluation mode.

    given       what the caller named, without the folders above it, which are private
    path        the weight file, None for random weights
    run         the run folder it came out of, if it did
    origin      "step" and "config_hash" of the run, and what a "test_time" register did, as the JSON beside the
                weights says them
    size_given  whether the caller wants this image size, and no other where the format can be made for one
    """

    def __init__(
        self, weights: str | Path, size: int | Sequence[int] | None = None, channels: Sequence[int] | None = None
    ) -> None:
        """The model that `weights` means (see `dinoreg.load`), its positions resampled to `size` if one is given.

        size      height and width in pixels, or one for both
        channels  those that it shall take; None: all
        raises    UserError as `dinoreg.load` and `select_channels` do, or if the patch size does not divide `size`
        """
        self.path, self.size_given = find_weights(weights), size is not None
        self.run: Path | None = None
        metadata: dict[str, Any] = {}
        if self.path is None:
            self.model = load(weights)
            self.given = f"{random_name(weights)} (random weights)"
        else:
            loaded = load_reported(weights)
            self.model, metadata, self.run = loaded.model, loaded.weights.metadata, run_of(self.path)
            self.given = f"{self.path.resolve().parent.name}/{self.path.name}"
            if self.run is not None:
                self.given = f"{self.run.resolve().name}/{self.path.parent.name}/{self.path.name}"
        self.model = self.model if channels is None else select_channels(self.model, channels)
        self.preprocessing = Preprocessing.of_model(self.model, self.path)
        if size is not None:
            for extent in (sides := as_pair(size, "size")):
                if extent % self.model.patch_size:
                    raise UserError(f"size={size}: {extent}, expected {multiples(extent, self.model.patch_size)}")
            self.preprocessing = self.preprocessing.at(sides)
            self.model = resized(self.model, self.preprocessing.size)
        kinds = {"step": int, "config_hash": str, "test_time": str}
        self.origin = {key: metadata[key] for key, kind in kinds.items() if type(metadata.get(key)) is kind}
        self.model.requires_grad_(False)

    def of(self, model: RegisterViT, **origin: Any) -> Source:
        """The same with another model, and more to say of its origin."""
        other = copy.copy(self)
        other.model, other.origin = model, self.origin | origin
        return other


def resized(model: RegisterViT, size: tuple[int, int]) -> RegisterViT:
    """The same model with its positions resampled, as it does itself, to be native to images of `size`.

    size  height and width in pixels, multiples of the patch size
    """
    moved: dict[str, Tensor] = {}
    if model.pos_embed is not None:
        grids = model.grid, patch_grid(size, model.patch_size)
        moved["pos_embed"] = resample_pos_embed(model.pos_embed, *grids, model.antialias, model.position_offset)
    return rebuilt(model, {"image_size": size}, moved)


# ------------------------------------------------------------------------------------------------------------
# Image files


def _needs_tiff(stated: Preprocessing) -> bool:
    """Whether the model's pictures are TIFF files, as Pillow has no such channels, or cuts such pixels."""
    return len(stated.mean) not in (1, 3) or stated.value_range is not None


def prepare_code(form: str, stated: Preprocessing) -> str:
    """Python that defines `prepare`, from a picture's path to (1, C, H, W), after the code that loads the artefact.

    form  name of the format; "dinoreg": through this library
    """
    tiff = _needs_tiff(stated)
    by_library = form in ("timm", "transformers") and not tiff
    values = {"stated": stated, "channels": len(stated.mean), "tiff": tiff, "by_library": by_library}
    return render("export/templates/prepare.py.j2", form=form, **values)


def write_pictures(folder: Path, source: Source) -> dict[str, Path]:
    """Pictures of odd shapes and kinds, drawn by a formula; {name: path}.

    raises UserError where a model of more channels or bits takes TIFF files and tifffile is not installed
    """
    (height, width), short = source.preprocessing.size, source.preprocessing.short_side
    shapes = {
        "wide": (short, short + 4 * (width // 2) + 3),  # what is over leaves 3 when divided by 4: see `center_crop`
        "tall": (5 * height, 2 * width + 1),
        "small": (height // 2 + 1, width // 2 + 2),
    }
    return _write_tiffs(folder, shapes, source) if _needs_tiff(source.preprocessing) else _write_bytes(folder, shapes)


def _waves(shape: tuple[int, int], channels: int) -> np.ndarray:
    """(H, W, C) in 0..1, a picture of stripes as fine as its shorter side bears."""
    y, x = np.mgrid[: shape[0], : shape[1]] * (40 / min(shape))
    waves = [np.sin(x * (0.9 + c / 7)) + np.cos(y * (1.1 - c / 9)) + np.sin((x + y) / (3 + c)) for c in range(channels)]
    return 0.5 + np.stack(waves, axis=-1) / 6.5


def _write_bytes(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Path]:
    paths = {}

    def save(name: str, image: Image.Image, suffix: str = "png", **options: Any) -> None:
        paths[name] = folder / f"{name}.{suffix}"
        image.save(paths[name], **options)

    drawn = {name: Image.fromarray((255 * _waves(shape, 3)).astype(np.uint8)) for name, shape in shapes.items()}
    for name, image in drawn.items():
        save(name, image)
    save("grey", drawn["tall"].convert("L"))
    veiled = drawn["wide"].convert("RGBA")
    veiled.putalpha(Image.linear_gradient("L").resize(veiled.size))
    save("transparent", veiled)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6  # turned
    save("turned", drawn["wide"], "jpg", quality=95, exif=exif)
    return paths


def _write_tiffs(folder: Path, shapes: Mapping[str, tuple[int, int]], source: Source) -> dict[str, Path]:
    """TIFF files with the model's channels, of bytes and of 16 bits or floats that fill the range of the data set."""
    try:
        import tifffile
    except ImportError:
        why = "pictures of more than three channels or eight bits are TIFF files"
        raise UserError(f"export needs tifffile: {why}; {install('tifffile')}") from None
    stated, paths = source.preprocessing, {}
    for name, shape in shapes.items():
        waves = _waves(shape, len(stated.mean))
        kinds: dict[str, Any] = {"bytes": (255 * waves).astype(np.uint8), "deep": (65535 * waves).astype(np.uint16)}
        if stated.value_range is not None:
            low, high = (np.array(limits) for limits in stated.value_range)
            kinds["deep"] = (low + (high - low) * waves).astype(np.float32)
        for kind, pixels in kinds.items():
            paths[f"{name}, {kind}"] = folder / f"{name}_{kind}.tif"
            flat = pixels.shape[2] == 1  # of one channel there is no order of channels
            pixels, order = (pixels[:, :, 0], None) if flat else (pixels, "contig")
            tifffile.imwrite(paths[f"{name}, {kind}"], pixels, photometric="minisblack", planarconfig=order)
    return paths
