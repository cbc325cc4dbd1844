"""Reading files that others name: never a pipe, a device or a socket, which would block, and never without a limit."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from dinoreg.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 2_000_000_000  # of a picture's file
_in_hand: dict[int, tuple[float, str, int]] = {}


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A context with a file to be read; OSError, at once, for what is no regular file, as for one that is not there."""
    with in_hand(path), open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        yield file


@contextmanager
def in_hand(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which this thread reads a file, for who asks what is waited for."""
    thread = threading.get_ident()
    _in_hand[thread] = time.monotonic(), str(path), thread
    try:
        yield
    finally:
        _in_hand.pop(thread, None)


def being_read() -> list[tuple[float, str, int]]:
    """(time.monotonic() of opening, path, thread) of the files that are `in_hand`, the oldest first."""
    return sorted(_in_hand.copy().values())


def read_regular(path: str | os.PathLike[str], most: int = MAX_BYTES) -> bytes:
    """The content of a regular file; OSError for another kind, for more than `most` bytes, and where reading fails."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {most:,} bytes that are read", os.fspath(path))
        return file.read()


def load_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a .npy file; OSError or ValueError, in words, for one that is damaged or holds objects."""
    import numpy as np  # not for help and messages

    with open_regular(path) as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("not a .npy file")
        try:
            return np.load(path, allow_pickle=False)
        except (SyntaxError, EOFError, MemoryError, OverflowError, TypeError, tokenize.TokenError) as error:
            raise ValueError(f"not a whole .npy file ({type(error).__name__})") from None


def open_to_append(path: Path) -> TextIO:
    """A text file at whose end to write; UserError for a link, which may lead anywhere, and for a pipe."""
    if path.is_symlink() or path.is_fifo():
        raise UserError(f"{path}: is a link or a pipe; expected a file of this folder's own")
    return open(path, "a")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe would block here until somebody writes to it
