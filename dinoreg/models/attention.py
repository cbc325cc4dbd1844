"""Multi-head attention over groups of crops, with interchangeable kernels (DINOv2 §5).

Four backends compute the same numbers: `xformers` and `varlen` (PyTorch's own; one call for a packed batch, CUDA
only), `sdpa` (PyTorch's fused kernel, once per group) and `plain` (matmul, softmax, matmul; on a CPU the quickest for
short sequences). The sequence of one group is never mixed with that of another, nor one image with another.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.runtime.errors import UserError
from dinoreg.runtime.packed_attention import PACKED, Shapes, attend_packed, best_backend, run_problem

BACKENDS = ("auto", *PACKED, "sdpa", "plain")

# On a CPU, `plain` beats SDPA in low precision up to about this many tokens (SDPA's inner products miss the
# quick low-precision kernels); in float32 SDPA is as quick or quicker at every length.
PLAIN_MAX_TOKENS = 300


def check_backend(name: str) -> str:
    """Return `name`; UserError where it is not one of `BACKENDS`, or is one of `PACKED` on a machine without CUDA."""
    if name not in BACKENDS:
        raise UserError(f"attention={name!r} is not a backend; expected one of {', '.join(BACKENDS)}")
    if name in PACKED and not torch.cuda.is_available():
        raise UserError(f"attention={name!r} needs a CUDA device and none is present; use auto, sdpa or plain")
    return name


def resolve_backend(
    name: str, device: torch.device, num_tokens: int | None = None, dtype: torch.dtype = torch.float32
) -> str:
    """The backend that `name`, one of `BACKENDS`, stands for: "xformers", "varlen", "sdpa" or "plain".

    num_tokens  length T of a sequence, for the choice between plain and sdpa on a CPU; None: a short one
    dtype       of the queries, for the same choice and for `PACKED`, which have kernels for some dtypes only
    raises      UserError for an unknown name, and for one of `PACKED` where it cannot run on this device and dtype
    """
    check_backend(name)
    if name in PACKED:
        problem = run_problem(device, dtype, name) if device.type == "cuda" else f"the model is on {device.type}"
        if problem:
            raise UserError(f"attention={name!r} cannot run here: {problem}; use auto or sdpa")
    if name != "auto":
        return name
    if device.type == "cuda":
        return best_backend(device, dtype)[0]
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and (num_tokens or 0) <= PLAIN_MAX_TOKENS:
        return "plain"
    return "sdpa"


def describe_backend(name: str, device: torch.device, num_tokens: int | None, dtype: torch.dtype) -> str:
    """`resolve_backend` in words: "xformers", or "sdpa (xformers does not run here: ...)" where auto falls back.

    Arguments and errors are those of `resolve_backend`.
    """
    backend = resolve_backend(name, device, num_tokens, dtype)
    problem = best_backend(device, dtype)[1] if name == "auto" and device.type == "cuda" else None
    return f"{backend} ({problem})" if problem else backend


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's output for the input `x`: autocast's where it is on, else that of `x`."""
    return torch.get_autocast_dtype(x.device.type) if _autocast_on(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `x`: operations compute in the dtypes of their inputs."""
    return torch.autocast(x.device.type, enabled=False) if _autocast_on(x) else nullcontext()


def _autocast_on(x: Tensor) -> bool:
    # Asking about meta, which has no autocast, is an error.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, for every image and head.

    q, k, v (B, T, heads, head_dim)   of one dtype
    backend                           "xformers" | "sdpa" | "plain", as `resolve_backend` returns it
    returns (B, T, heads, head_dim)   of the same dtype
    """
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return (attention_weights(q, k) @ v).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)).

    q, k    (B, heads, T, head_dim)
    returns (B, heads, T, T)          in the dtype of q; rows (queries) sum to one

    Outside autocast, softmax keeps the dtype of its input and PyTorch's kernels sum it in float32, so that
    low precision loses only the rounding of the scores, with no float32 copy of them.
    """
    with without_autocast(q):
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)


def attend_groups(qkv: Tensor, shapes: Shapes, backends: Sequence[str]) -> Tensor:
    """Attention of packed groups (DINOv2 section 5, sequence packing): tokens attend within their own image only.

    qkv      (S, 3, heads, head_dim)   S = sum of images * tokens over the groups
    shapes                             (images, tokens) of each group, in the order in which they are packed
    backends                           one per group, as `resolve_backend` returns it
    returns  (S, heads * head_dim)
    """
    if backends[0] == "varlen" or (backends[0] == "xformers" and len(shapes) > 1):  # for all groups: a device's matter
        return attend_packed(qkv, shapes, backends[0]).flatten(1)
    mixed = []
    for group, backend in zip(unpack(qkv, shapes), backends, strict=True):
        q, k, v = group.unbind(2)
        mixed.append(attend(q, k, v, backend).flatten(2))
    return pack(mixed)


def pack(groups: Sequence[Tensor]) -> Tensor:
    """Groups (b, T, …) of different lengths T as one (S, …)."""
    flat = [group.flatten(0, 1) for group in groups]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def unpack(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """Packed (S, …) as its groups, each (images, tokens, …)."""
    parts = x.split([images * tokens for images, tokens in shapes]) if len(shapes) > 1 else (x,)
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]
