"""The pictures of a run for its report: PCA of patches, attention maps and crops, in `view/<step>/`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dinoreg.checkpoint.run_folder import newest_teacher
from dinoreg.config.load import load_config
from dinoreg.data.center_crop import center_crops
from dinoreg.data.source import Source
from dinoreg.visualize.attention import attention_sheet
from dinoreg.visualize.crops import crop_sheet, first_batch
from dinoreg.visualize.pca import pca_sheet
from dinoreg.visualize.subject import config_source, evenly_spaced, normalise, view_size
from dinoreg.weights.load import load

logger = logging.getLogger(__name__)


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
    batch, _ = first_batch(config, source, model.patch_size, min(6, config.batch_size))
    crop_sheet(batch, mean, std, model.patch_size).save(folder / "crops.png")
    return [*written, folder / "crops.png"]


def spread_images(
    source: Source,
    count: int,
    size: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Centre crops from all over a source, normalised: (up to count, C, size, size)."""
    pixels, _ = center_crops(source, evenly_spaced(len(source), count), size, in_channels)
    return normalise(pixels, mean, std)
