"""The parts of a Vision Transformer block, with LayerScale and stochastic depth by batch subset (DINOv2 §5).

Tokens reach a block as one matrix (S, D): all tokens of all images of all crop groups, one after the other.
Token-wise layers run once over it, whatever the number of groups; attention and stochastic depth look at the
groups' shapes. Parameter names are those of the published DINOv2 weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import Shapes, attend_groups, compute_dtype, without_autocast
from dinoreg.runtime.errors import UserError

NORM_EPS = 1e-6

# Up to this rate a plain batch scales whole samples; above it, skipping the work of the dropped ones is faster.
SUBSET_MIN_RATE = 0.1


class Kept(NamedTuple):
    """The images of which one residual branch is computed: what stochastic depth leaves.

    images  of each group (b',) int64, all different
    tokens  (S',) int64, where their tokens are among all (S, D): one kernel then moves those of all groups. None on a
            CPU, where long rows, of an image each, are quicker
    zero    (1,) 0: adding products to it scales them in the same pass
    """

    images: list[Tensor]
    tokens: Tensor | None
    zero: Tensor


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
        patches = images.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        patches = patches.to(compute_dtype(weight), memory_format=torch.contiguous_format)  # one copy for both
        patches = patches.reshape(batch, rows * columns, channels * size * size)
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
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.qkv = nn.Linear(dim, 3 * heads * self.head_dim)
        self.proj = nn.Linear(heads * self.head_dim, dim)
        self.dropout = dropout

    def project(self, x: Tensor) -> Tensor:
        """x (..., D) -> queries, keys and values, in this order, as one tensor (..., 3, heads, head_dim)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))

    def forward(self, x: Tensor, shapes: Shapes, backends: Sequence[str]) -> Tensor:
        """x (S, D) -> (S, D); `shapes` and `backends` are those of `attend_groups`."""
        return _dropout(self.proj(attend_groups(self.project(x), shapes, backends)), self.dropout, self.training)


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
        kept: Sequence[Kept] | None = None,
        owned: bool = False,
    ) -> Tensor:
        """x (S, D) -> (S, D), or (n, D) with `rows`.

        shapes   (images, tokens) of each group; S is the sum of images * tokens
        backends attention backend of each group
        packed   the groups came as a list: stochastic depth skips the dropped images' work at any rate, as DINOv2 does,
                 not only above `SUBSET_MIN_RATE`
        rows     the n tokens to return; the FFN is computed for them only. None: all
        kept     for the two branches, from `draw_kept`; None: drawn here
        owned    x may be written to, and so may the gradient that comes back: nobody else reads them
        """
        rate = 0.0
        if kept is None and self.training:  # else the rate is not read: a compiler would make a graph for each
            rate = self.drop_path
            if rate > (0 if packed else SUBSET_MIN_RATE):
                kept = draw_kept(shapes, [rate, rate], x.device)
        gamma1, gamma2 = _gamma(self.ls1), _gamma(self.ls2)
        with low_precision(self, compute_dtype(x)):
            if kept is not None:
                part, x = gather_samples(x, shapes, kept[0], owned, _norm_dtype(self.norm1, x))
                y = self.attn(_norm(self.norm1, part), kept_shapes(shapes, kept[0]), backends)
                x = add_samples(x, y, gamma1, shapes, kept[0])
            else:
                y = self.attn(_norm(self.norm1, x), shapes, backends)
                x = _add(x, y, gamma1, _per_token(_sample_factors(shapes, rate, x), shapes) if rate else None)
            if rows is not None:
                # They are few: skipping the work of the dropped images would save nothing.
                factors = None
                if rate or kept is not None:
                    of_images = (
                        _sample_factors(shapes, rate, x) if kept is None else _kept_factors(shapes, kept[1].images, x)
                    )
                    factors = of_images.index_select(0, rows.images).unsqueeze(1)
                # The gradient of an index_select would be a copy of zeros; x is nobody else's.
                x, _ = _GatherSamples.apply(x, not torch.compiler.is_compiling(), x.dtype, shapes, rows.tokens)
                return _add(x, self.mlp(_norm(self.norm2, x)), gamma2, factors)
            if kept is not None:
                part, x = gather_samples(x, shapes, kept[1], True, _norm_dtype(self.norm2, x))
                return add_samples(x, self.mlp(_norm(self.norm2, part)), gamma2, shapes, kept[1])
            y = self.mlp(_norm(self.norm2, x))
            return _add(x, y, gamma2, _per_token(_sample_factors(shapes, rate, x), shapes) if rate else None)


