"""What the networks see: the augmented crops of a training batch, and the patches hidden from the student."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoreg.config.load import Config, find_config, load_config
from dinoreg.data.display import as_rgb, channels_shown
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.source import Source
from dinoreg.data.statistics import with_statistics
from dinoreg.models.registry import parse_name
from dinoreg.runtime.json_files import newest_teacher, step_in
from dinoreg.visualize.gallery import GREY, Gallery, sheet, tile, to_pixels
from dinoreg.visualize.subject import config_source, safe_name

TILE = 112  # pixels, the height of a global crop


def hide(pixels: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
    """An image with its masked patches in grey: (H, W, 3) uint8.

    pixels      (H, W, 3) uint8
    mask        (N,) bool, True where a patch is hidden, row by row
    patch_size  pixels, a divisor of H and W
    """
    grid = mask.reshape(pixels.shape[0] // patch_size, pixels.shape[1] // patch_size)
    hidden = grid.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    return np.where(hidden[..., None], np.array(GREY, dtype=np.uint8), pixels)


def crop_sheet(
    batch: Batch, mean: Sequence[float], std: Sequence[float], patch_size: int, originals: Sequence[Image.Image] = ()
) -> Image.Image:
    """One row per image: each global crop as the teacher and as the student sees it, then the local crops.

    mean, std   one number per channel, on the scale of [0, 1], to undo the normalisation
    patch_size  pixels
    originals   of the first images, drawn in front of these rows alone; without them every image has a row

    A local crop is drawn smaller than a global one, in proportion.
    """
    images = len(batch.global_crops) // 2
    views, masks = to_pixels(batch.global_crops, mean, std), batch.mask.cpu().numpy()
    local = to_pixels(batch.local_crops, mean, std) if batch.local_crops is not None else views[:0]
    num_local, small = len(local) // images, max(1, round(TILE * local.shape[1] / views.shape[1]))
    rows = []
    for image in range(len(originals) or images):
        row = list(originals[image : image + 1])
        for view in (image, images + image):
            row += [tile(views[view], TILE), tile(hide(views[view], masks[view], patch_size), TILE)]
        rows.append(row + [tile(each, small) for each in local[image::images]])
    columns = ["image"] * bool(originals) + ["global 1", "masked", "global 2", "masked"]
    return sheet(rows, columns + [f"local {i + 1}" for i in range(num_local)])


# ------------------------------------------------------------------------------------------------------------
# dinoreg view crops


def view_crops(config: str, overrides: Sequence[str] | Mapping[str, Any], *, out: str | None, num: int) -> Path:
    """Draw the first training batch that a config makes of its data; returns the page's path.

    config     a name in `configs/`, a YAML file or a run folder
    overrides  keys of the config, as `load_config` takes them
    num        images that are shown
    raises     UserError, before anything is written, for what is unknown, missing or does not fit
    """
    settings = load_config(config, overrides)
    source = config_source(settings.data, "data: missing; name a folder of images (data=photos/), a list, or scenes")
    settings, _ = with_statistics(settings, source)
    patch = int(parse_name(settings.model.name)["patch_size"])
    # Masks are drawn for a batch as a unit, so its size is the run's, unless that is far more than is shown.
    batch, unreadable = first_batch(settings, source, patch, min(max(num, 8), settings.batch_size))
    indices = [int(index) for index in batch.sample_ids[:num]]
    names = [source.name(index) for index in indices]
    gallery = Gallery("crops", Path(out) if out else default_folder(config), {"images": names})
    originals = [_original(source, index, settings) for index in indices]
    drawn = crop_sheet(batch, settings.augment.mean, settings.augment.std, patch, originals)
    hidden = batch.mask.float().mean(dim=1)
    return gallery.write_page(
        f"Training crops of {config}",
        {"config": config, "hash": settings.hash()},
        settings=settings,
        patch=patch,
        total=len(source),
        shares=hidden[hidden > 0].tolist(),
        num_masks=len(hidden),
        crops=gallery.picture("crops", drawn, "training crops"),
        images=[(name,) for name in names],
        skipped=sorted(unreadable.items()),
        channels=channels_shown(settings.model.in_channels),
    )


def first_batch(config: Config, source: Source, patch_size: int, batch_size: int) -> tuple[Batch, dict[str, str]]:
    """The first training batch that a config makes of a source, and {name: reason} of images that could not be read.

    patch_size  pixels
    """
    model = config.model
    views = Views(config.crops, config.augment, config.mask, patch_size, model.crop_channels, bag_of=model.bag_of)
    reading = replace(config.data, workers=0, max_bad_fraction=1.0)
    deep = config.data.range is not None
    with BatchLoader(source, views, reading, batch_size=batch_size, seed=config.seed, deep=deep) as loader:
        return next(loader), loader.bad


def default_folder(config: str) -> Path:
    """`RUN/view/<newest step>/` for a run folder, else `view/<name>/`."""
    path = find_config(config)
    if path.name == "config.yaml" and Path(config).is_dir():
        run = Path(config)
        return run / "view" / f"{step_in((newest_teacher(run) or run).stem) or 0:07d}"
    return Path("view") / safe_name(path.stem)


def _original(source: Source, index: int, settings: Config) -> Image.Image:
    image = source.image(index, settings.model.in_channels, by_pillow=settings.data.reference_decode)
    return tile(as_rgb(image.pixels().permute(1, 2, 0).numpy()), TILE)
