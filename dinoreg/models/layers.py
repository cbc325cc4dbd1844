"""The parts of a Vision Transformer block, with LayerScale and stochastic depth.

Tokens reach a block as one matrix (S, D): all tokens of all images of all crop groups, one after the other.
Token-wise layers run once over it, whatever the number of groups; attention and stochastic depth look at the
groups' shapes. Parameter names are those of the published DINOv2 weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import Shapes, attend_groups, compute_dtype, without_autocast
from dinoreg.models.rope import turn_groups
from dinoreg.models.stochastic_depth import Kept, add_samples, draw_kept, gather_rows, gather_samples, kept_shapes
from dinoreg.runtime.errors import UserError

NORM_EPS = 1e-6

# Up to this rate a plain batch scales whole samples; above it, skipping the work of the dropped ones is faster.
SUBSET_MIN_RATE = 0.1


def swiglu_hidden_dim(hidden_dim: int) -> int:
    """Hidden width of SwiGLU for an MLP's `hidden_dim`: two thirds, rounded up to a multiple of 8 (6144 -> 4096).

    The factor 2/3 keeps the number of parameters (GLU variants, arXiv 2002.05202).
    """
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8


class PatchEmbed(nn.Module):
    """One linear map, applied to every non-overlapping square patch.

    patch_size  pixels

    The parameters are those of a convolution, as in published weights; it is computed as a matrix product, which is the
    same sum and faster on a CPU.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of images.

        images  (B, C, H, W)   height and width divisible by the patch size
        returns (B, N, D)      patches row by row, N = (H / p)(W / p)
        raises                 UserError for another rank or number of channels, and for sizes that do not divide
        """
        weight, size = self.proj.weight, self.patch_size
        if images.ndim != 4 or images.shape[1] != weight.shape[1]:
            raise UserError(f"images have shape {tuple(images.shape)}; expected (B, {weight.shape[1]}, H, W)")
        batch, channels, height, width = images.shape
        if height % size or width % size or not height or not width:
            raise UserError(f"image size {height}x{width} is not a multiple of the patch size {size}")
        rows, columns = height // size, width // size
        patches = images.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        patches = patches.to(compute_dtype(weight), memory_format=torch.contiguous_format)  # one copy for both
        return F.linear(patches.reshape(batch, rows * columns, -1), weight.flatten(1), self.proj.bias)


class Mlp(nn.Module):
    """Linear, exact GELU, linear; dropout, a probability in [0, 1], after both."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (S, D) -> (S, D)."""
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class SwiGLU(nn.Module):
    """SiLU-gated linear unit (arXiv 2002.05202): w3(SiLU(x1) * x2), where x1 and x2 are the halves of w12(x).

    hidden_dim  width of the MLP that it replaces; the gate's own width is `swiglu_hidden_dim` of it
    dropout     probability in [0, 1], on the gated values and on the output
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        gated = swiglu_hidden_dim(hidden_dim)
        self.w12 = nn.Linear(dim, 2 * gated)
        self.w3 = nn.Linear(gated, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (S, D) -> (S, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        hidden = F.dropout(F.silu(gate) * value, self.dropout, self.training)
        return F.dropout(self.w3(hidden), self.dropout, self.training)


FFN_KINDS: dict[str, type[Mlp] | type[SwiGLU]] = {"mlp": Mlp, "swiglu": SwiGLU}


def init_linear_layers(network: nn.Module, std: float) -> None:
    """Draw the weights of every linear layer from torch's global generator: truncated normal; biases are 0.

    std  standard deviation; the truncation is at ±2 (not ±2 std), in effect none
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)


