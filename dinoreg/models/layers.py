"""The parts of a Vision Transformer block, with LayerScale and stochastic depth by batch subset (DINOv2 §5).

Tokens reach a block as one matrix (S, D): all tokens of all images of all crop groups, one after the other.
Token-wise layers run once over it, whatever the number of groups; attention and stochastic depth look at the
groups' shapes. Parameter names are those of the published DINOv2 weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import Shapes, attend_groups, compute_dtype, without_autocast
from dinoreg.models.rope import turn_groups
from dinoreg.runtime.errors import UserError

NORM_EPS = 1e-6

# Up to this rate a plain batch scales whole samples; above it, skipping the work of the dropped ones is faster.
SUBSET_MIN_RATE = 0.1


class Rows(NamedTuple):
    """Some tokens of a packed (S, D)."""

    tokens: Tensor  # (n,) row numbers, all different
    images: Tensor  # (n,) whose tokens they are: numbers of images, counted through all groups


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
        patches = images.to(weight.dtype).reshape(batch, channels, rows, size, columns, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * size * size)
        return F.linear(patches, weight.flatten(1), self.proj.bias)


class Mlp(nn.Module):
    """Linear, exact GELU, linear; dropout, a probability in [0, 1], after both."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (S, D) -> (S, D)."""
        hidden = _dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return _dropout(self.fc2(hidden), self.dropout, self.training)


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
        hidden = _dropout(F.silu(gate) * value, self.dropout, self.training)
        return _dropout(self.w3(hidden), self.dropout, self.training)


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
        return _dropout(self.proj(mixed), self.dropout, self.training)


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
        rows: Rows | None = None,
        kept: Sequence[Sequence[Tensor]] | None = None,
        owned: bool = False,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (S, D) -> (S, D), or (n, D) with `rows`.

        shapes   (images, tokens) of each group; S is the sum of images * tokens
        backends attention backend of each group
        packed   the groups came as a list: stochastic depth skips the dropped images' work at any rate, as DINOv2 does,
                 not only above `SUBSET_MIN_RATE`
        rows     the n tokens to return; the FFN is computed for them only. None: all
        kept     for the two branches, of each group the images that stochastic depth leaves; None: drawn here
        owned    x may be written to, and so may the gradient that comes back: nobody else reads them
        tables   of rotary positions, one a group; None: there are none
        """
        rate = 0.0
        if kept is None and self.training:  # else the rate is not read: a compiler would make a graph for each
            rate = self.drop_path
            if rate > (0 if packed else SUBSET_MIN_RATE):
                kept = [first_of(order, rate) for order in zip(*draw_orders(shapes, 2, x.device))]
        gamma1, gamma2 = _gamma(self.ls1), _gamma(self.ls2)
        with low_precision(self, compute_dtype(x)):
            if kept is not None:
                part, x = gather_samples(x, shapes, kept[0], owned)
                y = self.attn(_norm(self.norm1, part), kept_shapes(shapes, kept[0]), backends, tables)
                x = add_samples(x, y, gamma1, shapes, kept[0])
            else:
                y = self.attn(_norm(self.norm1, x), shapes, backends, tables)
                x = _add(x, y, gamma1, _per_token(_sample_factors(shapes, rate, x), shapes) if rate else None)
            if rows is not None:
                # They are few: skipping the work of the dropped images would save nothing.
                factors = None
                if rate or kept is not None:
                    of_images = _sample_factors(shapes, rate, x) if kept is None else _kept_factors(shapes, kept[1], x)
                    factors = of_images.index_select(0, rows.images).unsqueeze(1)
                x = x.index_select(0, rows.tokens)
                return _add(x, self.mlp(_norm(self.norm2, x)), gamma2, factors)
            if kept is not None:
                part, x = gather_samples(x, shapes, kept[1], owned=True)
                return add_samples(x, self.mlp(_norm(self.norm2, part)), gamma2, shapes, kept[1])
            y = self.mlp(_norm(self.norm2, x))
            return _add(x, y, gamma2, _per_token(_sample_factors(shapes, rate, x), shapes) if rate else None)


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
    layers: list[nn.Module] = []
    if dtype != torch.float32 and not torch.compiler.is_compiling():  # a compiler casts where it computes
        layers = [m for m in module.modules() if isinstance(m, kinds) and m.weight.dtype != dtype]
    if not layers:
        yield
        return
    owned = [(layer, name) for layer in layers for name, p in layer._parameters.items() if p is not None]
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
        given = [grad for grad in grads if grad is not None]
        full = [torch.empty_like(grad, dtype=ctx.dtype) for grad in given]
        if given:
            torch._foreach_copy_(full, given)
        ordered = iter(full)
        return None, *(None if grad is None else next(ordered) for grad in grads)


def _dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate, training) if rate and training else x


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _add(x: Tensor, y: Tensor, gamma: Tensor | None, factors: Tensor | None) -> Tensor:
    """x + y * gamma * factors in one pass over the tokens."""
    if factors is not None:
        y = y * factors
    # Outside autocast: on CUDA it would store a float32 copy of a low-precision y for the backward pass.
    with without_autocast(x):
        return torch.addcmul(x, y, gamma) if gamma is not None else x + y


def _sample_factors(shapes: Shapes, rate: float, x: Tensor) -> Tensor:
    """For the images of all groups: 1 / (1 - rate) for those that stay, 0 for the others."""
    return torch.cat([x.new_empty(images).bernoulli_(1 - rate).div_(1 - rate) for images, _ in shapes])


def _per_token(factors: Tensor, shapes: Shapes) -> Tensor:
    """Every image's factor for each of its tokens, (S, 1)."""
    groups = factors.split([images for images, _ in shapes])
    repeated = [group.repeat_interleave(tokens) for group, (_, tokens) in zip(groups, shapes, strict=True)]
    return torch.cat(repeated).unsqueeze(1)


