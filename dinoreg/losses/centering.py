"""Teacher targets: Sinkhorn-Knopp (DINOv2 section 4; SwAV, arXiv 2006.09882) and softmax centering (DINO section 3.1).

Both turn teacher logits into target rows that sum to one and keep the batch from agreeing on few prototypes.
They are functions of all rows of the effective batch: a caller that accumulates gradients passes the rows of
all micro-batches at once. Rows of other processes enter through sums that are the identity on one process.
"""

import torch
from torch import Tensor

from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.runtime.tiling import chunks, rows_in_place, rows_per_chunk

# A row whose largest logit lies more than this many temperatures below the largest logit of all rows is
# lifted to that distance, so that exp() never empties it. Cosine logits (|logit| <= 1) at a temperature of
# 0.04 lie within it: the largest of thousands is seldom negative.
_MAX_DEPTH = 40.0


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, teacher_temp: float | Tensor, iterations: int = 3, ranks: Ranks = ALONE) -> Tensor:
    """Assign rows to prototypes so that each row has mass 1 and each prototype about (number of rows) / K.

    The teacher's centering of DINOv2 (arXiv 2304.07193, section 4), after SwAV (arXiv 2006.09882).

    logits        (n, K)  this process's teacher logits; n may be 0 and may differ between processes, which
                          must all call at the same time (one max and `iterations` sums are exchanged)
    teacher_temp          > 0, a number or a () tensor, the same on all processes
    iterations            >= 1; 3 in the paper
    ranks                 the processes whose rows are one batch
    returns       (n, K)  float32 (float64 for float64 logits), without gradient; every row sums to 1, prototypes
                          are balanced only approximately, because the rows are normalised last

    Each iteration divides every prototype by its mass over all rows of all processes, then every row by its
    own sum. The constants of the published form (the total mass, 1/K, 1/n) scale all entries alike, so the
    row step removes them: they are left out, and the number of rows need not be exchanged. The largest logit
    of all processes is subtracted before exp(), which is neutral for the same reason; a maximum per process
    would weigh the processes differently. A prototype whose mass underflows keeps targets of (almost) 0.
    """
    num_rows, num_prototypes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = rows_in_place(num_rows, num_prototypes, logits.device)
    targets = torch.empty(num_rows, num_prototypes, dtype=dtype, device=logits.device)
    mass = nothing = torch.zeros(num_prototypes, dtype=dtype, device=logits.device)
    smallest_mass = torch.finfo(dtype).tiny * 16

    row_max = torch.empty(num_rows, 1, dtype=dtype, device=logits.device)
    for rows in chunks(0, num_rows, size):
        row_max[rows] = logits[rows].amax(dim=-1, keepdim=True)
    largest = row_max.amax() if num_rows else torch.full((), -torch.inf, dtype=dtype, device=logits.device)
    shift = torch.minimum(ranks.all_reduce_max(largest), row_max + _MAX_DEPTH * teacher_temp)  # (n, 1)

    for rows in chunks(0, num_rows, size):
        part = torch.sub(logits[rows], shift[rows], out=targets[rows])
        part.mul_(1 / teacher_temp).exp_()
        mass = part.sum(dim=0) if mass is nothing else mass + part.sum(dim=0)

    for _ in range(iterations):
        scale = ranks.all_reduce_sum(mass).clamp_min(smallest_mass).reciprocal()  # (K,)
        mass = nothing
        for rows in chunks(0, num_rows, size):
            part = targets[rows].mul_(scale)
            part.div_(part.sum(dim=-1, keepdim=True))
            mass = part.sum(dim=0) if mass is nothing else mass + part.sum(dim=0)
    return targets


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """softmax((logits - center) / teacher_temp), row by row (DINO, arXiv 2104.14294, section 3.1).

    logits        (n, K)   teacher logits; n may be 0
    center        (1, K)   running mean of the teacher's logits over the steps before this one
    teacher_temp           > 0
    returns       (n, K)   float32 (float64 for float64 logits), without gradient; every row sums to 1
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    targets = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    shift, size = center.to(targets.dtype) / -teacher_temp, rows_per_chunk(logits.shape[1], logits.device)
    scratch = torch.empty_like(targets[:size])
    for rows in chunks(0, len(logits), size):
        part = torch.add(shift, logits[rows], alpha=1 / teacher_temp, out=scratch[: len(logits[rows])])
        torch.softmax(part, dim=-1, out=targets[rows])
    return targets


@torch.no_grad()
def update_center(
    center: Tensor, logits: Tensor, momentum: float = 0.9, ranks: Ranks = ALONE, by_process: bool = False
) -> Tensor:
    """momentum * center + (1 - momentum) * (mean of the logits over the rows of all processes); DINO section 3.1.

    center    (1, K)   float32
    logits    (n, K)   this step's teacher logits; n may be 0 and may differ between processes, which must
                       all call at the same time (one sum is exchanged)
    momentum           in [0, 1]; 0.9 in the paper
    ranks              the processes whose rows are one batch
    by_process         the mean of the processes' own means (of those with rows), as the reference has it of patches;
                       else every row of every process counts the same
    returns   (1, K)   a new tensor of center's dtype; equal to `center` if no process has a row

    The result serves the NEXT step: the targets of a step see the statistics of the steps before it only, so
    call this after `softmax_center`.
    """
    num_prototypes = logits.shape[1]
    sums = torch.zeros(num_prototypes + 1, dtype=center.dtype, device=logits.device)  # column sums, row count
    for rows in chunks(0, len(logits), rows_in_place(len(logits), logits.shape[1], logits.device)):
        sums[:-1] += logits[rows].sum(dim=0, dtype=center.dtype)
    sums[-1:].fill_(logits.shape[0])  # an assignment would wait for the device
    if by_process:
        sums /= sums[-1].clamp_min(1)
    sums = ranks.all_reduce_sum(sums)
    count = sums[-1]
    mean = sums[:-1] / count.clamp_min(1)
    return torch.where(count > 0, center * momentum + mean * (1 - momentum), center)
