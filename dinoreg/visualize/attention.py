"""What the class token and each register attend to: attention weights of any block and head, as pictures."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.models.attention import attention_weights
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.visualize.gallery import ModelGallery, colour_map, map_row, sheet, tile
from dinoreg.visualize.subject import safe_name

TILE = 118  # pixels, the height of a map


@torch.no_grad()
def attention_rows(model: RegisterViT, images: Tensor, layers: Sequence[int]) -> Tensor:
    """The attention of the class token and the registers to all tokens, in several blocks and one pass.

    images   (B, C, H, W) normalised, on the model's device
    layers   indices of blocks from 0, ascending
    returns  (L, B, heads, 1+R, T) float32: rows of `RegisterViT.attention`, each summing to one. Only these rows are
             computed: the entire matrix of a large picture would not fit into memory
    """
    special = 1 + model.num_registers
    tokens = model.intermediate_tokens(images, [layer - 1 for layer in layers if layer > 0], norm=False)
    inputs = [torch.cat([each.cls[:, None], each.registers, each.patches], 1) for each in tokens]
    if 0 in layers:
        inputs.insert(0, model.embed(images))
    rows, tables = [], model.rope_tables([images])
    for layer, x in zip(layers, inputs, strict=True):
        block: Any = model.blocks[layer]
        qkv = block.attn.project(block.norm1(x.flatten(0, 1)), (x.shape[:2],), tables)
        q, k, _ = qkv.unflatten(0, x.shape[:2]).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_dim)
        rows.append(attention_weights(q[:, :, :special].float(), k.float()))
    return torch.stack(rows)


def attention_maps(model: RegisterViT, images: Tensor) -> Tensor:
    """The attention of the class token and the registers to the patches in the last block, averaged over heads.

    images   (B, C, H, W) normalised, on the model's device
    returns  (B, 1+R, H/p, W/p) float32 in [0, 1]: the share of a token's attention that a patch gets
    """
    special = 1 + model.num_registers
    weights = attention_rows(model, images, [model.depth - 1])[0].mean(dim=1)  # (B, 1+R, T)
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    return weights[:, :, special:].unflatten(-1, grid)


class Budget(NamedTuple):
    """How one token divides its attention, means over images and heads: shares in [0, 1] that sum to one."""

    cls: float
    registers: float
    patches: float
    spread: float  # effective number of patches: exp of the entropy of the shares among patches


def attention_budget(rows: Tensor) -> list[Budget]:
    """How the class token and each register divide their attention in one block.

    rows     (B, heads, 1+R, T), each summing to one
    returns  a Budget for each of the 1 + R tokens
    """
    cls, registers, patches = rows.tensor_split([1, rows.shape[2]], dim=-1)
    total = patches.sum(-1)
    spread = torch.special.entr(patches / total[..., None].clamp(min=1e-12)).sum(-1).exp()
    figures = torch.stack([cls[..., 0], registers.sum(-1), total, spread], dim=-1)  # (B, heads, 1+R, 4)
    return [Budget(*each) for each in figures.mean(dim=(0, 1)).tolist()]


def token_names(num_registers: int) -> list[str]:
    """Names of the class token and the registers, in the order of the sequence."""
    return ["CLS"] + [f"register {number + 1}" for number in range(num_registers)]


def attention_sheet(model: RegisterViT, images: Tensor, pixels: np.ndarray) -> Image.Image:
    """One row per image: the picture, then the map of the class token and of each register (1 + 1 + R tiles).

    images  (B, C, H, W) normalised, on the model's device
    pixels  (B, H, W, 3) uint8, the same images to show

    Every map is scaled to its brightest patch.
    """
    maps = attention_maps(model, images).cpu().numpy()
    rows = [map_row(picture, map(colour_map, tokens), TILE) for picture, tokens in zip(pixels, maps)]
    return sheet(rows, ["image", *token_names(model.num_registers)])


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map over its picture: grey and dim where the attention is low, in the map's colours where it is high.

    pixels   (H, W, 3) uint8
    values   (h, w) at least 0
    returns  (H, W, 3) uint8
    """
    small = Image.fromarray((values / (values.max() or 1.0)).astype(np.float32))
    shares = np.asarray(small.resize(pixels.shape[1::-1], Image.Resampling.BILINEAR))
    grey, weight = 0.6 * pixels.mean(axis=2, keepdims=True), 0.7 * shares[..., None]
    return (grey * (1 - weight) + colour_map(shares, 1.0) * weight).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# dinoreg view attention


