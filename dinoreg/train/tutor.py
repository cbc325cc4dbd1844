"""The frozen network that a run with `distill=` learns from, and what it sees of the crops.

It is no `teacher`, which is always the moving average of the student, also in such a run. Every process holds a
replica. A crop is cut at the larger of the two networks' sizes, so that neither sees an enlarged picture.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.config.load import Config
from dinoreg.config.option import check
from dinoreg.config.view_settings import CropSettings
from dinoreg.data.loader import Views
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.backbones.open import open_encoder
from dinoreg.models.registry import parse_name
from dinoreg.models.vit import Tokens
from dinoreg.runtime.device import per_channel
from dinoreg.runtime.errors import UserError


@dataclass(eq=False)
class Tutor:
    """A frozen encoder and the crops that it shares with the student.

    size          pixels a side, at which the encoder sees a crop
    student_size  the same of the student
    mean, std     of the crops' normalisation, one number for each channel or one for all
    """

    encoder: Encoder
    size: int
    student_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def network(self) -> nn.Module:
        """The encoder's network, with frozen weights."""
        module: nn.Module = self.encoder.module  # type: ignore[attr-defined]
        return module

    @property
    def note(self) -> str:
        """A line for the log."""
        return f"distill: {self.encoder.name}, which sees crops of {self.size} pixels; no masks, no local crops"

    def for_student(self, crops: Tensor) -> Tensor:
        """Crops (n, C, H, W), as they were cut, at the student's size."""
        return _resized(crops, self.student_size)

    def tokens(self, crops: Tensor) -> Tokens:
        """The encoder's tokens of crops (n, C, H, W), as they were cut; it normalises them its own way. float32."""
        mean, std = (per_channel(values, crops.device) for values in (self.mean, self.std))
        return self.encoder.tokens((_resized(crops, self.size) * std + mean).clamp(0, 1))


def _resized(crops: Tensor, size: int) -> Tensor:
    return crops if crops.shape[-1] == size else F.interpolate(crops, (size, size), mode="bicubic", antialias=True)


def as_cut(tutor: Tutor | None, crops: CropSettings, patch_size: int) -> tuple[CropSettings, int]:
    """How the loader cuts crops: with the larger of the two networks' sizes, and that one's patch size.

    patch_size  pixels, of the student
    """
    if tutor is None or tutor.size <= tutor.student_size:
        return crops, patch_size
    return replace(crops, global_size=tutor.size), tutor.encoder.patch_size


def views_of(config: Config, crops: CropSettings, patch_size: int, tutor: Tutor | None) -> Views:
    """What the loader of a run makes of an image.

    crops       of the stage that the run is in
    patch_size  pixels, of the student
    raises      UserError for settings that do not fit together
    """
    crops, patch_size = as_cut(tutor, crops, patch_size)
    loss, model = config.loss, config.model
    clean_size, related = loss.clean_size(crops.global_size), loss.paka_weight > 0
    return Views(crops, config.augment, config.mask, patch_size, model.crop_channels, clean_size, related, model.bag_of)


def load_tutor(config: Config, device: torch.device, dtype: torch.dtype) -> Tutor | None:
    """The network of `distill=`, on `device`; None without.

    dtype   of its matrix products
    raises  UserError for weights that cannot be read, other channels, a size that its patches do not divide, and a
            size without a network
    """
    if config.distill is None:
        if config.distill_size is not None:
            raise UserError("distill: missing; name the weights to learn from, distill=WEIGHTS (or distill_size=none)")
        return None
    encoder = open_encoder(config.distill, device, dtype).encoder
    channels, patch = config.model.crop_channels, encoder.patch_size
    as_crops = f"a network of {channels} channels, as crops have; it takes {encoder.in_channels}"
    check(encoder.in_channels == channels, "distill", config.distill, as_crops)
    student_size = config.crops.global_size
    size = config.distill_size or student_size // int(parse_name(config.model.name)["patch_size"]) * patch
    check(size % patch == 0, "distill_size", size, f"a multiple of the patch size {patch} of {config.distill}")
    return Tutor(encoder, size, student_size, config.augment.mean, config.augment.std)
