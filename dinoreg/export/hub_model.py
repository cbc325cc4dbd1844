"""A register Vision Transformer for inference that needs PyTorch and nothing else.

The export copies this file as `hubconf.py` beside the weights, with the architecture filled in, so that
`torch.hub.load(folder, "backbone", source="local")` builds the model where dinoreg is not installed. Names of
parameters, arguments and outputs are those of the published DINOv2 models.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

dependencies = ["torch"]  # torch.hub checks that these are installed

ARCHITECTURE: dict[str, Any] = {}


def backbone(pretrained: bool = True, weights: str | Path | None = None) -> PlainViT:
    """The encoder, in evaluation mode.

    pretrained  load the weights; False leaves them at their random initial values
    weights     a state dict saved by torch; None: `model.pth` in the folder of this file
    """
    model = PlainViT(**ARCHITECTURE)
    if pretrained:
        path = Path(__file__).resolve().parent / "model.pth" if weights is None else weights
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


class PlainViT(nn.Module):
    """[class token, registers, patches] through pre-norm blocks; the class token and the patches carry positions.

    grid        rows and columns of the learned positions; other image sizes resample them
    rope_base   not None: instead queries and keys of the patches are rotated by row and column, with periods up to it
    norm_eps    of all norms
    patch_size  pixels
    channels    "joint": images have `in_channels`; else each channel goes through the network by itself, of any number
                of them, and the tokens are put side by side, C * D wide ("bag"), or averaged ("bag_mean")
    dim         width D of the tokens
    ffn         "swiglu" for a gated feed-forward layer, else two matrices with GELU between them
    hidden_dim  width between the two matrices of the FFN (of the gated half, for "swiglu")
    layerscale  whether the blocks' branches are scaled by a learned factor per channel
    antialias, position_offset  how positions are resampled: bicubic, with the offset entering the scale
    register_neurons  pairs of a block and a hidden unit, from 0, whose activation goes to the registers: `ToRegisters`
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        patch_size: int,
        in_channels: int,
        channels: str,
        dim: int,
        depth: int,
        heads: int,
        num_registers: int,
        ffn: str,
        hidden_dim: int,
        layerscale: bool,
        antialias: bool,
        position_offset: float,
        rope_base: float | None,
        norm_eps: float,
        register_neurons: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.grid, self.patch_size = tuple(grid), patch_size
        self.channels, self.embed_dim = channels, dim
        self.num_features = dim * (in_channels if channels == "bag" else 1)
        self.num_register_tokens = num_registers
        self.antialias, self.position_offset = antialias, position_offset
        self.rope_base, self.head_dim = rope_base, dim // heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed: Any = None if rope_base else nn.Parameter(torch.zeros((1, 1 + grid[0] * grid[1], dim)))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        projection = nn.Conv2d(in_channels if channels == "joint" else 1, dim, patch_size, patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection, flatten=nn.Flatten(2)))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, ffn, hidden_dim, layerscale) for _ in range(depth))
        for index in {block for block, _ in register_neurons}:
            units = [unit for block, unit in register_neurons if block == index]
            ffn_of_block: Any = self.blocks[index].mlp
            ffn_of_block.moved = ToRegisters(units, hidden_dim, num_registers)
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps

    def resampled_positions(self, rows: int, columns: int) -> Tensor:
        """Positions of the patches of a rows x columns grid, (1, rows * columns, D), of the parameters' dtype."""
        positions = self.pos_embed[:, 1:]
        if (rows, columns) == self.grid:
            return positions
        image = positions.float().reshape(1, *self.grid, self.embed_dim).permute(0, 3, 1, 2).contiguous()
        options: dict[str, Any] = {"size": (rows, columns)}
        if self.position_offset:
            scale = [(new + self.position_offset) / old for new, old in zip((rows, columns), self.grid)]
            options = {"scale_factor": scale}
        image = F.interpolate(image, mode="bicubic", antialias=self.antialias, **options)
        return image.flatten(2).transpose(1, 2).to(positions.dtype)

    def rotation(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (T, head_dim / 2) float32 of what rotary positions turn tokens by; None: learned ones."""
        if self.rope_base is None:
            return None
        rows, columns = self.grid_of(images)
        numbers = [torch.arange(count, device=images.device).float() for count in (rows, columns, self.head_dim // 4)]
        turns = 2 * math.pi / self.rope_base ** (numbers[2] * 4 / self.head_dim)
        places = ((number + 0.5) / count * 2 - 1 for number, count in zip(numbers, (rows, columns)))
        by_row, by_column = (place[:, None] * turns for place in places)
        angles = torch.cat([by_row[:, None].expand(-1, columns, -1), by_column.expand(rows, -1, -1)], dim=-1)
        angles = F.pad(angles.reshape(rows * columns, -1), (0, 0, 1 + self.num_register_tokens, 0))  # others stay
        return angles.cos(), angles.sin()

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (B, C, H, W); ValueError where the patch size does not divide H or
        W."""
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def together(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The tokens (B * C, T, D) of a bag's channels as those of its images; others (B, T, D) as they are."""
        if self.channels == "joint":
            return tokens
        of_each = tokens.unflatten(0, images.shape[:2])  # (B, C, T, D)
        return of_each.mean(dim=1) if self.channels == "bag_mean" else of_each.transpose(1, 2).flatten(2)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) before the first block; (B * C, T, D) of a bag of channels.

        images  (B, C, H, W) normalised, H and W multiples of the patch size; ValueError for others
        masks   (B, N) bool, True where a patch is replaced by the mask token
        """
        if self.channels != "joint":
            images = images.flatten(0, 1).unsqueeze(1)
        grid = self.grid_of(images)
        patches = self.patch_embed(images).transpose(1, 2)  # (B, N, D), row by row
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        cls_token: Tensor = self.cls_token
        if self.pos_embed is not None:
            cls_token, patches = cls_token + self.pos_embed[:, :1], patches + self.resampled_positions(*grid)
        tokens = [cls_token] if self.register_tokens is None else [cls_token, self.register_tokens]
        return torch.cat([*(each.expand(images.shape[0], -1, -1) for each in tokens), patches], dim=1)

    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        """The tokens after the final norm by kind, and all of them before it; arguments as for `embed`.

        returns  {"x_norm_clstoken": (B, D), "x_norm_regtokens": (B, R, D), "x_norm_patchtokens": (B, N, D),
                 "x_prenorm": (B, T, D), "masks": as given}
        """
        x, rotation = self.embed(images, masks), self.rotation(images)
        for block in self.blocks:
            x = block(x, rotation)
        normed, first = self.together(self.norm(x), images), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],  # (B, D)
            "x_norm_regtokens": normed[:, 1:first],  # (B, R, D)
            "x_norm_patchtokens": normed[:, first:],  # (B, N, D)
            "x_prenorm": self.together(x, images),  # (B, T, D)
            "masks": masks,
        }

    def forward(self, images: Tensor, masks: Tensor | None = None, is_training: bool = False) -> Any:
        """The class token (B, D) after the final norm, or all of `forward_features` if `is_training`."""
        features = self.forward_features(images, masks)
        return features if is_training else features["x_norm_clstoken"]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens (B, N, D) of the last n blocks, or of the blocks with the indices n, in block order.

        images              (B, C, H, W) as for `embed`
        n                   ValueError where the model does not have these blocks
        reshape             (B, D, rows, columns) instead
        return_class_token  pairs of patch tokens and class token (B, D)
        norm                the final norm is applied to each
        """
        depth = len(self.blocks)
        chosen = range(depth - n, depth) if isinstance(n, int) else n
        x, rotation, outputs = self.embed(images), self.rotation(images), []
        for index, block in enumerate(self.blocks):
            x = block(x, rotation)
            if index in chosen:
                outputs.append(self.together(self.norm(x) if norm else x, images))
        if len(outputs) != len(chosen):
            raise ValueError(f"n={n}: the model has {depth} blocks")
        patches = [tokens[:, 1 + self.num_register_tokens :] for tokens in outputs]
        if reshape:
            patches = [each.transpose(1, 2).unflatten(2, self.grid_of(images)).contiguous() for each in patches]
        return tuple(zip(patches, (tokens[:, 0] for tokens in outputs)) if return_class_token else patches)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward layer, each a residual branch with its own scale."""

    def __init__(self, dim: int, heads: int, ffn: str, hidden_dim: int, layerscale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.ls1 = ChannelScale(dim) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedFFN(dim, hidden_dim) if ffn == "swiglu" else plain_ffn(dim, hidden_dim)
        self.ls2 = ChannelScale(dim) if layerscale else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D)."""
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D); queries and keys are turned by a rotation, if there is one."""
        batch, tokens, dim = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)  # (B, heads, T, head_dim)
        if rotation is not None:
            q, k = turned(q, *rotation), turned(k, *rotation)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, heads, T, head_dim), channel i and i + head_dim / 2 rotated by an angle, in float32."""
    one, other = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1).to(x.dtype)


