"""Pickles as Python 2 wrote them, byte for byte of the kind that CIFAR's files are; nothing writes them any more."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def dumps(value: Any) -> bytes:
    """Protocol 2: dictionaries, lists, `str` (as Python 2's bytes), numbers, and arrays of bytes or int64."""
    return b"\x80\x02" + b"".join(_Writer().parts(value)) + b"."


def dumps_as_text(value: dict[str, Any]) -> bytes:
    """Protocol 0, which is text, of a dictionary of whole numbers and of lists of names: CIFAR-10's `batches.meta`."""
    slot, out = 1, ["(dp1\n"]

    def text(word: str) -> str:
        nonlocal slot
        slot += 1
        return f"S'{word}'\np{slot}\n"

    for key, item in value.items():
        out.append(text(key))
        if isinstance(item, list):
            slot += 1
            out.append(f"(lp{slot}\n")
            out.extend(text(word) + "a" for word in item)
        else:
            out.append(f"I{item}\n")
        out.append("s")
    return "".join(out).encode("latin1") + b"."


class _Writer:
    def __init__(self) -> None:
        self.slot = 0

    def put(self) -> bytes:
        self.slot += 1
        return b"q" + bytes([self.slot]) if self.slot < 256 else b"r" + struct.pack("<I", self.slot)

    def parts(self, value: Any) -> list[bytes]:
        if isinstance(value, dict):
            each = (item for pair in value.items() for item in pair)
            return [b"}", self.put(), b"(", *(part for item in each for part in self.parts(item)), b"u"]
        if isinstance(value, list):
            return [b"]", self.put(), b"(", *(part for each in value for part in self.parts(each)), b"e"]
        if isinstance(value, np.ndarray):
            return self.array(value)
        if isinstance(value, int):
            return [number(value)]
        if isinstance(value, float):
            return [b"G" + struct.pack(">d", value)]
        raw = value.encode("latin1") if isinstance(value, str) else value
        head = b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))
        return [head, raw, self.put()]

    def array(self, value: np.ndarray) -> list[bytes]:
        code, order = {"uint8": ("u1", "|"), "int64": ("i8", "<")}[str(value.dtype)]
        sizes = [*map(number, value.shape), b"\x86" if value.ndim == 2 else b"\x85"]
        return [
            b"cnumpy.core.multiarray\n_reconstruct\n", self.put(), b"cnumpy\nndarray\n", self.put(),
            b"K\x00\x85", self.put(), *self.parts("b"), b"\x87", self.put(), b"R", self.put(),
            b"(K\x01", *sizes, self.put(),
            b"cnumpy\ndtype\n", self.put(), *self.parts(code), b"K\x00K\x01\x87", self.put(), b"R", self.put(),
            b"(K\x03", *self.parts(order), b"NNN", number(-1), number(-1), b"K\x00t", self.put(), b"b",
            b"\x89", *self.parts(value.tobytes()), b"t", self.put(), b"b",
        ]  # fmt: skip


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)