def _kept_factors(shapes: Shapes, kept: Sequence[Tensor], x: Tensor) -> Tensor:
    """What `add_samples` multiplies by, for the images of all groups: 0 for those that were not drawn."""
    drawn = zip(shapes, kept, strict=True)
    return torch.cat([x.new_zeros(images).index_fill_(0, index, images / len(index)) for (images, _), index in drawn])


def draw_orders(shapes: Shapes, count: int, device: torch.device) -> list[Tensor]:
    """For each group of b images `count` random orders of them at once: (count, b) int64."""
    return [torch.rand(count, images, device=device).argsort(dim=1) for images, _ in shapes]


def first_of(orders: Sequence[Tensor], rate: float) -> list[Tensor]:
    """The images whose residual branch is computed: of each group's random order (b,) of its b images the first ones.

    DINOv2 (arXiv 2304.07193), section 5, efficient stochastic depth.

    rate     in [0, 1)
    returns  for each group (max(int(b * (1 - rate)), 1),) int64 indices below b, all different
    """
    return [order[: max(int(len(order) * (1 - rate)), 1)] for order in orders]


def kept_shapes(shapes: Shapes, kept: Sequence[Tensor]) -> Shapes:
    """The (images, tokens) of each group after `gather_samples`."""
    return tuple((len(index), tokens) for (_, tokens), index in zip(shapes, kept, strict=True))


def gather_samples(x: Tensor, shapes: Shapes, kept: Sequence[Tensor], owned: bool = False) -> tuple[Tensor, Tensor]:
    """The tokens of the kept images of every group, (S', D), and x (S, D) for `add_samples` to add to.

    kept   that of `first_of`
    owned  that x itself, and its gradient is computed in place; else a copy. Views are always copied

    Where x goes through here, its gradient comes complete from `add_samples`: nothing has to be zeroed and summed.
    """
    owned = owned and not torch.compiler.is_compiling() and not x._is_view()
    part, stream = _GatherSamples.apply(x, owned, shapes, *kept)
    return part, stream


