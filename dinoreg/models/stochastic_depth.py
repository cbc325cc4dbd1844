"""Stochastic depth by batch subset (DINOv2, arXiv 2304.07193, section 5): dropped images' branches are not computed.

Tokens are packed as in `layers`: one matrix (S, D), the crop groups one after the other.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinoreg.models.attention import Shapes


class Kept(NamedTuple):
    """The images of which one residual branch is computed.

    images  of each group (b',) int64, all different
    tokens  (S',) int64, where their tokens are among all S: one kernel then moves those of all groups. None on a CPU,
            where long rows, of an image each, are quicker
    zero    (1,) 0: adding products to it scales them in the same pass
    """

    images: Sequence[Tensor]
    tokens: Tensor | None
    zero: Tensor


def draw_kept(shapes: Shapes, rates: Sequence[float], device: torch.device) -> list[Kept]:
    """For each of several branches: of b images of a group max(int(b * (1 - rate)), 1), the first of a random order.

    rates  of the branches, in [0, 1)
    """
    orders = [torch.rand(len(rates), images, device=device).argsort(dim=1) for images, _ in shapes]
    zero = torch.zeros(1, device=device)
    kept: list[Kept] = []
    for rate, branches in groupby(rates):
        these = slice(len(kept), len(kept) + len(list(branches)))
        images = [order[these, : max(int(order.shape[1] * (1 - rate)), 1)] for order in orders]
        tokens = token_rows(shapes, images) if device.type == "cuda" else [None] * len(images[0])
        kept += [Kept(each, rows, zero) for *each, rows in zip(*images, tokens, strict=True)]
    return kept


def token_rows(shapes: Shapes, images: Sequence[Tensor]) -> Tensor:
    """Where the tokens of some images are among all tokens.

    images   of each group (count, b') int64
    returns  (count, S') int64
    """
    rows, start = [], 0
    for (total, tokens), index in zip(shapes, images, strict=True):
        first = torch.arange(start, start + tokens, device=index.device)  # of the group's first image
        rows.append((index.unsqueeze(-1) * tokens + first).flatten(1))
        start += total * tokens
    return torch.cat(rows, dim=1)


def kept_shapes(shapes: Shapes, images: Sequence[Tensor]) -> Shapes:
    """The (images, tokens) of each group after `gather_samples`."""
    return tuple((len(index), tokens) for (_, tokens), index in zip(shapes, images, strict=True))


def gather_samples(
    x: Tensor, shapes: Shapes, kept: Kept, owned: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens of the kept images of every group, (S', D), and x (S, D) for `add_samples` to add to.

    owned  that x itself, and its gradient is computed in place; else a copy. Views are always copied
    dtype  of the tokens, taken from x in that dtype: fewer bytes than to cast them afterwards; None: that of x

    Where x goes through here, its gradient comes complete from `add_samples`: nothing has to be zeroed and summed.
    """
    owned = owned and not torch.compiler.is_compiling() and not x._is_view()
    return _GatherSamples.apply(x, owned, dtype or x.dtype, shapes, kept.tokens, *kept.images)


def gather_rows(x: Tensor, shapes: Shapes, rows: Tensor) -> Tensor:
    """The tokens (n, D) of x (S, D) with these numbers (n,), all different; nothing else may use x.

    The gradient of an index_select would be a copy of zeros.
    """
    return _GatherSamples.apply(x, not torch.compiler.is_compiling(), x.dtype, shapes, rows)[0]


def add_samples(x: Tensor, y: Tensor, gamma: Tensor | None, shapes: Shapes, kept: Kept) -> Tensor:
    """x plus, at the kept images, y * gamma * (images / kept images): on average over draws, the undropped sum.

    x       (S, D)    all tokens of all groups, from `gather_samples`; written to
    y       (S', D)   a branch's output for the kept images
    gamma   (D,)      LayerScale's factors; None: 1
    returns (S, D)    in the dtype of x
    """
    gamma, compiled = kept.zero + 1 if gamma is None else gamma, torch.compiler.is_compiling()
    return _AddSamples.apply(x, y, gamma, kept.zero, compiled, shapes, kept.tokens, *kept.images)


def _by_image(x: Tensor, part: Tensor, shapes: Shapes, images: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Of each group a row for each image in x (S, D), the kept images' numbers, and their rows in `part` (S', D)."""
    of_x = x.split([count * tokens for count, tokens in shapes])
    of_part = part.split([count * tokens for count, tokens in kept_shapes(shapes, images)])
    for (count, _), rows, index, kept_rows in zip(shapes, of_x, images, of_part, strict=True):
        yield rows.view(count, -1), index, kept_rows.view(len(index), -1)


def _take(x: Tensor, shapes: Shapes, tokens: Tensor | None, images: Sequence[Tensor]) -> Tensor:
    if tokens is not None:
        return x.index_select(0, tokens)
    part = x.new_empty(sum(count * tokens for count, tokens in kept_shapes(shapes, images)), x.shape[1])
    for rows, index, kept_rows in _by_image(x, part, shapes, images):
        torch.index_select(rows, 0, index, out=kept_rows)
    return part


def _put(x: Tensor, part: Tensor, shapes: Shapes, tokens: Tensor | None, images: Sequence[Tensor]) -> None:
    """Add the kept images' tokens `part` to x in place."""
    if tokens is not None:
        x.index_add_(0, tokens, part)
    else:
        for rows, index, kept_rows in _by_image(x, part, shapes, images):
            rows.index_add_(0, index, kept_rows)


def _times(a: Tensor, b: Tensor, zero: Tensor, shapes: Shapes, images: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """a * b * (images / kept images) in one pass, in `dtype`; a (S', D), b of a shape that broadcasts to it."""
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    sizes = [count * tokens for count, tokens in kept_shapes(shapes, images)]
    scales = [total / len(index) for (total, _), index in zip(shapes, images, strict=True)]
    if len(set(scales)) == 1:
        sizes, scales = [len(a)], scales[:1]
    for size, stop, scale in zip(sizes, accumulate(sizes), scales, strict=True):
        rows = slice(stop - size, stop)  # not split: of its parts a compiler would keep copies
        torch.addcmul(zero, a[rows], b.expand_as(a)[rows], value=scale, out=out[rows])
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
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gamma, zero, tokens, *images)
        ctx.shapes, ctx.dtype = shapes, y.dtype
        if compiled:
            x = x.clone()  # the compiler knows no marks, and leaves out the copy
        else:
            ctx.mark_dirty(x)
        _put(x, _times(y, gamma, zero, shapes, images, x.dtype), shapes, tokens, images)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, gamma, zero, tokens, *images = ctx.saved_tensors
        grad, grad_gamma = grads[0].contiguous(), None
        part = _take(grad, ctx.shapes, tokens, images)
        grad_y = _times(part, gamma, zero, ctx.shapes, images, ctx.dtype)
        if y is not None:
            # As exact as y, whose own rounding is as coarse. Float16 has not the range; a CPU would only add a copy.
            dtype = ctx.dtype if part.is_cuda and ctx.dtype == torch.bfloat16 else part.dtype
            grad_gamma = _times(part, y, zero, ctx.shapes, images, dtype).sum(0, dtype=part.dtype).to(gamma.dtype)
        return grad, grad_y, grad_gamma, None, None, None, None, *(None for _ in images)
