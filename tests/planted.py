"""A model with planted artifacts: one hidden unit that fires on flat patches and gives them an enormous norm.

`python tests/planted.py FOLDER` writes it, the same model without the plant, and images for both.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dinoreg.models.vit import RegisterViT

SIZE, PATCH, DEPTH, BLOCK, UNIT = 64, 8, 4, 1, 17
FLAT = 3  # patches a side of the flat squares


def planted_vit(norm: float = 60.0, ffn: str = "mlp", registers: int = 0) -> RegisterViT:
    """Channel 0 is a constant that LayerNorm makes large where a patch has no texture; unit 17 of block 1 reads it.

    norm  what it adds to a flat patch, in a direction of its own; 0 leaves the model clean
    """
    torch.manual_seed(3)
    model = RegisterViT(
        image_size=SIZE,
        patch_size=PATCH,
        dim=48,
        depth=DEPTH,
        heads=3,
        num_registers=registers,
        ffn=ffn,
        layerscale=None,
        init_std=0.01,
    )
    with torch.no_grad():
        model.pos_embed.zero_()
        model.cls_token.normal_()
        projection = model.patch_embed.proj
        projection.weight.normal_(std=0.06)
        assert projection.bias is not None
        projection.weight[0] = 0
        projection.bias.zero_()
        projection.bias[0] = 1.5
        if norm:
            mlp = model.blocks[BLOCK].mlp
            reader, writer = (mlp.fc1, mlp.fc2) if ffn == "mlp" else (mlp.w12, mlp.w3)
            reader.weight[UNIT] = 0
            reader.weight[UNIT, 0] = 1.0
            reader.bias[UNIT] = -4.5  # a flat patch reads nearly sqrt(48), a textured one about 3
            direction = torch.zeros(48)
            direction[-8:] = torch.tensor([1.0, -1.0] * 4)
            strength = norm / 8**0.5 / 2.4
            if ffn == "swiglu":  # the value beside the gate is a constant, and negative
                half = mlp.w12.out_features // 2
                reader.weight[half + UNIT] = 0
                reader.bias[half + UNIT] = -1.0
            writer.weight[:, UNIT] = direction * strength
            for block in model.blocks[BLOCK + 1 :]:  # later blocks look for that direction: a sink of attention
                queries, keys = block.attn.qkv.bias[:48], block.attn.qkv.weight[48:96]
                queries[::16] = 3.0
                keys[::16] = 0.3 * direction
    return model.eval()


def patchy_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with one flat grey square an image: images (n, 3, 64, 64) uint8 and where it is, (n, N) bool."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    side = SIZE // PATCH
    flat = torch.zeros(count, side, side, dtype=torch.bool)
    for number in range(count):
        top, left = torch.randint(0, side - FLAT + 1, (2,), generator=generator).tolist()
        flat[number, top : top + FLAT, left : left + FLAT] = True
        extent = slice(top * PATCH, (top + FLAT) * PATCH), slice(left * PATCH, (left + FLAT) * PATCH)
        images[number, :, extent[0], extent[1]] = 116  # close to the mean colour
    return images, flat.flatten(1)


def save(model: RegisterViT, path: Path) -> Path:
    """A teacher file of ours with its JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"backbone.{key}": value.contiguous() for key, value in model.state_dict().items()}, path)
    description = {
        "format": "dinoreg-teacher",
        "version": 1,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "architecture": model.architecture(),
        "preprocessing": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "image_size": SIZE},
    }
    path.with_suffix(".json").write_text(json.dumps(description))
    return path


def write_images(folder: Path, count: int = 24, classes: int = 2) -> Path:
    """Patchy images in a subfolder a class."""
    images, _ = patchy_images(count)
    for number, image in enumerate(images):
        where = folder / f"class_{number % classes}"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(where / f"{number:03d}.png")
    return folder


if __name__ == "__main__":
    root = Path(sys.argv[1])
    save(planted_vit(), root / "planted.safetensors")
    save(planted_vit(norm=0), root / "clean.safetensors")
    write_images(root / "images", count=120)
