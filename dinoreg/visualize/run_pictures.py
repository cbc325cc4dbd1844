"""The pictures of a run for its report: PCA of patches, attention maps and crops, in `view/<step>/`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from dinoreg.config.load import load_config
from dinoreg.data.center_crop import center_crops
from dinoreg.data.loader import BatchLoader, Reading, Views
from dinoreg.data.source import Source
from dinoreg.visualize.attention import attention_sheet
from dinoreg.visualize.crops import crop_sheet
from dinoreg.visualize.pca import pca_sheet
from dinoreg.visualize.subject import config_source, evenly_spaced, view_size
from dinoreg.weights.load import load

logger = logging.getLogger(__name__)


def newest_teacher(run: Path) -> Path | None:
    """The teacher file of the highest step of a run folder."""
    return max((run / "teacher").glob("step_*.safetensors"), default=None, key=lambda path: path.stem)


def draw_missing(run: Path) -> str:
    """Draw the pictures of the newest teacher if its `view/<step>/` is not there; why that failed, in a sentence."""
    teacher = newest_teacher(run)
    if teacher is None or any((run / "view" / teacher.stem.removeprefix("step_")).glob("*.png")):
        return ""
    try:
        write_pictures(run)
    except Exception as error:  # data gone, weights of another version: a report without pictures is still one
        logger.debug("pictures of %s", run, exc_info=True)
        return f"The pictures could not be drawn: {error}"
    return ""


def write_pictures(run: Path, num_images: int = 8) -> list[Path]:
    """Draw `pca.png`, `attention.png` and `crops.png` of the newest teacher on images of the run's own data.

    returns the files, none when the run has no teacher yet; raises what reading data or weights raises
    """
    teacher = newest_teacher(run)
    if teacher is None:
        return []
    config = load_config(run)
    if config.data.source is None:
        return []
    source = config_source(config.data, "")
    model = load(teacher)
    mean, std = config.augment.mean, config.augment.std
    size = view_size(config.crops.global_size, model.patch_size)
    images = spread_images(source, num_images, size, model.in_channels, mean, std)
    folder = run / "view" / teacher.stem.removeprefix("step_")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if len(images):
        pca_sheet(model, images, mean, std).save(folder / "pca.png")
        attention_sheet(model, images[:6], mean, std).save(folder / "attention.png")
        written += [folder / "pca.png", folder / "attention.png"]
    views = Views(config.crops, config.augment, config.mask, model.patch_size, config.model.in_channels)
    reading = Reading(workers=0, max_bad_fraction=1.0, max_pixels=config.data.max_pixels)
    loader = BatchLoader(source, views, reading, batch_size=min(6, config.batch_size), seed=config.seed)
    with loader:
        crop_sheet(next(loader), mean, std, model.patch_size).save(folder / "crops.png")
    return [*written, folder / "crops.png"]


def spread_images(
    source: Source,
    count: int,
    size: int,
    in_channels: int,
    mean: tuple[float, ...] | list[float],
    std: tuple[float, ...] | list[float],
) -> Tensor:
    """Centre crops from all over a source, normalised: (up to count, C, size, size)."""
    pixels, _ = center_crops(source, evenly_spaced(len(source), count), size, in_channels)
    scale, shift = (torch.tensor(list(values)).float()[:, None, None] for values in (std, mean))
    return (pixels.float() / 255 - shift) / scale
