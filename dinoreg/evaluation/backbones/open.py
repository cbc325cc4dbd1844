"""`weights=` as an encoder: a run, a file or folder of Meta, timm or transformers, `random:NAME`, a ViT of timm.

Whatever RegisterViT can hold exactly is opened as one; what it cannot hold runs in the library it comes from. To have
timm's own model run, say so: `timm:NAME` or `timm:NAME:FILE`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dinoreg.checkpoint.run_folder import run_of
from dinoreg.checkpoint.steps import watched_in
from dinoreg.config.option import nearest
from dinoreg.data.preprocess import Preprocessing
from dinoreg.evaluation.backbones.encoder import RANDOM_WEIGHTS, Encoder, NativeEncoder, seeded, wrap
from dinoreg.models.vit import RegisterViT, patch_grid
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.device import pick_device, pick_precision
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.json_files import step_in
from dinoreg.weights.architecture import NotHeld, library_of, preprocessing_of
from dinoreg.weights.files import find_backbone, read_file
from dinoreg.weights.load import describe_preprocessing, load, load_reported
from dinoreg.weights.names import not_there, random_name
from dinoreg.weights.resolve import FILES, find_weights

logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An encoder, and the run that its weights belong to.

    run   the run folder, or None
    step  of the run's weights; 0 for weights from elsewhere
    """

    encoder: Encoder
    run: Path | None = None
    step: int = 0

    @property
    def name(self) -> str:
        """The encoder's."""
        return self.encoder.name

    @property
    def own(self) -> NativeEncoder:
        """An encoder that is one of ours, as those of `open_native` are; of a bag of channels that of one of them."""
        assert isinstance(self.encoder, NativeEncoder)
        return self.encoder.of_one_channel

    @property
    def model(self) -> RegisterViT:
        """The network of `own`."""
        return self.own.module


def open_model(model: Any, device: str, precision: str) -> Opened:
    """The encoder of a model of ours, timm or transformers, or of what `weights=` takes, for the options of a verb.

    raises  UserError as `open_encoder`, `pick_device` and `pick_precision`
    """
    place = pick_device(device)
    dtype = pick_precision(precision, place)
    if isinstance(model, (str, Path)):
        return open_encoder(str(model), place, dtype)
    return Opened(wrap(model, device=place, dtype=dtype))


def open_encoder(weights: str, device: torch.device | str, dtype: torch.dtype) -> Opened:
    """The encoder that `weights=` means.

    weights  as in `dinoreg eval`: a run, a file, a folder, random:NAME, or timm:NAME[:FILE]
    dtype    of the matrix products
    raises   UserError, in one line, for weights that are missing, damaged or of an unknown kind
    """
    if weights.startswith("timm:"):
        return Opened(_from_timm(weights, device, dtype))
    try:
        return open_native(weights, device, dtype)
    except NotHeld:
        file = find_weights(weights)
        if file is None or library_of(file.parent) != "transformers":
            raise
        return Opened(_from_transformers(file.parent, device, dtype))


def transform(model: str | Path | RegisterViT, size: int | Sequence[int] | None = None) -> Preprocessing:
    """What the weights of a model state of pictures, as a function: `transform(model)(picture)` is the model's input.

    model    weights as for `dinoreg.load`, or the model that it returned
    size     (height, width) of the crop in pixels, or one for both; None: as stated
    returns  picture -> (C, height, width) float32, normalised; a picture is a path, the bytes of a file, a Pillow image
             or an array (H, W) or (H, W, C). `mean`, `std`, `size`, `short_side` and `value_range` say what is done
    raises   UserError as `dinoreg.load`, and for a size that the patch size does not divide
    """
    if isinstance(model, RegisterViT):
        stated, patch_size = Preprocessing.of_model(model), model.patch_size
    else:
        encoder = open_encoder(str(model), "cpu", torch.float32).encoder
        stated, patch_size = encoder.preprocessing, encoder.patch_size
    patch_grid(stated.at(size).size, patch_size)
    return stated.at(size)


def open_native(weights: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Opened:
    """A NativeEncoder of a run, a file, a library's folder or random:NAME, with the preprocessing stated beside it.

    The random weights of a name are always the same, and LayerScale is 1 in them (see `random_init`).

    dtype   of the matrix products
    raises  UserError, in one line, for weights that are missing or damaged; NotHeld for a folder with a model that
            RegisterViT cannot hold
    """
    file = find_weights(weights)
    if file is None:
        if (random := random_name(weights)) is None:
            raise not_there(weights)
        with seeded(0):
            model = load(weights, device, layerscale=1.0)
        return Opened(wrap(model, f"{random}{RANDOM_WEIGHTS}", device=device, dtype=dtype))
    folder = file.parent if file.name in FILES and library_of(file.parent) else None
    loaded = load_reported(file, device)
    step = step_in(file.stem)
    run = None if step is None else run_of(file)
    name = file.stem
    if run is not None:
        name = f"{run.resolve().name} at step {step:,}"
    elif folder is not None or Path(weights).is_dir():
        name = (folder or Path(weights)).resolve().name
    if loaded.weights.others:  # the file holds several networks
        name = f"{name} ({loaded.weights.where})"
    encoder = NativeEncoder(loaded.model, name, Preprocessing.of_model(loaded.model, file), device, dtype)
    encoder.watched = None if run is None or step is None else watched_in(run, step)
    return Opened(encoder, run, step or 0)


def _from_timm(weights: str, device: torch.device | str, dtype: torch.dtype) -> Encoder:
    """timm:NAME with random weights, or timm:NAME:FILE with a state dict of the user's (safetensors or torch)."""
    with reworded(f"weights={weights}: timm is missing; {install('timm')}", ImportError):
        import timm
    _, name, file = (*weights.split(":", 2), "")[:3]
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"weights={weights}: timm has no model {name!r}{nearest(name, timm.list_models())}")
    try:
        with seeded(0):
            model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise UserError(f"weights={weights}: expected a ViT; {name} takes no dynamic_img_size") from None
    if file:
        _load_state(model, Path(file), weights)
    return wrap(model, f"timm {name}{'' if file else RANDOM_WEIGHTS}", device=device, dtype=dtype)


def _load_state(model: nn.Module, path: Path, weights: str) -> None:
    if not path.is_file():
        raise UserError(f"weights={weights}: {path} does not exist")
    content = read_file(path)
    # Torn files and wrong shapes raise many kinds of exception.
    with reworded(f"weights={weights}: {path} does not fit the model", Exception):
        missing, unexpected = model.load_state_dict(find_backbone(content).state, strict=False)
    extra = [key for key in unexpected if not key.startswith(("head.", "fc_norm."))]
    if missing or extra:
        first = (list(missing) + extra)[0]
        raise UserError(f"weights={weights}: {path} does not fit the model, the first wrong tensor is {first!r}")


def _from_transformers(path: Path, device: torch.device | str, dtype: torch.dtype) -> Encoder:
    """A folder written by `save_pretrained`; nothing is fetched."""
    with reworded(f"weights={path}: transformers is missing; {install('transformers')}", ImportError):
        import transformers
    with reworded(f"weights={path}: not a model of transformers", Exception):  # whatever its parts raise
        model, info = transformers.AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        model = model.float()
    # The library fills what it misses with random numbers; only the pooler, which no evaluation uses, may be missing.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"weights={path}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    stated = preprocessing_of(path, "transformers")
    logger.warning("%s: %s", path, describe_preprocessing(stated))
    return wrap(model, path.resolve().name, stated, device, dtype)
