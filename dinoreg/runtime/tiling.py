"""Walking through a large matrix a few rows at a time: logits over K prototypes, or the prototypes themselves.

With K = 65536 such a matrix takes hundreds of megabytes, and each formula on it needs several
elementwise passes. A piece that fits in the processor's cache makes all passes but the first nearly free;
on an accelerator a piece only bounds the scratch memory, so it is much larger.
"""

from collections.abc import Iterator

import torch

# Elements of a piece: 2 MiB of float32 on a CPU (measured best with 2 cores), 128 MiB elsewhere.
CPU_CHUNK = 1 << 19
DEVICE_PIECE = 1 << 25


def rows_per_chunk(row_length: int, device: torch.device) -> int:
    """How many rows of `row_length` elements to take at once, at least 1."""
    budget = CPU_CHUNK if device.type == "cpu" else DEVICE_PIECE
    return max(1, budget // max(1, row_length))


def rows_in_place(rows: int, row_length: int, device: torch.device) -> int:
    """How many of `rows` rows to take at once where no scratch memory is needed: on an accelerator all, at least 1."""
    return rows_per_chunk(row_length, device) if device.type == "cpu" else max(1, rows)


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` elements that cover start to stop - 1; none if the range is empty."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
