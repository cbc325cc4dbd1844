"""Whether xformers works here, tested by running it, and why it does not.

An import alone proves little: a build for another PyTorch imports without an error, warns, and then finds no kernel.
"""

import logging
from functools import lru_cache

import torch


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


@lru_cache(maxsize=16)
def run_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a small packed attention, forward and backward, fails under xformers on a CUDA device; else None.

    dtype  of queries, keys and values
    """
    problem = load_problem()
    if problem is not None:
        return problem
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            x = torch.ones(1, 24, 2, 64, device=device, dtype=dtype, requires_grad=True)
            out = memory_efficient_attention(x, x, x, attn_bias=BlockDiagonalMask.from_seqlens([9, 15]))
            out.sum().backward()
    except Exception as error:  # whatever it raises, the answer is the same: not this backend
        return reason(error)
    return None


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
