"""The encoder: a Vision Transformer with register tokens (Darcet et al. 2023), in DINOv2's arrangement.

The sequence is always [class token, registers, patches]. Registers are learned, carry no position and are
given up at the output; the class token and the patches carry a learned position that is resampled to the
image's grid, or patches have rotary ones, as in DINOv3 (`rope.py`). Parameter names and shapes are those of the
published DINOv2 weights, so that these load as they are.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from dinoreg.models.attention import (
    Shapes,
    attention_weights,
    check_backend,
    compute_dtype,
    pack,
    resolve_backend,
    unpack,
    without_autocast,
)
from dinoreg.models.layers import (
    FFN_KINDS,
    NORM_EPS,
    Attention,
    Block,
    PatchEmbed,
    init_linear_layers,
)
from dinoreg.models.register_neurons import move_to_registers
from dinoreg.models.rope import Rope
from dinoreg.models.stochastic_depth import draw_kept
from dinoreg.runtime.errors import UserError

POSITION_STD = 0.02
# The constructor's arguments, besides the image size, that the weights depend on.
ARCHITECTURE = (
    *("patch_size", "dim", "depth", "heads", "num_registers", "register_neurons", "ffn", "ffn_ratio", "layerscale"),
    *("in_channels", "channels", "antialias", "position_offset", "init_std", "rope_base", "key_bias", "norm_eps"),
)
CHANNELS = ("joint", "bag", "bag_mean")  # of an image are seen together, or each by itself
TOKEN_STD = 1e-6  # class token and registers start as good as zero, yet not equal to one another


class Tokens(NamedTuple):
    """The encoder's output after the final norm, in sequence order."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, N, D), row by row

    def __repr__(self) -> str:
        shapes = (f"{name}={tuple(each.shape)}" for name, each in self._asdict().items())
        return f"Tokens({', '.join(shapes)})"


# Packed tokens (S, D) before the first block, the groups' shapes, and what rotary positions turn them by.
_Begun = tuple[Tensor, Shapes, list[Tensor] | None]


class ChosenTokens(NamedTuple):
    """The class tokens and the selected patch tokens of a crop group, after the final norm."""

    cls: Tensor  # (B, D)
    patches: Tensor  # (m, D), in the order of the indices that selected them


def as_pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """`size` in pixels as (height, width); UserError, calling it `name`, unless it is one positive integer or two."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(extent, int) and extent > 0 for extent in pair):
        raise UserError(f"{name}={size!r} is not a size; expected a positive integer or (height, width)")
    return pair


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an image (height, width) in pixels; UserError unless whole patches fill it."""
    height, width = image_size
    if height % patch_size or width % patch_size:
        raise UserError(f"image_size {height}x{width} is not a multiple of patch_size {patch_size}")
    return height // patch_size, width // patch_size


