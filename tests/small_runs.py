"""A run folder with nothing but a config and a teacher file: what views and embeddings open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinoreg.checkpoint.format import write_teacher
from dinoreg.config.load import load_config, to_yaml
from dinoreg.models.vit import RegisterViT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STEP = 7


def tiny_model(registers: int = 4, depth: int = 3, image_size: Any = (24, 32), **options: Any) -> RegisterViT:
    """Three heads, width 12, patches of 8 pixels; its attention is far from uniform."""
    torch.manual_seed(0)
    options = {"patch_size": 8, "dim": 12, "heads": 3, "layerscale": None, "init_std": 0.4, **options}
    return RegisterViT(image_size=image_size, depth=depth, num_registers=registers, **options).eval()


def write_run(folder: Path, model: RegisterViT, data: str = "scenes:count=30,size=32", **preprocessing: Any) -> Path:
    """`folder` as a run of this model; `preprocessing` replaces what the teacher's JSON states."""
    channels = model.in_channels
    stated = {"mean": list(MEAN[:channels]), "std": list(STD[:channels]), "image_size": 32, **preprocessing}
    description = {"architecture": model.architecture(), "preprocessing": stated, "config_hash": "0" * 12}
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    write_teacher(folder, STEP, state, description)
    overrides: dict[str, Any] = {"data": data, "steps": STEP, "batch_size": 4, "model.name": "vitt8_reg4"}
    overrides |= {"crops.global_size": 32, "crops.local_size": 16, "crops.num_local": 2}
    (folder / "config.yaml").write_text(to_yaml(load_config(None, overrides)))
    return folder
