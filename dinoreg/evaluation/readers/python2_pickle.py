"""A reader for the kind of pickle that CIFAR's and Revisited Oxford's files are, which runs nothing that a file names.

A pickle is a program. The few NumPy functions that such a file calls are replaced by stand-ins, and nothing else can be
named. What a file says of an array is checked before NumPy sees it. The files were written by Python 2, whose text is
read as Latin-1.
"""

import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dinoreg.evaluation.readers.files import read_bytes
from dinoreg.runtime.errors import UserError, one_line

MAX_BYTES = 256 << 20  # the largest of the real files, CIFAR-100's train, has 155 MB


# Each stand-in defines what is done with a state: none can be given attributes.
class _Dtype:
    """Stands in for `numpy.dtype`: numbers, the lowest byte first, and nothing else."""

    def __init__(self, code: Any = None, *_flags: Any) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if text not in ("u1", "i4", "i8", "f4", "f8"):
            raise ValueError(f"an array of type {str(code)[:20]}, expected u1, i4, i8, f4 or f8")
        self.kind = np.dtype(f"<{text}")

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", b"<", b"|"):
            raise ValueError("an array with the highest byte first")


class _Array(np.ndarray):
    """Stands in for `numpy.ndarray` and for what makes one: empty at first, and filled by its state."""

    def __new__(cls, *_arguments: Any) -> "_Array":
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or type(shape) is not tuple or not all(type(n) is int for n in shape):
            raise ValueError("an array of an unknown form")
        raw = data.encode("latin1") if isinstance(data, str) else data
        size = int(np.prod(shape, dtype=object)) * dtype.kind.itemsize
        if not isinstance(raw, bytes) or min(shape, default=0) < 0 or len(raw) != size:
            raise ValueError(f"an array of shape {shape} whose data do not fill it")
        super().__setstate__((1, shape, dtype.kind, fortran is True, raw))  # type: ignore[arg-type]


class _Bytes:
    """Stands in for `_codecs.encode` and `bytes`, as which Python 3 writes bytes for Python 2."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:  # type: ignore[misc]
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("an unknown encoding of bytes")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a function")


_STAND_INS: Mapping[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
}


class _Unpickler(pickle._Unpickler):
    """The unpickler of the standard library that is written in Python, which reserves no memory on a file's word."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # takes its memory before the data are read

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"it names {module}.{name}, which is not allowed")
        return _STAND_INS[module, name]


def read_dictionary(path: Path, dataset: str, archive: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The dictionary in a Python 2 pickle; arrays, also within lists and dictionaries, come as NumPy's.

    Raises UserError, in one line, for a file that is missing, larger than max_bytes, damaged, not a dictionary with
    text keys, or that names anything besides arrays of numbers. Nothing that a file names is imported or called.
    """
    data = read_bytes(path, dataset, archive, max_bytes)
    try:
        values = _Unpickler(BytesIO(data), encoding="latin1").load()
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError("it holds no dictionary with names for keys")
        return values
    except Exception as error:  # a damaged pickle can raise any kind of exception
        raise UserError(f"{dataset}: {path} is not a readable pickle: {one_line(error, 200)}") from None
