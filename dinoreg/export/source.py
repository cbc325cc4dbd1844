"""What is exported: a model, the pixels it expects, and the run it came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinoreg.checkpoint.run_folder import run_of
from dinoreg.models.vit import RegisterViT, as_pair
from dinoreg.runtime.errors import UserError
from dinoreg.weights.architecture import as_sides
from dinoreg.weights.load import load, load_reported, resample_pos_embed
from dinoreg.weights.names import random_name
from dinoreg.weights.preprocessing import stated_preprocessing, stated_range
from dinoreg.weights.resolve import find_weights


@dataclass(frozen=True)
class Source:
    """A model to export, and how pictures become its input: values in [0, 1], minus `mean`, over `std`, by channel.

    given       what the caller named, without the folders above it, which are private
    path        the weight file, None for random weights
    run         the run folder it came out of, if it did
    origin      "step" and "config_hash" of the run, as far as the JSON beside the weights says them
    assumed     whether no mean and std were recorded: published DINOv2's, or values as they are for other channels
    size        height and width in pixels of the crop that the model is made for
    size_given  whether the caller wants this image size, and no other where the format can be made for one
    """

    model: RegisterViT  # float32, on the CPU, in evaluation mode
    given: str
    path: Path | None
    run: Path | None
    origin: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: bool
    size: tuple[int, int]
    size_given: bool
    value_range: list[float] | None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, std and image size in pixels for the JSON beside weights, which `read_source` reads."""
        size: Any = self.size[0] if self.size[0] == self.size[1] else list(self.size)
        return {"mean": list(self.mean), "std": list(self.std), "image_size": size, "range": self.value_range}


def read_source(weights: str | Path, size: int | Sequence[int] | None = None) -> Source:
    """The model that `weights` means (see `dinoreg.load`), its positions resampled to `size` if one is given.

    size    height and width in pixels, or one for both
    raises  UserError as `dinoreg.load` does, or if the patch size does not divide `size`
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
    stated = metadata.get("preprocessing")
    stated = stated if isinstance(stated, dict) else {}
    assumed = not (stated.get("mean") and stated.get("std"))
    mean, std = stated_preprocessing({} if assumed else stated, model.in_channels, path, ((0.0,), (1.0,)))
    native = as_sides(stated.get("image_size"))
    if native is None or any(side % model.patch_size for side in native):
        native = model.image_size
    if size is not None:
        native = checked_size(size, model.patch_size)
        model = resized(model, native)
    kinds = {"step": int, "config_hash": str}
    origin = {key: metadata[key] for key, kind in kinds.items() if type(metadata.get(key)) is kind}
    model.requires_grad_(False)
    return Source(
        model, given, path, run, origin, mean, std, assumed, native, size is not None, stated_range(stated, path)
    )


def checked_size(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
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
    resampling = model.antialias, model.position_offset
    positions = resample_pos_embed(model.pos_embed, model.grid, other.grid, *resampling)
    other.load_state_dict(model.state_dict() | {"pos_embed": positions}, assign=True)
    return other.eval().requires_grad_(False)