@lru_cache(maxsize=256)
def resampling_matrices(
    grid: tuple[int, int], target: tuple[int, int], antialias: bool, offset: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The weights (h, gh) and (w, gw), float32, with which `resample_positions` sums: PyTorch's own bicubic ones.

    Arguments and errors are those of `resample_positions`.
    """
    matrices = []
    # What is kept may be needed for a gradient later, and is no part of what is traced or counted meanwhile.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        for old, new in zip(grid, target, strict=True):
            # Two columns: where the width is one, the antialiased kernel gives wrong rows.
            samples = torch.eye(old, device="cpu")[None, :, :, None].expand(1, old, old, 2)
            size: dict[str, Any] = {"scale_factor": ((new + offset) / old, 1.0)} if offset else {"size": (new, 2)}
            weights = F.interpolate(samples, mode="bicubic", antialias=antialias, **size)[0, :, :, 0].T
            if len(weights) != new:
                raise UserError(f"position_offset={offset} turns grid {grid} into {len(weights)} rows, not {target}")
            matrices.append(weights.contiguous().to(device, non_blocking=True))
    return matrices[0], matrices[1]


def resample_positions(
    positions: Tensor, grid: tuple[int, int], target: tuple[int, int], antialias: bool = True, offset: float = 0.0
) -> Tensor:
    """Bicubic resampling of patch positions from one grid to another, in float32, as two matrix products.

    The backward pass of PyTorch's own kernel is not deterministic on CUDA.

    positions (1, gh * gw, D)   of the grid (gh, gw) = `grid`, row by row
    target                      (h, w), rows and columns of the new grid
    antialias, offset           (True, 0) for models with registers (arXiv 2309.16588, appendix A); the published models
                                without registers were trained with (False, 0.1), where the scale factor is
                                (h + offset) / gh, which also moves the sampling points slightly
    returns   (1, h * w, D)     in the dtype of `positions`; `positions` itself where the grids agree
    raises                      UserError where the scale factor does not give the target grid
    """
    if grid == target:
        return positions
    down, across = resampling_matrices(grid, target, antialias, offset, positions.device)
    if isinstance(positions, FakeTensor):  # a tensor without values belongs to one trace
        down, across = (positions.fake_mode.from_tensor(matrix) for matrix in (down, across))
    with without_autocast(positions):
        rows = (down @ positions.float().reshape(grid[0], -1)).unflatten(1, (grid[1], -1))  # (h, gw, D)
        return (across @ rows).reshape(1, target[0] * target[1], -1).to(positions.dtype)


class RegisterViT(nn.Module):
    """Vision Transformer with register tokens (arXiv 2309.16588) and DINOv2's parameter names.

    image_size        native size in pixels, (height, width) or one for both: the size of the position grid.
                      Images of any size that the patch size divides can be encoded
    patch_size        pixels, height and width of a patch
    dim, depth, heads width D of a token, number of blocks, attention heads per block; heads divides dim
    num_registers     R >= 0; 4 in the paper
    ffn               "mlp" or "swiglu"; ffn_ratio is the hidden width of the MLP over `dim`
    layerscale        initial value of the residuals' channel factors; None or 0 leaves them out
    drop_path         probability in [0, 1) of dropping a residual branch while training, in every block alike, or
                      (drop_path_uniform=False) growing linearly from 0 to it along the depth
    in_channels       C of images; channels is "joint", or for a bag of channels (Scaling Channel-Adaptive
                      Self-Supervised Learning, TMLR 2025) "bag" or "bag_mean": each goes through a network of one
                      channel, and tokens are put side by side in their order, C * D wide, or averaged. C may be any
    antialias, position_offset   how positions are resampled, see `resample_positions`
    init_std          standard deviation of every linear layer's initial weights
    rope_base         None: positions are learned; else patches have rotary ones, of which this and the distortions in
                      training, rope_shift, rope_jitter and rope_rescale, are those of `Rope`
    key_bias          whether keys have a bias; norm_eps is that of all norms
    register_neurons  pairs (block, hidden unit) that make the registers test-time ones, see `move_to_registers`
    attention         "auto" | "xformers" | "varlen" | "sdpa" | "plain"
    checkpointing     recompute each block in the backward pass instead of storing its activations
    raises            UserError for a value out of its range and for sizes that do not divide

    `width` is that of the tokens that come out, C * D of a bag whose channels are side by side, else D.
    `preprocessing` is what weights that were loaded state of pictures (`data.preprocess`), else None; not used here.
    """

    preprocessing: Mapping[str, Any] | None = None

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 14,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        num_registers: int = 4,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        layerscale: float | None = 1e-5,
        drop_path: float = 0.0,
        drop_path_uniform: bool = True,
        in_channels: int = 3,
        channels: str = "joint",
        antialias: bool = True,
        position_offset: float = 0.0,
        init_std: float = 0.02,
        rope_base: float | None = None,
        rope_shift: float = 0.0,
        rope_jitter: float = 1.0,
        rope_rescale: float = 2.0,
        key_bias: bool = True,
        norm_eps: float = NORM_EPS,
        register_neurons: Sequence[Sequence[int]] = (),
        attention: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = as_pair(image_size, "image_size")
        self.grid = patch_grid(self.image_size, patch_size)
        rotary = rope_base is not None  # then a quarter of a head's channels is of rows, in pairs with another quarter
        if dim % (4 * heads if rotary else heads):
            raise UserError(f"dim={dim} does not divide into heads={heads}{' of whole fours' if rotary else ''}")
        if ffn not in FFN_KINDS:
            raise UserError(f"ffn={ffn!r} is not known; expected one of {', '.join(FFN_KINDS)}")
        if channels not in CHANNELS:
            raise UserError(f"channels={channels!r} is not known; expected one of {', '.join(CHANNELS)}")
        if not 0 <= drop_path < 1:
            raise UserError(f"drop_path={drop_path} is not a probability below 1")
        if num_registers < 0 or depth < 1:
            raise UserError(f"num_registers={num_registers} and depth={depth}: expected >= 0 and >= 1")

        self.patch_size, self.in_channels, self.channels = patch_size, in_channels, channels
        self.dim, self.depth, self.heads, self.num_registers = dim, depth, heads, num_registers
        self.width = dim * (in_channels if channels == "bag" else 1)
        self.ffn, self.ffn_ratio, self.layerscale = ffn, ffn_ratio, layerscale
        self.antialias, self.position_offset, self.init_std = antialias, position_offset, init_std
        self.rope_base, self.key_bias, self.norm_eps = rope_base, key_bias, norm_eps
        self.register_neurons = [list(pair) for pair in register_neurons]
        self.rope = None if rope_base is None else Rope(rope_base, rope_shift, rope_jitter, rope_rescale)
        self.attention_backend, self.checkpointing = check_backend(attention), checkpointing

        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        places = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = None if self.rope else nn.Parameter(torch.empty(1, places, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, num_registers, dim)) if num_registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_channels if channels == "joint" else 1, dim)
        rates = [drop_path * (1.0 if drop_path_uniform else i / max(depth - 1, 1)) for i in range(depth)]
        hidden = int(dim * ffn_ratio)
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, hidden, layerscale, drop_path=rate) for rate in rates)
        move_to_registers(self.blocks, self.register_neurons, num_registers)
        self.norm = nn.LayerNorm(dim)
        self._tell_layers()
        self.init_weights()

    def _tell_layers(self) -> None:
        """What all norms and all attention layers of the model have in common."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.norm_eps
            elif isinstance(module, Attention):
                module.key_bias = self.key_bias

    def init_weights(self) -> None:
        """Draw new weights from torch's global generator, as DINOv2 does.

        The patch embedding is left as it is: after construction, PyTorch's default for convolutions.
        """
        init_linear_layers(self, self.init_std)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=POSITION_STD)
        nn.init.normal_(self.cls_token, std=TOKEN_STD)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=TOKEN_STD)
        nn.init.zeros_(self.mask_token)

    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments that the weights depend on, as JSON values, for `RegisterViT(**architecture)`.

        Choices of a run (stochastic depth, attention backend, activation checkpointing) are not among them.
        """
        return {"image_size": list(self.image_size)} | {name: getattr(self, name) for name in ARCHITECTURE}

    # ---------------------------------------------------------------- embedding

    def _apart(self, images: Tensor) -> Tensor:
        """(B, C, H, W) as `embed` takes them: of a bag every channel by itself, (B * C, 1, H, W)."""
        return images if self.channels == "joint" or images.ndim != 4 else images.flatten(0, 1).unsqueeze(1)

    def _together(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Tokens of `_apart(images)` as those of the images, (B, T, D) or (B, T, C * D)."""
        if self.channels == "joint":
            return tokens
        of_each = tokens.unflatten(0, images.shape[:2])  # (B, C, T, D)
        return of_each.mean(dim=1) if self.channels == "bag_mean" else of_each.transpose(1, 2).flatten(2)

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Patchify, hide masked patches, add learned positions, then prepend the class and register tokens.

        images  (B, C, H, W)   height and width divisible by the patch size; of a bag of channels C is 1
        mask    (B, N) bool    True where a patch is replaced by the mask token, before positions are added
        returns (B, T, D)      class token, registers, patches; registers carry no position
        raises                 UserError for images or a mask of another shape, and for a mask that is not bool
        """
        x = self.patch_embed(images)  # (B, N, D)
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise UserError(
                    f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool {tuple(x.shape[:2])}"
                )
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        cls_token: Tensor = self.cls_token
        if self.pos_embed is not None:
            where = self.grid, self._grid_of(images), self.antialias, self.position_offset
            cls_token = cls_token + self.pos_embed[:, :1]
            x = x + resample_positions(self.pos_embed[:, 1:], *where)
        tokens = [cls_token] if self.register_tokens is None else [cls_token, self.register_tokens]
        return torch.cat([*(each.expand(len(x), -1, -1) for each in tokens), x], dim=1)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def rope_tables(self, images: Sequence[Tensor]) -> list[Tensor] | None:
        """What rotary positions turn queries and keys of groups of images by (`Rope.tables`); None: they do not."""
        if self.rope is None:
            return None
        grids, first = [self._grid_of(group) for group in images], 1 + self.num_registers
        return self.rope.tables(grids, first, self.dim // self.heads, self.cls_token, self.training)

    def _begin(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] = (None,)) -> _Begun:
        groups = [self.embed(self._apart(group), hidden) for group, hidden in zip(images, masks, strict=True)]
        shapes = tuple((group.shape[0], group.shape[1]) for group in groups)
        return pack(groups), shapes, self.rope_tables(images)

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor | None] | None = None,
        patches: Sequence[Tensor] | None = None,
    ) -> Any:  # Tokens, or a list for a list of images; overloads on Module.__call__ would be needed for mypy
        """Encode one batch, or several crop groups of different sizes in one pass.

        images  (B, C, H, W), or a list of them, one per resolution
        mask    (B, N) bool, True where a patch is hidden, or None; for a list of images a list of these
        patches only with a list of images: for each group the indices of the patches to return, (m,) int64, all
                different and below B * N. The FFN of the last block (two thirds of its work) and the final norm are
                then computed for them and the class tokens only. Of a bag of channels C is 1 with it
        returns Tokens, a list of Tokens, or with `patches` a list of ChosenTokens; after the final norm
        raises  UserError for images and masks that do not fit one another or the patch size
        """
        packed = not isinstance(images, Tensor)
        if isinstance(images, Tensor):
            if patches is not None or not (mask is None or isinstance(mask, Tensor)):
                raise UserError("images are one tensor, so mask must be one tensor or None, and patches None")
            images, mask = [images], [mask]
        elif not isinstance(images, Sequence):
            raise UserError(f"{type(images).__name__}: expected a tensor, as dinoreg.transform(model)(picture)[None]")
        masks = [None] * len(images) if mask is None else list(mask)
        if not images or len(masks) != len(images):
            raise UserError(f"{len(images)} groups of images came with {len(masks)} masks")
        begun = self._begin(images, masks)
        shapes = begun[1]
        rows = None if patches is None else _rows(shapes, patches, 1 + self.num_registers)
        x = self.norm(self._run(begun, self.depth, packed, rows=rows))
        if patches is None:
            outputs = self._split(x, shapes, images)
            return outputs if packed else outputs[0]
        sizes = [size for (count, _), chosen in zip(shapes, patches) for size in (count, len(chosen))]
        parts = x.split(sizes)
        return [ChosenTokens(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]

    def _split(self, x: Tensor, shapes: Shapes, images: Sequence[Tensor]) -> list[Tokens]:
        first, groups = 1 + self.num_registers, map(self._together, unpack(x, shapes), images)
        return [Tokens(group[:, 0], group[:, 1:first], group[:, first:]) for group in groups]

    def _run(
        self, begun: _Begun, stop: int, packed: bool = False, start: int = 0, rows: Tensor | None = None
    ) -> Tensor:
        """Blocks start .. stop - 1 over packed tokens (S, D); of the last one only `rows`."""
        x, shapes, tables = begun
        dtype = compute_dtype(x)
        backends = tuple(resolve_backend(self.attention_backend, x.device, tokens, dtype) for _, tokens in shapes)
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        rates: list[Any] = [block.drop_path for block in self.blocks for _ in range(2) if packed and self.training]
        # Of all blocks at once.
        drawn = iter(draw_kept(shapes, list(filter(None, rates)), x.device) if any(rates) else ())
        for index, block in enumerate(self.blocks[start:stop], start):
            selected = rows if index == stop - 1 else None
            assert isinstance(block, Block)
            kept = [next(drawn), next(drawn)] if rates and block.drop_path else None
            arguments = (x, shapes, backends, packed, selected, kept, packed and not again, tables)
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        return x

    # ---------------------------------------------------------------- looking inside

    def prenorm(self, images: Tensor) -> Tensor:
        """Tokens after the last block and before the final norm, whose norms show artifacts (arXiv 2309.16588).

        images  (B, C, H, W)
        returns (B, T, D)
        """
        begun = self._begin([images])
        return self._together(unpack(self._run(begun, self.depth), begun[1])[0], images)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens of several blocks, in block order.

        images  (B, C, H, W)
        n       the last n blocks, or the indices of blocks, from 0 or negative from the end
        reshape return patch tokens as (B, D, H / p, W / p) instead of (B, N, D)
        return_class_token  return pairs of patch tokens and class tokens (B, D)
        norm    apply the final norm to every block's output
        returns one entry per block, without registers
        raises  UserError for blocks that the model does not have, and for none
        """
        chosen = set(range(self.depth - n, self.depth)) if isinstance(n, int) else {self._layer(i) for i in n}
        if not chosen or min(chosen) < 0:
            raise UserError(f"n={n!r}: the model has {self.depth} blocks, and at least one must be asked for")
        outputs: list[Any] = []
        for tokens in self.intermediate_tokens(images, sorted(chosen), norm):
            patches = tokens.patches
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, self._grid_of(images)).contiguous()
            outputs.append((patches, tokens.cls) if return_class_token else patches)
        return tuple(outputs)

    def intermediate_tokens(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """All tokens after each of several blocks, in one pass.

        images  (B, C, H, W)
        blocks  indices from 0, ascending
        norm    apply the final norm to every block's output
        returns one Tokens per block
        """
        x, shapes, tables = self._begin([images])
        outputs: list[Tokens] = []
        start = 0
        for index in blocks:
            x = self._run((x, shapes, tables), index + 1, start=start)
            start = index + 1
            outputs += self._split(self.norm(x) if norm else x, shapes, [images])
        return outputs

    def qkv(self, images: Tensor, layer: int = -1, turned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one block's attention, each (B, heads, T, head_dim); of a bag C times the heads.

        images (B, C, H, W)
        layer  index of the block, from 0, or from the end if negative
        turned by rotary positions, as attention has them; False: as they are projected
        raises UserError for a block that the model does not have
        """
        index = self._layer(layer)
        x, shapes, tables = self._begin([images])
        x = self._run((x, shapes, tables), index)
        block = self.blocks[index]
        assert isinstance(block, Block)
        qkv = block.attn.project(block.norm1(x), shapes, tables if turned else None)
        parts = qkv.unflatten(0, shapes[0]).permute(2, 0, 3, 1, 4)
        q, k, v = parts.reshape(3, len(images), -1, *parts.shape[3:])
        return q, k, v

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """The attention weights of one block, computed from queries and keys whatever the model's backend.

        images  (B, C, H, W)
        layer   index of the block, from 0, or from the end if negative
        returns (B, heads, T, T)   float32; rows (queries) sum to one; heads as for `qkv`
        raises                     UserError for a block that the model does not have
        """
        q, k, _ = self.qkv(images, layer, turned=True)
        return attention_weights(q.float(), k.float())

    def _layer(self, layer: int) -> int:
        if not -self.depth <= layer < self.depth:
            raise UserError(f"layer {layer} is out of range: the model has {self.depth} blocks")
        return layer % self.depth


def _rows(shapes: Shapes, patches: Sequence[Tensor], first: int) -> Tensor:
    """The numbers, among all tokens, of each group's class tokens, then of its selected patches (n,).

    first  tokens come before an image's patches
    """
    rows, start = [], 0
    for (count, length), chosen in zip(shapes, patches, strict=True):
        rows.append(torch.arange(start, start + count * length, length, device=chosen.device))
        before = (chosen // (length - first) + 1) * first + start  # those of its image, and all of earlier ones
        rows.append(chosen + before)
        start += count * length
    return torch.cat(rows)
