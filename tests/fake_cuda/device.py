"""Inside a process on the fake device: what it launches, copies and waits for, and what scalar reads answer.

`python -m tests.fake_cuda.device MODULE:FUNCTION ARGUMENTS ANSWER` calls the function with the arguments of a JSON file
and writes what it returns to another; `fixture.run` starts it so.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import dinoreg

PACKAGE = str(Path(dinoreg.__file__).parent) + os.sep
RUNTIME = ctypes.CDLL(None)  # preloaded

_Hook = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long, ctypes.c_void_p)
_hooks: list[Any] = [_Hook()]  # of the contexts that are open, below them none


@dataclass
class Counts:
    """What was done between entering and leaving `counted`.

    kernels      launches by the kernel's name, without those in libraries
    products     matrix products in cuBLAS
    waits        {"what < place < …": times}: calls after which the host has waited, by lines of dinoreg, inmost first
    copies       {"pageable to device": times}, with " large" above 64 KiB
    copied       {"pageable to device": bytes}
    collectives  {"all-reduce": (calls, bytes that a process put in)}
    mallocs      calls of cudaMalloc (or of cuMemCreate)
    devices      numbers of the devices that anything was done on
    allocated, reserved  bytes, the peaks of PyTorch's allocator; `retries`: how often it freed its cache to go on
    """

    kernels: dict[str, int] = field(default_factory=dict)
    products: int = 0
    waits: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    copied: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    mallocs: int = 0
    devices: list[int] = field(default_factory=list)
    allocated: int = 0
    reserved: int = 0
    retries: int = 0

    @property
    def launches(self) -> int:
        """Kernels and matrix products."""
        return sum(self.kernels.values()) + self.products


# DDP compares shapes, which no kernel computes, between processes.
COPIED = ("parallelize", "<dictcomp>")


class Answers:
    """What copies to the host hold, by the function that reads; without an answer zeros, as no kernel wrote anything.

    A function is the inmost of dinoreg's on the stack. Its reads take the values of its list in turn and keep the last.
    A value is a number, or the numbers of a tensor that is read whole, repeated as far as they are needed: floats are
    float32, integers int64, truths a byte.
    """

    def __init__(self, **values: Any) -> None:
        self._values = {name: list(given) if isinstance(given, list) else [given] for name, given in values.items()}

    def write(self, function: str, size: int, address: int) -> None:
        """Put the next value of `function`, else zeros, over `size` bytes at `address`."""
        values = self._values.get(function, [0])
        if function in COPIED:
            return
        value = np.asarray(values.pop(0) if len(values) > 1 else values[0])
        if value.dtype == np.float64:
            value = value.astype(np.float32)
        ctypes.memmove(address, np.resize(value, -(-size // value.itemsize)).tobytes(), size)


# All is well: every step was finite, and so are all features; norms of tokens are not zero.
SOUND = {"_record_rejected": 1.0, "__init__": True, "norms": 1.0}


def _place(frame: FrameType | None) -> tuple[str, str]:
    """The innermost function of dinoreg on the stack, and the lines of all of them, innermost first."""
    lines: list[str] = []
    function = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            function = function or frame.f_code.co_name
            lines.append(f"{name[len(PACKAGE) :]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return function, " < ".join(lines)


@contextlib.contextmanager
def counted(answers: Answers | None = None) -> Iterator[Counts]:
    """What happens inside, filled in on leaving; `answers` is what reads get.

    One inside another takes over until it is left: the outer one lacks what happened before and in the inner one.
    """
    counts, waits = Counts(), Counter[str]()

    def hook(what: bytes, size: int, address: int | None) -> None:
        function, place = _place(sys._getframe(1))
        if address is None:
            waits[f"{what.decode()} < {place}"] += 1
        elif answers is not None:
            answers.write(function, size, address)

    _hooks.append(_Hook(hook))
    torch.cuda.reset_peak_memory_stats()
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    RUNTIME.fake_cuda_reset()
    RUNTIME.fake_cuda_on_wait(_hooks[-1])
    try:
        yield counts
    finally:
        _hooks.pop()
        RUNTIME.fake_cuda_on_wait(_hooks[-1])
        counts.waits = dict(waits)
        counts.devices = [device for device in range(8) if RUNTIME.fake_cuda_devices() >> device & 1]
        counts.allocated, counts.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        counts.retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
        _read_counts(counts)


def _read_counts(counts: Counts) -> None:
    with tempfile.NamedTemporaryFile() as file:
        RUNTIME.fake_cuda_write(os.fsencode(file.name))
        lines = Path(file.name).read_text().splitlines()
    every = {name: int(number) for number, name in (line.split("\t", 1) for line in lines)}

    def starting(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): number for name, number in every.items() if name.startswith(prefix)}

    counts.kernels, counts.products = starting("kernel "), sum(starting("product ").values())
    counts.copies, counts.copied = starting("copy "), starting("bytes of copy ")
    sent = starting("bytes of collective ")
    counts.collectives = {name: (calls, sent[name]) for name, calls in starting("collective ").items()}
    counts.mallocs = every.get("malloc", 0)


def main(function: str, arguments: str, answer: str) -> None:
    """Call MODULE:FUNCTION with the keyword arguments of a JSON file; write what it returns, dataclasses as dicts."""
    # Plans and workspaces come from a library that is a stub here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False
    module, name = function.split(":")
    call: Callable[..., Any] = getattr(importlib.import_module(module), name)
    returned = call(**json.loads(Path(arguments).read_text()))
    Path(answer).write_text(json.dumps(returned, default=asdict))


if __name__ == "__main__":
    main(*sys.argv[1:])