class ChannelScale(nn.Module):
    """LayerScale: a learned factor for every channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D)."""
        return x * self.gamma


def plain_ffn(dim: int, hidden_dim: int) -> nn.Module:
    """The feed-forward layer of two matrices with GELU between them, (B, T, D) -> (B, T, D)."""
    first, second = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
    return nn.Sequential(OrderedDict(fc1=first, gelu=nn.GELU(), moved=nn.Identity(), fc2=second))


class GatedFFN(nn.Module):
    """The SwiGLU feed-forward layer; gate and value are the two halves of one matrix."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)
        self.moved: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.moved(F.silu(gate) * value))


class ToRegisters(nn.Module):
    """Test-time registers (arXiv 2506.08010): they get the units' largest activation in the image, the patches none."""

    chosen: Tensor

    def __init__(self, units: Sequence[int], hidden_dim: int, num_registers: int) -> None:
        super().__init__()
        self.num_registers = num_registers
        chosen = torch.zeros(hidden_dim, dtype=torch.bool)
        chosen[list(units)] = True
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden units of all tokens (B, T, hidden) -> the same shape; the class token keeps its own."""
        high, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
        largest = torch.where(high >= -low, high, low).expand(-1, self.num_registers, -1)
        patches = torch.zeros_like(x[:, 1 + self.num_registers :])
        return torch.where(self.chosen, torch.cat([x[:, :1], largest, patches], dim=1), x)
