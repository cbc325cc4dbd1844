"""Floating-point operations of one image in a training step, counted while the step runs on fake tensors.

Counted are matrix products, a multiply-add as two: linear maps and attention, as they are executed. Norms, activations
and losses are left out (below one percent). What drop path skips is not computed, and neither is the last FFN of tokens
that no loss looks at.
"""

from collections import Counter
from dataclasses import dataclass

from dinoreg.plan.job import Job
from dinoreg.plan.memory import BLOCKS
from dinoreg.plan.trace import trace_job


@dataclass(frozen=True)
class Operations:
    """One image's share of a training step, in floating-point operations.

    student    backbone on all crops, forward and backward
    teacher    backbone on the global crops
    heads      the student's and the teacher's
    again      forward passes that are repeated or added: recomputed blocks, an anchor, KoLeo's pass over micro-batches
    attention  products with (T, T) matrices; contained in the others
    """

    student: float
    teacher: float
    heads: float
    again: float
    attention: float

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.heads + self.again


def operations_of(job: Job) -> Operations:
    """Operations of one image of this job; KoLeo's search, which depends on the whole batch, is `job.koleo_operations`.

    Every micro-batch takes as many. With a deep backbone two smaller ones are counted: each block adds the same.
    """
    depth, parts = job.sizes.depth, min(2, job.config.optim.accumulate)
    masked = (job.masked_patches(job.micro_batch_size),) * parts
    blocks = depth if depth <= BLOCKS[1] else BLOCKS[0]
    counts: Counter[str] = Counter(trace_job(job, blocks, masked, alone=True).operations)
    if blocks < depth:
        more = Counter(trace_job(job, BLOCKS[1], masked, alone=True).operations)
        for kind, count in more.items():
            counts[kind] += (count - counts[kind]) * (depth - blocks) // (BLOCKS[1] - blocks)
    images = job.micro_batch_size * parts
    return Operations(**{name: counts[name] / images for name in Operations.__dataclass_fields__})
