"""The machine under a run: device, precision, memory allocator, threads."""

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from dinoreg.runtime.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}

# glibc's names for mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def pick_device(name: str) -> torch.device:
    """The device named `auto | cpu | cuda[:i] | mps`; UserError for other names and for a device that is missing."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,2})?", name):
        raise UserError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: PyTorch finds no CUDA device here; use device=cpu or device=auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={name}: no Apple GPU here; use device=cpu or device=auto")
    return device


def cpu_has_bf16() -> bool:
    """Whether matrix products in bfloat16 run in hardware on this CPU (AVX-512 BF16 or AMX)."""
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((capability and capability()) or (amx and amx()))


def cuda_has_bf16(device: torch.device) -> bool:
    """Whether this GPU computes in bfloat16 in hardware; that PyTorch can emulate it (slowly) does not count."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of `auto | bf16 | fp16 | fp32 | tf32`; auto is bf16 wherever the hardware computes in it.

    raises UserError for tf32 where the hardware does not have it
    """
    if name == "tf32" and not (device.type == "cuda" and cuda_has_bf16(device)):  # GPUs have both or neither
        raise UserError(f"precision=tf32: {device} does not compute in it; use fp32")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if cuda_has_bf16(device) else torch.float16
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """A context in which matrix products of float32 parameters are computed in `dtype`; without effect for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory instead of returning it to the system; returns whether that was set.

    A step on the CPU frees and allocates hundreds of megabytes; page faults on new memory cost it 10 to 20 %.
    Nothing is changed where the environment has MALLOC_* variables or DINOREG_MALLOC=0.
    """
    chosen = os.environ.get("DINOREG_MALLOC") == "0" or any(key.startswith("MALLOC_") for key in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        largest = 2**31 - 1
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, 2**30) and libc.mallopt(_M_TRIM_THRESHOLD, largest))
    except (OSError, AttributeError):  # not glibc
        return False


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: allocated on the device for CUDA, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def per_channel(
    values: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Numbers, one for each channel or one for all, as (C, 1, 1) on a device, which the host does not wait for."""
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1).to(device, non_blocking=True)
