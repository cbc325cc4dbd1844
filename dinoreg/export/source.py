"""What is exported: a model, the pixels it expects, and the run it came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dinoreg.checkpoint.run_folder import run_of
from dinoreg.models.vit import RegisterViT, as_pair, resample_positions
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import is_number
from dinoreg.weights.load import load, load_reported
from dinoreg.weights.resolve import find_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """How pictures become input: values in [0, 1], minus `mean`, over `std`, channel by channel.

    size    height and width in pixels of the crop that the model is made for
    origin  where the numbers come from: "the run", "the file" or "assumed" (published DINOv2's)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    origin: str


@dataclass(frozen=True)
class Source:
    """A model to export.

    given     what the caller named, without the folders above it, which are nobody else's business
    path      the weight file, None for random weights
    run       the run folder it came out of, if it did
    metadata  the JSON beside a teacher file, what a library's folder says of preprocessing, else {}
    """

    model: RegisterViT  # float32, on the CPU, in evaluation mode
    given: str
    path: Path | None
    run: Path | None
    pixels: Pixels
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        step = self.metadata.get("step")
        return step if isinstance(step, int) and not isinstance(step, bool) else None


def read_source(weights: str | Path, size: int | Sequence[int] | None = None) -> Source:
    """The model that `weights` means (see `dinoreg.load`), its positions resampled to `size` if one is given.

    size    height and width in pixels, or one for both
    raises  UserError as `dinoreg.load` does, or if the patch size does not divide `size`
    """
    path = find_weights(weights)
    metadata: dict[str, Any] = {}
    if path is None:
        model = load(weights).float()
    else:
        loaded = load_reported(weights)
        model, metadata = loaded.model.float(), loaded.weights.metadata
    target = None if size is None else checked_size(size, model.patch_size)
    run = run_of(path) if path is not None else None
    pixels = _pixels(model, metadata)
    if target is not None:
        model, pixels = resized(model, target), replace(pixels, size=target)
    given = f"{path.resolve().parent.name}/{path.name}" if path is not None else str(weights)
    if run is not None and path is not None:
        given = f"{run.resolve().name}/{path.parent.name}/{path.name}"
    return Source(model.eval().requires_grad_(False), given, path, run, pixels, metadata)


def checked_size(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """(height, width); UserError unless they are positive multiples of the patch size."""
    height, width = as_pair(size, "size")
    for extent in (height, width):
        if extent % patch_size:
            low = extent // patch_size * patch_size
            near = f"{low} or {low + patch_size}" if low else str(patch_size)
            raise UserError(f"size={size}: {extent} is not a multiple of the patch size {patch_size}; try {near}")
    return height, width


def resized(model: RegisterViT, size: tuple[int, int]) -> RegisterViT:
    """The same model with its positions resampled, its own way, to be native to images of `size`."""
    if size == model.image_size:
        return model
    with torch.device("meta"):
        other = RegisterViT(**(model.architecture() | {"image_size": list(size)}))
    state = dict(model.state_dict())
    positions = state["pos_embed"]
    moved = resample_positions(positions[:, 1:], model.grid, other.grid, model.antialias, model.position_offset)
    state["pos_embed"] = torch.cat([positions[:, :1], moved], dim=1)
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)


def _pixels(model: RegisterViT, metadata: dict[str, Any]) -> Pixels:
    """Statistics and size as the files beside the weights say, else as DINOv2 was published."""
    channels = model.in_channels
    stated = metadata.get("preprocessing")
    stated = stated if isinstance(stated, dict) else {}
    origin = "the run" if "architecture" in metadata else "the file"
    mean, std = _numbers(stated.get("mean"), channels), _numbers(stated.get("std"), channels)
    size = _size(stated.get("image_size"), model.patch_size) or model.image_size
    if mean is None or std is None or not all(std):
        origin = "assumed"
        plain = channels != 3  # nothing is known of other channels: values in [0, 1] as they are
        mean, std = ((0.0,) * channels, (1.0,) * channels) if plain else (IMAGENET_MEAN, IMAGENET_STD)
    return Pixels(mean, std, size, origin)


def _numbers(values: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(values, list) or len(values) != count or not all(map(is_number, values)):
        return None
    return tuple(map(float, values))


def _size(value: Any, patch_size: int) -> tuple[int, int] | None:
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(extent, int) for extent in pair):
        return None
    return (pair[0], pair[1]) if all(v > 0 and v % patch_size == 0 for v in pair) else None
