"""Attention over packed crops in one call on CUDA, and which kernels for it work there, tested by running them.

An import alone proves little: a build for another PyTorch imports without an error, warns, and then finds no kernel.
"""

import logging
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

PACKED = ("xformers", "varlen")  # backends that attend to all groups in one call, on CUDA; the better one first

Shapes = tuple[tuple[int, int], ...]  # one (images, tokens) pair per group


def load_problem() -> str | None:
    """The reason why xformers or its compiled extension does not load; None if it loads. No CUDA device is needed."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would log six lines about the problem that is returned here
    try:
        import xformers

        # Where xformers itself (xformers.info) looks for it; it raises nothing on import.
        problem = getattr(getattr(xformers, "_cpp_lib", None), "_cpp_library_load_exception", None)
    except Exception as error:
        problem = error
    finally:
        logger.setLevel(level)
    return None if problem is None else reason(problem)


@lru_cache(maxsize=32)
def run_problem(device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """The reason why a small `attend_packed`, forward and backward, fails on a CUDA device; None if it runs.

    dtype  of queries, keys and values
    """
    if backend == "xformers" and (problem := load_problem()) is not None:
        return problem
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            qkv = torch.ones(24, 3, 2, 64, device=device, dtype=dtype, requires_grad=True)
            attend_packed(qkv, ((1, 9), (1, 15)), backend).sum().backward()
    except Exception as error:  # whatever it raises, the answer is the same: not this backend
        return reason(error)
    return None


def attend_packed(qkv: Tensor, shapes: Shapes, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, for every image and head, in one call.

    qkv      (S, 3, heads, head_dim)   S = sum of images * tokens over the groups
    shapes                             (images, tokens) of each group, in the order in which they are packed
    backend                            "xformers", or "varlen": torch.nn.attention.varlen
    returns  (S, heads, head_dim)
    """
    q, k, v = qkv.unbind(1)
    borders = _borders(backend, shapes, qkv.device)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        longest = max(tokens for _, tokens in shapes)
        out: Any = varlen_attn(q, k, v, borders, borders, longest, longest)
        return out
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=borders).squeeze(0)


def _borders(backend: str, shapes: Shapes, device: torch.device) -> Any:
    return _kept_borders(backend, shapes, device)  # a function of its own, which `mark_constants` can mark


@lru_cache(maxsize=128)
def _kept_borders(backend: str, shapes: Shapes, device: torch.device) -> Any:
    """xformers' mask of packed images; for varlen where each begins, and the last ends: (images + 1,) int32."""
    lengths = [tokens for images, tokens in shapes for _ in range(images)]
    with torch.inference_mode(False):  # it may be needed for a gradient later
        if backend == "varlen":
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(lengths, device=device)


def mark_constants() -> None:
    """Have torch.compile take the borders of images for constants, which are made outside the graph."""
    torch.compiler.assume_constant_result(_borders)


def best_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The attention backend that serves a CUDA device best, and the reason why no better one does (None: xformers).

    In order: "xformers"; "varlen", torch.nn.attention.varlen; "sdpa".
    """
    problems: list[str] = []
    for backend in PACKED:
        problem = run_problem(device, dtype, backend)
        if problem is None:
            return backend, "; ".join(problems) or None
        problems.append(f"{backend} does not run here: {problem}")
    return "sdpa", "; ".join(problems)


def reason(error: BaseException) -> str:
    """The reason in an error's text, on one line.

    Of the long errors of xformers' operators ("… is not supported because:") the reason of each; of its loader's, the
    versions it was built for and those installed, and the system's error behind it. Otherwise the first line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.endswith("because:")]
    if starts:
        chosen = [line for line in lines[starts[0] + 1 :] if not line.endswith("because:")]
    else:
        chosen = [line for line in lines if "(you have" in line] or lines[:1]
    if error.__cause__ is not None:
        chosen.append(reason(error.__cause__))
    return "; ".join(dict.fromkeys(chosen)) or type(error).__name__
