"""`dinoreg export` and `dinoreg.export`: a model for another library, on request with a test-time register added."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from dinoreg.commands.options import ExportOptions, RegistersOptions
from dinoreg.commands.registers import read_pictures
from dinoreg.config.option import read
from dinoreg.data.open import is_scenes
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.export.certificate import summary
from dinoreg.export.run import export as write
from dinoreg.export.run import read_certificate
from dinoreg.export.source import Source
from dinoreg.registers.measure import fit, patch_norms
from dinoreg.registers.outliers import find
from dinoreg.registers.test_time import CLEANED
from dinoreg.runtime.device import pick_device
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.printable import print_status, printable


def export(weights: str | Path, format: str, out: str | Path, **options: Any) -> Path:
    """Write a model for another library, with a certificate that this library computes the same, and a model card.

    weights  a run folder, a weight file or random:NAME, as for `dinoreg.load`
    format   "timm" | "transformers" | "meta" | "safetensors" | "onnx"
    out      the folder to write; it must not exist, or be empty
    options  size=224 or (height, width): positions are resampled to it beforehand. An ONNX graph then takes this size
             only; without it, any. channels=[0, 2]: those that the exported model shall take, see
             `dinoreg.select_channels`. registers="test_time": a model that was trained without any gets a token that
             takes over the outliers' norm in images="photos/", a folder, a list of paths, or scenes (arXiv 2506.08010);
             not for timm and transformers, whose code cannot do this
    returns  the folder
    raises   UserError for a wrong argument, a missing library, or images without outliers, before anything is written;
             RunError if the library cannot load what was written or differs from the source above the bound, or over a
             tenth of the outliers stay: then nothing is left in `out`
    """
    given, _ = read(ExportOptions, {"weights": weights, "format": format, "out": out, **options})
    if (given.registers, given.images is None) not in ((None, True), ("test_time", False)):
        said = f"registers={given.registers} images={given.images}"
        raise UserError(f"{said}: expected test_time and a folder, or neither")
    added = partial(_with_register, images=str(given.images)) if given.registers else None
    return write(given.weights, given.format, given.out, given.size, given.channels, added)


def export_command(options: ExportOptions) -> None:
    """Run `dinoreg export`: print what the certificate says, and the folder."""
    folder = export(**vars(options))
    print(f"certificate: {summary(read_certificate(folder))}\nexport: {printable(str(folder))}")


def _with_register(source: Source, images: str) -> Source:
    """The source with a test-time register for its outliers in some images; raises as `export`."""
    if source.model.num_registers:
        raise UserError(f"registers=test_time: the model has {source.model.num_registers} registers already")
    encoder = NativeEncoder(source.model, source.given, source.preprocessing, pick_device("auto"))
    options = RegistersOptions(weights=source.given, images=images, labels=False)
    pictures, _ = read_pictures(options, source.preprocessing)
    print_status(f"{encoder.name}: looking for register neurons")
    norms = patch_norms(encoder, pictures)
    limit, before, *_ = find(norms)
    changed, _ = fit(encoder, pictures, norms)
    left = float((patch_norms(changed, pictures)[-1] > limit.value).double().mean())
    found = f"{before.share:.3%} of {norms[-1].numel():,} patches were outliers, {left:.3%} are left"
    if left > CLEANED * before.share:
        raise RunError(f"registers=test_time: {found}, with the best of up to 100 register neurons; nothing written")
    name = pictures.source if is_scenes(images) else os.path.basename(os.path.abspath(images))
    seen = f"In {len(pictures.images):,} images ({name}) {found}"
    return source.of(changed.module.cpu(), test_time=seen)