class LayerScale(nn.Module):
    """The per-channel factor `gamma` (D,) of a residual branch (LayerScale, arXiv 2103.17239).

    `Block` reads `gamma` and multiplies by it while it adds the branch, without calling the module.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> x * gamma (..., D)."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention of packed groups.

    head_dim  width of one head; None: dim / heads. head_dim * heads may differ from dim
    dropout   probability in [0, 1], on the output

    Unless `key_bias`, the keys' third of the bias is there without effect. (Softmax takes no notice of a bias of all
    keys; of one that positions turn, it does.)
    """

    key_bias = True

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.qkv = nn.Linear(dim, 3 * heads * self.head_dim)
        self.proj = nn.Linear(heads * self.head_dim, dim)
        self.dropout = dropout

    def project(self, x: Tensor, shapes: Shapes = (), tables: Sequence[Tensor] | None = None) -> Tensor:
        """x (..., D) -> queries, keys and values, in this order, as one tensor (..., 3, heads, head_dim).

        shapes, tables  of a packed x (S, D): turned by rotary positions, see `turn_groups`; None: not
        """
        if self.key_bias:
            qkv = self.qkv(x)
        else:
            q, k, v = self.qkv.bias.chunk(3)
            qkv = F.linear(x, self.qkv.weight, torch.cat([q, torch.zeros_like(k), v]))
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        return qkv if tables is None else turn_groups(qkv, shapes, tables)

    def forward(
        self, x: Tensor, shapes: Shapes, backends: Sequence[str], tables: Sequence[Tensor] | None = None
    ) -> Tensor:
        """x (S, D) -> (S, D); `shapes` and `backends` are those of `attend_groups`, `tables` of `project`."""
        mixed = attend_groups(self.project(x, shapes, tables), shapes, backends)
        return F.dropout(self.proj(mixed), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block: attention and FFN, each with LayerScale and stochastic depth on its branch.

    ffn         "mlp" or "swiglu"
    hidden_dim  hidden width of the MLP (before SwiGLU's two-thirds rule); None: 4 * dim
    layerscale  initial value of the channel factors; None or 0: no LayerScale
    drop_path   probability in [0, 1) of dropping an image's branch while training (stochastic depth, arXiv 1603.09382)
    head_dim    width of one attention head; None: dim / heads
    dropout     probability in [0, 1], inside attention and FFN
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn: str = "mlp",
        hidden_dim: int | None = None,
        layerscale: float | None = 1e-5,
        drop_path: float = 0.0,
        head_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads, head_dim, dropout)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FFN_KINDS[ffn](dim, 4 * dim if hidden_dim is None else hidden_dim, dropout)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def __getstate__(self) -> dict[str, Any]:
        # A compiled forward pass is bound to this block: a copy has its own.
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def forward(
        self,
        x: Tensor,
        shapes: Shapes,
        backends: Sequence[str],
        packed: bool = False,
        rows: Tensor | None = None,
        kept: Sequence[Kept] | None = None,
        owned: bool = False,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (S, D) -> (S, D), or (n, D) with `rows`.

        shapes   (images, tokens) of each group; S is the sum of images * tokens
        backends attention backend of each group
        packed   the groups came as a list: stochastic depth skips the dropped images' work at any rate, as DINOv2 does,
                 not only above `SUBSET_MIN_RATE`
        rows     (n,) numbers of the tokens to return, all different; the FFN is computed for them only. None: all
        kept     for the two branches, from `draw_kept`; None: drawn here
        owned    x may be written to, and so may the gradient that comes back: nobody else reads them
        tables   of rotary positions, one a group; None: there are none
        """
        rate = 0.0
        if kept is None and self.training:  # else the rate is not read: a compiler would make a graph for each
            rate = self.drop_path
            if rate > (0 if packed else SUBSET_MIN_RATE):
                kept = draw_kept(shapes, [rate, rate], x.device)
        gamma1, gamma2 = getattr(self.ls1, "gamma", None), getattr(self.ls2, "gamma", None)
        with low_precision(self, compute_dtype(x)):
            dtype = torch.bfloat16 if self.norm1.weight.dtype == torch.bfloat16 else None  # of the norms' input
            if kept is not None:
                part, x = gather_samples(x, shapes, kept[0], owned, dtype)
                y = self.attn(_norm(self.norm1, part), kept_shapes(shapes, kept[0].images), backends, tables)
                x = add_samples(x, y, gamma1, shapes, kept[0])
            else:
                y = self.attn(_norm(self.norm1, x), shapes, backends, tables)
                x = _add(x, y, gamma1, _sample_factors(shapes, rate, x))
            if rows is not None:
                # They are few: skipping the work of the dropped images would save nothing.
                factors = _kept_factors(shapes, kept[1].images, x) if kept else _sample_factors(shapes, rate, x)
                x = gather_rows(x, shapes, rows)
                factors = None if factors is None else factors.index_select(0, rows)
                return _add(x, self.mlp(_norm(self.norm2, x)), gamma2, factors)
            if kept is not None:
                part, x = gather_samples(x, shapes, kept[1], True, dtype)
                return add_samples(x, self.mlp(_norm(self.norm2, part)), gamma2, shapes, kept[1])
            y = self.mlp(_norm(self.norm2, x))
            return _add(x, y, gamma2, _sample_factors(shapes, rate, x))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm of x, in bfloat16 where `low_precision` made its parameters so: no float32 copy is written."""
    if norm.weight.dtype != torch.bfloat16:
        out: Tensor = norm(x)
        return out
    with without_autocast(x):
        return F.layer_norm(x.bfloat16(), x.shape[-1:], norm.weight, norm.bias, norm.eps)


@contextmanager
def low_precision(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the linear layers of `module` compute with copies of their parameters in `dtype`.

    Autocast would cast one parameter at a time. Names in an object's own dictionary come before its parameters. Norms
    follow in bfloat16 only: float16 has not the range for what a residual stream may hold.
    """
    kinds = (nn.Linear, nn.LayerNorm) if dtype == torch.bfloat16 else (nn.Linear,)
    wanted = dtype != torch.float32 and not torch.compiler.is_compiling()  # a compiler casts where it computes
    layers = [m for m in module.modules() if wanted and isinstance(m, kinds) and m.weight.dtype != dtype]
    owned = [(layer, name) for layer in layers for name, p in layer._parameters.items() if p is not None]
    if not owned:
        yield
        return
    copies = _Copies.apply(dtype, *(layer._parameters[name] for layer, name in owned))
    try:
        for (layer, name), copy in zip(owned, copies, strict=True):
            layer.__dict__[name] = copy
        yield
    finally:
        for layer, name in owned:
            del layer.__dict__[name]


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
        torch._foreach_copy_(copies, tensors)
        frozen = [copy for copy, needed in zip(copies, ctx.needs_input_grad[1:], strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        ctx.dtype = tensors[0].dtype
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        full = [None if grad is None else torch.empty_like(grad, dtype=ctx.dtype) for grad in grads]
        if given := [grad for grad in grads if grad is not None]:
            torch._foreach_copy_([grad for grad in full if grad is not None], given)
        return None, *full


def _add(x: Tensor, y: Tensor, gamma: Tensor | None, factors: Tensor | None) -> Tensor:
    """x + y * gamma * factors in one pass over the tokens."""
    if factors is not None:
        y = y * factors
    # Outside autocast: on CUDA it would store a float32 copy of a low-precision y for the backward pass.
    with without_autocast(x):
        return torch.addcmul(x, y, gamma) if gamma is not None else x + y


def _sample_factors(shapes: Shapes, rate: float, x: Tensor) -> Tensor | None:
    """1 / (1 - rate) for the tokens of images that stay, 0 for those of the others, (S, 1); None for a rate of 0."""
    drawn = [x.new_empty(images).bernoulli_(1 - rate).div_(1 - rate) for images, _ in shapes if rate]
    return _per_token(drawn, shapes) if drawn else None


def _kept_factors(shapes: Shapes, kept: Sequence[Tensor], x: Tensor) -> Tensor:
    """What `add_samples` multiplies by, for every token (S, 1): 0 for those of images that were not drawn."""
    drawn = zip(shapes, kept, strict=True)
    factors = [x.new_zeros(images).index_fill_(0, index, images / len(index)) for (images, _), index in drawn]
    return _per_token(factors, shapes)


def _per_token(factors: Sequence[Tensor], shapes: Shapes) -> Tensor:
    """The factors of each group's images for each of their tokens, (S, 1)."""
    pairs = zip(factors, shapes, strict=True)
    return torch.cat([group.unsqueeze(1).expand(shape).flatten() for group, shape in pairs]).unsqueeze(1)
