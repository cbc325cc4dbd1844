"""Ranks and sums over processes; on one process every function here is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, of the same shape; `tensor` itself on one process."""
    if world_size() == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum of `tensor` over all processes; `tensor` itself on one process."""
    if world_size() == 1:
        return tensor
    largest = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest
