"""What is exported: a model, the pixels it expects, and the run it came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinoreg.checkpoint.run_folder import run_of
from dinoreg.data.preprocess import Preprocessing
from dinoreg.models.vit import RegisterViT, as_pair
from dinoreg.runtime.errors import UserError
from dinoreg.weights.load import load, load_reported, resample_pos_embed, select_channels
from dinoreg.weights.names import random_name
from dinoreg.weights.resolve import find_weights

Size = int | Sequence[int]


@dataclass(frozen=True)
class Source:
    """A model to export, and how pictures become its input.

    given       what the caller named, without the folders above it, which are private
    path        the weight file, None for random weights
    run         the run folder it came out of, if it did
    origin      "step" and "config_hash" of the run, as far as the JSON beside the weights says them
    size_given  whether the caller wants this image size, and no other where the format can be made for one
    """

    model: RegisterViT  # float32, on the CPU, in evaluation mode
    given: str
    path: Path | None
    run: Path | None
    origin: dict[str, Any]
    preprocessing: Preprocessing
    size_given: bool


def read_source(weights: str | Path, size: Size | None = None, channels: Sequence[int] | None = None) -> Source:
    """The model that `weights` means (see `dinoreg.load`), its positions resampled to `size` if one is given.

    size      height and width in pixels, or one for both
    channels  those that it shall take, see `select_channels`; None: all
    raises    UserError as `dinoreg.load` and `select_channels` do, or if the patch size does not divide `size`
    """
    path, run, metadata, given = find_weights(weights), None, {}, str(weights)
    if path is None:
        model = load(weights)
        given = f"{random_name(weights)} (random weights)"
    else:
        loaded = load_reported(weights)
        model, metadata, run = loaded.model, loaded.weights.metadata, run_of(path)
        given = f"{path.resolve().parent.name}/{path.name}"
    if path is not None and run is not None:
        given = f"{run.resolve().name}/{path.parent.name}/{path.name}"
    if channels is not None:
        model = select_channels(model, channels)
    preprocessing = Preprocessing.of_model(model, path)
    if size is not None:
        preprocessing = preprocessing.at(checked_size(size, model.patch_size))
        model = resized(model, preprocessing.size)
    kinds = {"step": int, "config_hash": str}
    origin = {key: metadata[key] for key, kind in kinds.items() if type(metadata.get(key)) is kind}
    model.requires_grad_(False)
    return Source(model, given, path, run, origin, preprocessing, size is not None)


def checked_size(size: Size, patch_size: int) -> tuple[int, int]:
    """(height, width) in pixels; UserError unless they are positive multiples of the patch size."""
    height, width = as_pair(size, "size")
    for extent in (height, width):
        if extent % patch_size:
            low = extent // patch_size * patch_size
            near = f"{low} or {low + patch_size}" if low else str(patch_size)
            raise UserError(f"size={size}: {extent} is not a multiple of the patch size {patch_size}; try {near}")
    return height, width


def resized(model: RegisterViT, size: tuple[int, int]) -> RegisterViT:
    """The same model with its positions resampled, as it does itself, to be native to images of `size`.

    size  height and width in pixels, multiples of the patch size
    """
    if size == model.image_size:
        return model
    with torch.device("meta"):
        other = RegisterViT(**(model.architecture() | {"image_size": list(size)}))
    state = model.state_dict()
    if model.pos_embed is not None:
        resampling = model.antialias, model.position_offset
        state["pos_embed"] = resample_pos_embed(model.pos_embed, model.grid, other.grid, *resampling)
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)
