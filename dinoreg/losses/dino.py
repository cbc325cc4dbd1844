"""Cross-entropy of student logits and teacher targets, and DINO's loss on class tokens (DINO section 3.1).

`soft_cross_entropy` is the one cross-entropy of the project, shared with the patch loss. It computes in
float32, a cache-sized piece at a time, and keeps of the (n, K) matrix its gradient alone, in the precision of
the logits: a float32 copy of the logits or of their softmax never exists.
"""

from typing import Any

import torch
from torch import Tensor

from dinoreg.runtime.tiling import chunks, rows_in_place, rows_per_chunk


class _SoftCrossEntropy(torch.autograd.Function):
    """Weighted sum of the rows' H = -sum_k q_k log_softmax(z)_k, z = logits / student_temp.

    Rows are seen as (repeats, m, K): `repeats` blocks of m rows which all face the same m targets. Only the
    logits get a gradient, w / student_temp * (mass * softmax(z) - q). The forward pass has log_softmax(z) at
    hand and makes q - mass * softmax(z) there: neither the logits nor the (float32) targets must live until the
    backward pass, which only applies the factors of rows and the upstream gradient.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        logits, targets, student_temp, weights, mass = inputs
        dtype = torch.promote_types(logits.dtype, torch.float32)
        blocks = logits.unflatten(0, (-1, targets.shape[0])) if targets.shape[0] else logits[None]
        repeats, num_targets, _ = blocks.shape
        weights = logits.new_ones(len(logits)) if weights is None else weights
        row_weights = weights.to(dtype).view(repeats, num_targets, 1)
        masses = row_weights.new_full((num_targets, 1), mass) if mass else targets.sum(-1, keepdim=True, dtype=dtype)
        grad = None
        if ctx.needs_input_grad[0]:
            # Before the loss scale has been applied, gradients of 1e-8 are common: too small for float16.
            grad_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
            grad = torch.empty(blocks.shape, dtype=grad_dtype, device=logits.device)
        losses = torch.empty(repeats, num_targets, dtype=dtype, device=logits.device)
        tiles = _tiles(blocks)
        first, second = (torch.empty_like(blocks[tiles[0]] if tiles else blocks, dtype=dtype) for _ in range(2))
        zero = losses.new_zeros(1)  # adding it makes a product in its precision, without a copy of the logits
        for block, rows in tiles:
            x, q = blocks[block, rows], targets[rows]
            scores, product = first[: x.shape[0], : x.shape[1]], second[: x.shape[0], : x.shape[1]]
            torch.log_softmax(torch.add(zero, x, alpha=1 / student_temp, out=product), dim=-1, out=scores)
            torch.sum(torch.mul(scores, q, out=product), dim=-1, out=losses[block, rows])
            if grad is not None:
                torch.addcmul(q, scores.exp_(), masses[rows], value=-1, out=grad[block, rows])
        ctx.save_for_backward(grad, row_weights / -student_temp)
        ctx.logits_dtype = logits.dtype
        return -(losses * row_weights.squeeze(-1)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, scale = ctx.saved_tensors
        # Not in place: the graph may be walked a second time.
        scaled = torch.empty(grad.shape, dtype=ctx.logits_dtype, device=grad.device)
        scale = scale * upstream
        repeats, num_targets, num_prototypes = grad.shape
        for rows in chunks(0, num_targets, rows_in_place(num_targets, repeats * num_prototypes, grad.device)):
            torch.mul(grad[:, rows], scale[:, rows], out=scaled[:, rows])
        return scaled.flatten(0, 1), None, None, None, None


def _tiles(blocks: Tensor) -> list[tuple[slice, slice]]:
    """Slices (of blocks, of rows) that cover all rows; rows first, since the blocks share the targets of a row."""
    repeats, num_targets, num_prototypes = blocks.shape
    num_rows = min(max(1, num_targets), rows_per_chunk(num_prototypes, blocks.device))
    num_blocks = rows_per_chunk(num_prototypes * num_rows, blocks.device)
    return [(block, rows) for rows in chunks(0, num_targets, num_rows) for block in chunks(0, repeats, num_blocks)]


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, student_temp: float, weights: Tensor | None = None, mass: float | None = None
) -> Tensor:
    """sum_i w_i * H(q_i, s_i) with H(q, s) = -sum_k q_k * log_softmax(s / student_temp)_k (DINO section 3.1).

    logits        (n, K)   student logits; n may be 0, which gives 0 and an empty gradient
    targets       (m, K)   n is a multiple of m: row i faces target i mod m, so that a few targets serve several
                           blocks of m rows. A target may have any mass (entries >= 0),
                           for example q1 + q2 with mass 2, which is H(q1, s) + H(q2, s)
    student_temp           > 0; 0.1 in the papers
    weights       (n,)     factor of each row; None: 1 for all
    mass                   of every target, where the caller knows it: saves reading them once; None: their sums
    returns       ()       float32 (float64 for float64 logits): the sum in nats, not a mean

    Only the logits get a gradient, in their own dtype; there is no second derivative.
    """
    return _SoftCrossEntropy.apply(logits, targets.detach(), student_temp, weights, mass)


def dino_loss(
    student_global: Tensor, student_local: Tensor | None, targets: Tensor, student_temp: float
) -> tuple[Tensor, Tensor]:
    """DINO's loss (arXiv 2104.14294, section 3.1): every student crop predicts the teacher's targets of its image.

    A local crop predicts the targets of both global views, a global crop those of the other global view only.

    student_global  (2B, K)    logits, rows of view 1 first; B > 0
    student_local   (L*B, K)   logits, all images of local crop 1 first; None or no rows when L = 0
    targets         (2B, K)    teacher targets, each of which sums to one, in the same order as student_global: the two
                               views are swapped HERE, so a caller must not swap them
    student_temp               > 0; 0.1 in the papers
    returns         (), ()     the loss of the global and of the local crops, in nats; float32 (float64 for float64)
    raises                     ValueError where the numbers of rows do not fit one another

    The 2 global and 2L local pairs each weigh 1 / M, M = 2 + 2L, and a pair is a mean over the B images.
    Without local crops M is 2 and the second value a plain 0 outside the graph; the reference clamps its
    count of local pairs to at least 1 and would divide by 3, in a case that it cannot run.
    """
    batch_size = targets.shape[0] // 2
    if not 0 < 2 * batch_size == len(targets) == len(student_global):
        raise ValueError(f"student_global and targets: expected two rows an image; {len(student_global), len(targets)}")
    num_local_rows = 0 if student_local is None else student_local.shape[0]
    if num_local_rows % batch_size:
        raise ValueError(f"student_local has {num_local_rows} rows; expected a multiple of {batch_size} images")
    num_pairs = 2 + 2 * (num_local_rows // batch_size)
    scale = 1 / (num_pairs * batch_size)
    global_loss = scale * soft_cross_entropy(student_global, targets.roll(batch_size, dims=0), student_temp, mass=1.0)
    if student_local is None or num_local_rows == 0:
        return global_loss, torch.zeros_like(global_loss)
    both_views = targets[:batch_size] + targets[batch_size:]  # (B, K), mass 2
    return global_loss, scale * soft_cross_entropy(student_local, both_views, student_temp, mass=2.0)