def _norm_dtype(norm: nn.Module, x: Tensor) -> torch.dtype:
    return torch.bfloat16 if norm.weight.dtype == torch.bfloat16 else x.dtype


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of x, in bfloat16 where `low_precision` made its parameters so: no float32 copy is written."""
    if norm.weight.dtype != torch.bfloat16:
        out: Tensor = norm(x)
        return out
    with without_autocast(x):
        return F.layer_norm(x.bfloat16(), x.shape[-1:], norm.weight, norm.bias, NORM_EPS)  # type: ignore[arg-type]


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
    """The images whose residual branch is computed: the first ones of each group's random orders (…, b) of b images.

    DINOv2 (arXiv 2304.07193), section 5, efficient stochastic depth.

    rate     in [0, 1)
    returns  for each group (…, max(int(b * (1 - rate)), 1)) int64 indices below b, in an order all different
    """
    return [order[..., : max(int(order.shape[-1] * (1 - rate)), 1)] for order in orders]


def draw_kept(shapes: Shapes, rates: Sequence[float], device: torch.device) -> list[Kept]:
    """What stochastic depth leaves for each of several branches, drawn at once.

    rates  of each branch, in [0, 1)
    """
    orders = draw_orders(shapes, len(rates), device)
    zero, kept = torch.zeros(1, device=device), []
    for rate, branches in groupby(range(len(rates)), rates.__getitem__):
        first, *others = branches
        chosen = first_of([order[first : first + 1 + len(others)] for order in orders], rate)
        rows = token_rows(shapes, chosen) if device.type == "cuda" else [None] * (1 + len(others))
        kept += [Kept(list(images), row, zero) for *images, row in zip(*chosen, rows, strict=True)]
    return kept


def token_rows(shapes: Shapes, chosen: Sequence[Tensor]) -> Tensor:
    """Where the tokens of chosen images are among all tokens.

    chosen   of each group (count, b') int64
    returns  (count, S') int64
    """
    rows, start = [], 0
    for (images, tokens), index in zip(shapes, chosen, strict=True):
        each = torch.arange(start, start + tokens, device=index.device)
        rows.append((index.unsqueeze(-1) * tokens + each).flatten(1))
        start += images * tokens
    return torch.cat(rows, dim=1)


def kept_shapes(shapes: Shapes, kept: Kept) -> Shapes:
    """The (images, tokens) of each group after `gather_samples`."""
    return tuple((len(index), tokens) for (_, tokens), index in zip(shapes, kept.images, strict=True))


def gather_samples(
    x: Tensor, shapes: Shapes, kept: Kept, owned: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens of the kept images of every group, (S', D), and x (S, D) for `add_samples` to add to.

    owned  that x itself, and its gradient is computed in place; else a copy. Views are always copied
    dtype  of the tokens, which come from x in that dtype: fewer bytes than in float32 first; None: that of x

    Where x goes through here, its gradient comes complete from `add_samples`: nothing has to be zeroed and summed.
    """
    owned = owned and not torch.compiler.is_compiling() and not x._is_view()
    part, stream = _GatherSamples.apply(x, owned, dtype or x.dtype, shapes, kept.tokens, *kept.images)
    return part, stream


def add_samples(x: Tensor, y: Tensor, gamma: Tensor | None, shapes: Shapes, kept: Kept) -> Tensor:
    """x plus, at the kept images, y * gamma * (images / kept images): on average over draws, the undropped sum.

    x       (S, D)    all tokens of all groups, from `gather_samples`; written to
    y       (S', D)   a branch's output for the kept images
    gamma   (D,)      LayerScale's factors; None: 1
    returns (S, D)    in the dtype of x
    """
    compiled = torch.compiler.is_compiling()
    return _AddSamples.apply(x, y, gamma, kept.zero, compiled, shapes, kept.tokens, *kept.images)


def _views(shapes: Shapes, kept: Sequence[Tensor]) -> list[tuple[slice, slice, int]]:
    """For each group: its rows among all tokens, its rows among the kept tokens, its number of images."""
    rows, start, stop = [], 0, 0
    for (images, tokens), index in zip(shapes, kept, strict=True):
        in_x, in_y = images * tokens, len(index) * tokens
        rows.append((slice(start, start + in_x), slice(stop, stop + in_y), images))
        start, stop = start + in_x, stop + in_y
    return rows


def _take(x: Tensor, shapes: Shapes, tokens: Tensor | None, kept: Sequence[Tensor]) -> Tensor:
    if tokens is not None:
        return x.index_select(0, tokens)
    views = _views(shapes, kept)
    out = x.new_empty(views[-1][1].stop, x.shape[1])
    for (in_x, in_y, images), index in zip(views, kept, strict=True):
        torch.index_select(x[in_x].view(images, -1), 0, index, out=out[in_y].view(len(index), -1))
    return out


def _put(x: Tensor, y: Tensor, shapes: Shapes, tokens: Tensor | None, kept: Sequence[Tensor]) -> None:
    """Add the kept images' rows y to x in place."""
    if tokens is not None:
        x.index_add_(0, tokens, y)
        return
    for (in_x, in_y, images), index in zip(_views(shapes, kept), kept, strict=True):
        x[in_x].view(images, -1).index_add_(0, index, y[in_y].view(len(index), -1))


def _times(a: Tensor, b: Tensor | None, zero: Tensor, shapes: Shapes, kept: Sequence[Tensor], out: Tensor) -> Tensor:
    """a * b * (images / kept images) in one pass, into `out`; a, out (S', D), b the same or (D,) or None: 1."""
    views = _views(shapes, kept)
    scales = [images / len(index) for (*_, images), index in zip(views, kept, strict=True)]
    parts = [in_y for _, in_y, _ in views] if len(set(scales)) > 1 else [slice(None)]
    for part, scale in zip(parts, scales):
        if b is None:
            torch.mul(a[part], scale, out=out[part])
        else:
            torch.addcmul(zero, a[part], b if b.ndim == 1 else b[part], value=scale, out=out[part])
    return out


class _GatherSamples(torch.autograd.Function):
    # Written out because autograd's own composition (select, then concatenate) makes a second copy each way.
    # All inputs as one: without gradients Dynamo counts the arguments to see whether the first is a context, and errs.

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, owned, dtype, shapes, tokens, *images = inputs
        ctx.save_for_backward(tokens, *images)
        ctx.shapes, ctx.owned = shapes, owned
        part = _take(x.to(dtype), shapes, tokens, images)
        if owned:
            ctx.mark_dirty(x)
        return part, x if owned else x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_part, grad = grads
        tokens, *images = ctx.saved_tensors  # read once: with checkpointing a second time is an error
        grad = grad if ctx.owned else grad.clone()
        _put(grad, grad_part.to(grad.dtype).contiguous(), ctx.shapes, tokens, images)
        return grad, None, None, None, None, *(None for _ in images)


class _AddSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, y, gamma, zero, compiled, shapes, tokens, *images = inputs
        ctx.save_for_backward(y if gamma is not None else None, gamma, zero, tokens, *images)
        ctx.shapes, ctx.dtype = shapes, y.dtype
        if compiled:
            x = x.clone()  # the compiler knows no marks, and leaves out the copy
        else:
            ctx.mark_dirty(x)
        y = _times(y, gamma, zero, shapes, images, torch.empty_like(y, dtype=x.dtype))
        _put(x, y, shapes, tokens, images)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, gamma, zero, tokens, *images = ctx.saved_tensors
        grad, grad_gamma = grads[0].contiguous(), None
        part = _take(grad, ctx.shapes, tokens, images)
        grad_y = _times(part, gamma, zero, ctx.shapes, images, torch.empty_like(part, dtype=ctx.dtype))
        if gamma is not None:
            # As exact as y, whose own rounding is as coarse. Float16 has not the range; a CPU would only add a copy.
            short = part.is_cuda and ctx.dtype == torch.bfloat16
            product = torch.empty_like(part, dtype=ctx.dtype if short else part.dtype)
            _times(part, y, zero, ctx.shapes, images, product)
            grad_gamma = product.sum(dim=0, dtype=part.dtype).to(gamma.dtype)
        return grad, grad_y, grad_gamma, None, None, None, None, *(None for _ in images)
