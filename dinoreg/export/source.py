"""What is exported: a model, the pixels it expects, and the run it came from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinoreg.checkpoint.run_folder import run_of
from dinoreg.data.preprocess import Preprocessing
from dinoreg.models.vit import RegisterViT, as_pair
from dinoreg.runtime.errors import UserError
from dinoreg.weights.load import load, load_reported, resample_pos_embed
from dinoreg.weights.names import random_name
from dinoreg.weights.resolve import find_weights


class Source:
    """A model to export: float32, on the CPU, in evaluation mode.

    given       what the caller named, without the folders above it, which are private
    path        the weight file, None for random weights
    run         the run folder it came out of, if it did
    origin      "step" and "config_hash" of the run, as far as the JSON beside the weights says them
    size_given  whether the caller wants this image size, and no other where the format can be made for one
    """

    def __init__(self, weights: str | Path, size: int | Sequence[int] | None = None) -> None:
        """The model that `weights` means (see `dinoreg.load`), its positions resampled to `size` if one is given.

        size    height and width in pixels, or one for both
        raises  UserError as `dinoreg.load` does, or if the patch size does not divide `size`
        """
        self.path, self.size_given = find_weights(weights), size is not None
        self.run: Path | None = None
        metadata: dict[str, Any] = {}
        if self.path is None:
            self.model = load(weights)
            self.given = f"{random_name(weights)} (random weights)"
        else:
            self.model, report = load_reported(weights)
            metadata, self.run = report.weights.metadata, run_of(self.path)
            self.given = f"{self.path.resolve().parent.name}/{self.path.name}"
            if self.run is not None:
                self.given = f"{self.run.resolve().name}/{self.path.parent.name}/{self.path.name}"
        self.preprocessing = Preprocessing.of_model(self.model, self.path)
        if size is not None:
            self.preprocessing = self.preprocessing.at(checked_size(size, self.model.patch_size))
            self.model = resized(self.model, self.preprocessing.size)
        kinds = {"step": int, "config_hash": str}
        self.origin = {key: metadata[key] for key, kind in kinds.items() if type(metadata.get(key)) is kind}
        self.model.requires_grad_(False)


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
    state = model.state_dict()
    if model.pos_embed is not None:
        resampling = model.antialias, model.position_offset
        state["pos_embed"] = resample_pos_embed(model.pos_embed, model.grid, other.grid, *resampling)
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)
