"""Which attention kernels work on a CUDA device, tested by running them, and why the better ones do not.

An import alone proves little: a build for another PyTorch imports without an error, warns, and then finds no kernel.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


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
def run_problem(device: torch.device, dtype: torch.dtype, backend: str = "xformers") -> str | None:
    """The reason why a small packed attention, forward and backward, fails on a CUDA device; None if it runs.

    dtype    of queries, keys and values
    backend  "xformers", or "varlen": torch.nn.attention.varlen
    """
    problem = load_problem() if backend == "xformers" else None
    if problem is not None:
        return problem
    try:
        attend = _with_xformers() if backend == "xformers" else _with_varlen(device)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            x = torch.ones(24, 2, 64, device=device, dtype=dtype, requires_grad=True)
            attend(x).sum().backward()
    except Exception as error:  # whatever it raises, the answer is the same: not this backend
        return reason(error)
    return None


def _with_xformers() -> Callable[[Tensor], Any]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens([9, 15])
    return lambda x: memory_efficient_attention(x[None], x[None], x[None], attn_bias=bias)


def _with_varlen(device: torch.device) -> Callable[[Tensor], Any]:
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.tensor([0, 9, 24], dtype=torch.int32, device=device)
    return lambda x: varlen_attn(x, x, x, starts, starts, 15, 15)


def best_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The attention backend that serves a CUDA device best, and the reason why no better one does (None: xformers).

    In order: "xformers"; "varlen", torch.nn.attention.varlen; "sdpa".
    """
    problems: list[str] = []
    for backend in ("xformers", "varlen"):
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