def add_samples(x: Tensor, y: Tensor, gamma: Tensor | None, shapes: Shapes, kept: Sequence[Tensor]) -> Tensor:
    """x plus, at the kept images, y * gamma * (images / kept images): on average over draws, the undropped sum.

    x       (S, D)    all tokens of all groups, from `gather_samples`; written to
    y       (S', D)   a branch's output for the kept images
    gamma   (D,)      LayerScale's factors; None: 1
    kept              per group, the indices of `first_of`
    returns (S, D)    in the dtype of x
    """
    return _AddSamples.apply(x, y, gamma, torch.compiler.is_compiling(), shapes, *kept)


def _views(shapes: Shapes, kept: Sequence[Tensor]) -> list[tuple[slice, slice, int]]:
    """For each group: its rows among all tokens, its rows among the kept tokens, its number of images."""
    rows, start, stop = [], 0, 0
    for (images, tokens), index in zip(shapes, kept, strict=True):
        in_x, in_y = images * tokens, len(index) * tokens
        rows.append((slice(start, start + in_x), slice(stop, stop + in_y), images))
        start, stop = start + in_x, stop + in_y
    return rows


def _take(x: Tensor, shapes: Shapes, kept: Sequence[Tensor]) -> Tensor:
    views = _views(shapes, kept)
    out = x.new_empty(views[-1][1].stop, x.shape[1])
    for (in_x, in_y, images), index in zip(views, kept, strict=True):
        torch.index_select(x[in_x].view(images, -1), 0, index, out=out[in_y].view(len(index), -1))
    return out


def _put(x: Tensor, y: Tensor, shapes: Shapes, kept: Sequence[Tensor], scaled: bool) -> None:
    """Add the kept images' rows y to x in place, times images / kept images where `scaled`."""
    for (in_x, in_y, images), index in zip(_views(shapes, kept), kept, strict=True):
        part = y[in_y].view(len(index), -1)
        x[in_x].view(images, -1).index_add_(0, index, part, alpha=images / len(index) if scaled else 1)


class _GatherSamples(torch.autograd.Function):
    # Written out because autograd's own composition (select, then concatenate) makes a second copy each way.
    # All inputs as one: without gradients Dynamo counts the arguments to see whether the first is a context, and errs.

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, owned, shapes, *kept = inputs
        ctx.save_for_backward(*kept)
        ctx.shapes, ctx.owned = shapes, owned
        part = _take(x, shapes, kept)
        if owned:
            ctx.mark_dirty(x)
        return part, x if owned else x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_part, grad = grads
        kept = ctx.saved_tensors  # read once: with checkpointing a second time is an error
        grad = grad if ctx.owned else grad.clone()
        _put(grad, grad_part.contiguous(), ctx.shapes, kept, scaled=False)
        return grad, None, None, *(None for _ in kept)


class _AddSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, y, gamma, compiled, shapes, *kept = inputs
        ctx.save_for_backward(y if gamma is not None else None, gamma, *kept)
        ctx.shapes, ctx.dtype = shapes, y.dtype
        if compiled:
            x = x.clone()  # the compiler knows no marks, and leaves out the copy
        else:
            ctx.mark_dirty(x)
        y = y.to(x.dtype) if gamma is None else torch.mul(y, gamma, out=torch.empty_like(y, dtype=x.dtype))
        _put(x, y, shapes, kept, scaled=True)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, gamma, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        part = _take(grad, ctx.shapes, kept)
        grad_y = torch.empty(part.shape, dtype=ctx.dtype, device=part.device)
        product = torch.empty_like(part if gamma is not None else part[:0])
        nothing = part.new_zeros(1)  # to add products to, so that they are scaled in the same pass
        for (_, in_y, images), index in zip(_views(ctx.shapes, kept), kept, strict=True):
            scale = images / len(index)
            if gamma is None:
                torch.mul(part[in_y], scale, out=grad_y[in_y])
            else:
                torch.addcmul(nothing, part[in_y], gamma, value=scale, out=grad_y[in_y])
                torch.addcmul(nothing, part[in_y], y[in_y], value=scale, out=product[in_y])
        grad_gamma = None if gamma is None else product.sum(dim=0).to(gamma.dtype)
        return grad, grad_y, grad_gamma, None, None, *(None for _ in kept)
