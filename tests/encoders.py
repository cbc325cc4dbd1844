"""Small encoders for the tests of evaluators: a register ViT with random weights whose features say something."""

from __future__ import annotations

from pathlib import Path

import torch

from dinoreg.evaluation.backbones.encoder import NativeEncoder, wrap
from dinoreg.evaluation.context import Context
from dinoreg.models.vit import RegisterViT


def small_vit(seed: int = 0, patch_size: int = 8, image_size: int = 32, depth: int = 2) -> RegisterViT:
    """Width 64, LayerScale off: its class token depends on the picture from the start."""
    torch.manual_seed(seed)
    model = RegisterViT(
        image_size=image_size,
        patch_size=patch_size,
        dim=64,
        depth=depth,
        heads=1,
        num_registers=4,
        layerscale=None,
        init_std=0.05,
    )
    return model.eval()


def small_encoder(seed: int = 0, **options: int) -> NativeEncoder:
    encoder = wrap(small_vit(seed, **options), "small")
    assert isinstance(encoder, NativeEncoder)
    return encoder


def context(folder: Path, image_size: int = 32, seed: int = 0, examples: bool = False) -> Context:
    return Context(
        features=folder / "features",
        state=folder / "state",
        examples=folder / "examples" if examples else None,
        seed=seed,
        image_size=image_size,
        batch_size=16,
        workers=0,
        num_examples=4,
    )
