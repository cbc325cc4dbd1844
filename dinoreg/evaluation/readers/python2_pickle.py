"""A reader for the kind of pickle that CIFAR's and Revisited Oxford's files are, which runs nothing that a file names.

A pickle is a program. Two checks restrict it: only instructions that a dictionary of text, numbers and arrays of them
needs are allowed, checked over the whole file before any is carried out; and the few NumPy functions that such a file
calls are replaced by stand-ins, so that not even NumPy's own unpickling sees the file's values. The files were written
by Python 2, whose text is read as Latin-1.
"""

import pickle
import pickletools
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dinoreg.evaluation.readers.files import read_bytes
from dinoreg.runtime.errors import UserError, one_line

MAX_BYTES = 256 << 20  # the largest of the real files, CIFAR-100's train, has 155 MB

_FRAME = "PROTO FRAME STOP MARK BINPUT LONG_BINPUT PUT BINGET LONG_BINGET GET MEMOIZE"
_TEXT = "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES"
_NUMBERS = "INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT NONE NEWTRUE NEWFALSE"
_CONTAINERS = "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
_CALLS = "GLOBAL STACK_GLOBAL REDUCE BUILD"  # of nothing but _STAND_INS
_INSTRUCTIONS = frozenset(" ".join((_FRAME, _TEXT, _NUMBERS, _CONTAINERS, _CALLS)).split())


class _Refused(Exception):
    """A file contains something that is not allowed; the text goes into the message."""


class _Dtype:
    """Stands in for `numpy.dtype`: numbers, the lowest byte first, and nothing else."""

    def __init__(self, code: Any = None, *_flags: Any) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if text not in ("u1", "i4", "i8", "f4", "f8"):
            raise _Refused(f"an array of type {str(code)[:20]}, expected u1, i4, i8, f4 or f8")
        self.kind = np.dtype(f"<{text}")

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", b"<", b"|"):
            raise _Refused("an array with the highest byte first")


class _Ndarray:
    """Stands in for `numpy.ndarray`: the array that `_reconstruct` begins and its state fills."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            raise _Refused("an array of an unknown form")
        raw = data.encode("latin1") if isinstance(data, str) else data
        size = int(np.prod(shape, dtype=object)) * dtype.kind.itemsize
        if not isinstance(raw, bytes) or min(shape, default=0) < 0 or len(raw) != size:
            raise _Refused(f"an array of shape {shape} whose data do not fill it")
        self.values = np.frombuffer(raw, dtype.kind).reshape(shape, order="F" if fortran is True else "C")


def _reconstruct(*_arguments: Any) -> _Ndarray:
    """Stands in for NumPy's: an empty array, filled by what follows."""
    return _Ndarray()


def _encode(text: Any, encoding: Any = None) -> bytes:
    """Stands in for `_codecs.encode`, as which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("an unknown encoding of bytes")
    return text.encode("latin1")


_STAND_INS: Mapping[tuple[str, str], Callable[..., Any]] = MappingProxyType(
    {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Ndarray,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): lambda: b"",  # as Python 3 writes the data of an empty array for Python 2
    }
)


class _Call:
    """A stand-in as a file can use it: it can be called and not changed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("it changes a function")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _Call(_STAND_INS[module, name])
        except KeyError:
            raise _Refused(f"it names {module}.{name}, which is not allowed") from None


def read_dictionary(path: Path, dataset: str, archive: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The dictionary in a Python 2 pickle; arrays, also within lists and dictionaries, come as NumPy's and read only.

    Raises UserError, in one line, for a file that is missing, larger than max_bytes, damaged, not a dictionary with
    text keys, or that contains anything besides containers, text, bytes, numbers and arrays of numbers. Nothing that a
    file names is imported or called.
    """
    data = read_bytes(path, dataset, archive, max_bytes)
    try:
        _check_instructions(data)
        values = _Unpickler(BytesIO(data), encoding="latin1").load()
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise _Refused("it holds no dictionary with names for keys")
        return {key: _plain(value) for key, value in values.items()}
    except Exception as error:  # a damaged pickle can raise any kind of exception
        what = "is refused" if isinstance(error, _Refused) else "is not a readable pickle"
        raise UserError(f"{dataset}: {path} {what}: {one_line(error, 200)}") from None


def _check_instructions(data: bytes) -> None:
    """Walk over the whole program without carrying anything out; _Refused at an instruction that is not allowed."""
    for count, (instruction, value, _position) in enumerate(pickletools.genops(data)):
        if instruction.name not in _INSTRUCTIONS:
            raise _Refused(f"it has the instruction {instruction.name}, which is not allowed")
        # A slot far beyond what was stored would make the unpickler reserve memory for all before it.
        slot: Any = value
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= slot <= count:
            raise _Refused("it stores values far apart")


def _plain(value: Any) -> Any:
    """A value with arrays in the place of what stands in for them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, _Ndarray) and value.values is None:
        raise _Refused("an array without data")
    return value.values if isinstance(value, _Ndarray) else value