def view_attention(*, layer: str, head: str, **request: Any) -> Path:
    """Draw the attention of CLS and each register over some images; returns the page's path.

    layer    index of a block, from 0 or from the end; several as "0,5,11"; or "all"
    head     "all": the mean and every head; or "mean"
    request  weights, images and the other arguments of `ModelGallery`
    raises   UserError, before anything is written, for a layer, size, image or model that does not exist or fit
    """
    gallery = ModelGallery("attention", **request)
    model, names = gallery.model, token_names(gallery.model.num_registers)
    layers = chosen_layers(layer, model.depth)
    shown: list[tuple[str, list[Any]]] = []
    budgets = []
    for number, name in enumerate(gallery.pictures.names):
        rows = attention_rows(model, gallery.pictures.images[number : number + 1], layers)[:, 0].cpu()
        budgets.append([attention_budget(each[None]) for each in rows])
        maps = rows[..., len(names) :].unflatten(-1, gallery.grid).numpy()  # (L, heads, 1+R, h, w)
        stem = f"{number + 1:02d}-{safe_name(Path(name).stem, 40)}"
        parts = []
        for ending, what, chosen, labels in _sheets(maps, layers, head):
            for kind in ("maps", "overlay"):
                drawn = token_sheet(gallery.pixels[number], chosen, ["image", *names], labels, over=kind == "overlay")
                parts.append(gallery.picture(f"{stem}{ending}-{kind}", drawn, f"{what}, {kind}", what))
        shown.append((Path(name).name, parts))
    means = {
        f"block {layer}": {name: Budget(*budget)._asdict() for name, budget in zip(names, block)}
        for layer, block in zip(layers, np.mean(budgets, axis=0).tolist())
    }
    return gallery.finish("Attention", {"budget": means}, images=shown, budget=means)


def token_sheet(
    pixels: np.ndarray, maps: np.ndarray, columns: Sequence[str], labels: Sequence[str], over: bool
) -> Image.Image:
    """One image's maps: a row for each head or block, a column for each token, the picture in the first row.

    pixels  (H, W, 3) uint8
    maps    (rows, 1+R, h, w) at least 0
    over    draw the maps over the picture
    """
    paint = partial(overlay, np.asarray(tile(pixels, TILE))) if over else colour_map
    rows = [map_row(pixels, map(paint, tokens), TILE) for tokens in maps]
    for row in rows[1:]:
        row[0] = Image.new("RGBA", row[0].size, (0, 0, 0, 0))
    return sheet(rows, columns, labels)


def _sheets(maps: np.ndarray, layers: Sequence[int], head: str) -> Iterator[tuple[str, str, np.ndarray, list[str]]]:
    """(ending of the file's name, title, maps (rows, 1+R, h, w), names of the rows) of each sheet of an image.

    maps (L, heads, 1+R, h, w). With all heads a sheet for each block, else one whose rows are the blocks.
    """
    means = maps.mean(axis=1)
    if head == "mean":
        yield "", "mean of the heads", means, [f"block {layer}" for layer in layers]
        return
    labels = ["mean", *(f"head {number}" for number in range(maps.shape[1]))]
    for layer, mean, each in zip(layers, means, maps):
        ending = f"-block{layer}" if len(layers) > 1 else ""
        yield ending, f"block {layer}, each head", np.concatenate([mean[None], each]), labels


def chosen_layers(text: str, depth: int) -> list[int]:
    """ "-1", "0,5,11" or "all" as indices from 0, ascending; UserError for a block that does not exist."""
    if text.strip() == "all":
        return list(range(depth))
    with reworded(f"layer={text}: expected the index of a block, several with commas, or all", ValueError):
        numbers = [int(each) for each in text.strip("[]").split(",")]
    for number in numbers:
        if not -depth <= number < depth:
            raise UserError(f"layer={number}: the model has {depth} blocks, 0 to {depth - 1} (or -1 for the last)")
    return sorted({number % depth for number in numbers})
