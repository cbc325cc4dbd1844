"""The pictures of a run for its report: PCA of patches, attention maps and crops, in `view/<step>/`."""

import logging
from pathlib import Path

from dinoreg.checkpoint.atomic import write_picture
from dinoreg.config.load import load_config
from dinoreg.runtime.json_files import newest_teacher
from dinoreg.visualize.attention import attention_sheet
from dinoreg.visualize.crops import crop_sheet, first_batch
from dinoreg.visualize.gallery import to_pixels
from dinoreg.visualize.pca import pca_sheet
from dinoreg.visualize.subject import open_subject, picture_size, read_pictures, run_source, view_folder

logger = logging.getLogger(__name__)


def draw_missing(run: Path) -> str:
    """Draw the pictures of the newest teacher unless its `view/<step>/` has some.

    returns  a sentence on why that failed, or ""
    """
    teacher = newest_teacher(run)
    if teacher is None or any((run / "view" / teacher.stem.removeprefix("step_")).glob("*.png")):
        return ""
    try:
        _draw(run)
    except Exception as error:  # data gone, weights of another version: a report without pictures is still one
        logger.debug("pictures of %s", run, exc_info=True)
        return f"The pictures could not be drawn: {error}"
    return ""


def _draw(run: Path) -> None:
    """Write `pca.png`, `attention.png` and `crops.png` of the newest teacher on images of the run's own data."""
    config = load_config(run)
    if config.data.source is None:
        return
    subject = open_subject(str(run))
    model, mean, std = subject.model, subject.own.preprocessing.mean, subject.own.preprocessing.std
    images = read_pictures(subject, None, None, picture_size(model)).images
    folder = view_folder(subject)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_pixels(images, mean, std)
    write_picture(folder / "pca.png", pca_sheet(model, images, pixels))
    write_picture(folder / "attention.png", attention_sheet(model, images[:6], pixels[:6]))
    batch, _ = first_batch(config, run_source(subject), model.patch_size, min(6, config.batch_size))
    write_picture(folder / "crops.png", crop_sheet(batch, mean, std, model.patch_size))
