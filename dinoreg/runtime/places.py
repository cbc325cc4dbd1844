"""Files by their path or by a URL of fsspec's (s3://, gs://, hf://, https://, memory://): listed, and read by ranges.

No network is touched for anything but what the user names by a URL. Credentials are found in fsspec's own ways, copies
are kept where one of its prefixes says so (`simplecache::https://…`). What fails for another reason than that the file
is not there, or not ours to read, is asked for again.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import EarlyEnd, RunError, one_line, reworded
from dinoreg.runtime.regular_files import MAX_BYTES, in_hand, open_regular, read_regular

T = TypeVar("T")
WAITS = (0.5, 2.0, 8.0)  # seconds before a URL is asked for once more
_URL = re.compile(r"[a-z][a-z0-9+.\-]+(?:::|://)", re.IGNORECASE)
_BUFFER = 1 << 22  # bytes that a file at a URL is read by: fewer requests, and no more than is of use
_CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "blob_id", "Content-MD5")
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL rather than a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def joined(root: str, name: str) -> str:
    """The place of what is called `name` below `root`."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def ending_of(name: str) -> str:
    """The ending of a file's name, in small letters; of a URL's without what is asked of the server."""
    return os.path.splitext(name.partition("?")[0] if is_url(name) else name)[1].lower()


def filesystem(url: str) -> tuple[Any, str]:
    """(the file system of fsspec's, its own name of the place) of a URL; UserError where a package is missing."""
    with reworded(f"{url} needs fsspec: {install('fsspec')}", ImportError):
        import fsspec.core
    with reworded(
        f"{url} cannot be opened; {install('fsspec')} brings https, other stores say what they need", Exception
    ):
        return fsspec.core.url_to_fs(url)


def read_place(place: str) -> bytes:
    """The content of a file, at a URL at most MAX_BYTES of it; raises as `read_range`."""
    return read_range(place, 0, MAX_BYTES) if is_url(place) else read_regular(place)


def read_range(place: str, start: int, end: int) -> bytes:
    """The bytes start..end of a file, fewer where it ends before; OSError where it is not there.

    raises  RunError, in one line, where a URL does not answer
    """
    if not is_url(place):
        with open_regular(place) as file:
            file.seek(start)
            return file.read(end - start)
    fs, path = filesystem(place)
    more = {} if fs.async_impl else {"cache_type": "none"}  # else megabytes behind the range come with it
    with in_hand(place):
        data: bytes = _asked(place, lambda: fs.cat_file(path, start=start, end=end, **more)) if end > start else b""
    if len(data) > end - start:
        raise RunError(f"{place}: the server hands out whole files, not the ranges that are asked for")
    return data


@contextmanager
def opened(place: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A context with a file to be read; raises as `read_range`."""
    if is_url(place):
        yield io.BufferedReader(_Ranges(str(place)), _BUFFER)
        return
    with open_regular(place) as file:
        yield file


def state(place: str) -> tuple[int, str]:
    """(size in bytes, what changes with the content) of a file; raises as `read_range`."""
    if not is_url(place):
        status = os.stat(place)
        return status.st_size, str(status.st_mtime_ns)
    fs, path = filesystem(place)
    about = _asked(place, lambda: fs.info(path))
    if about.get("type") == "directory" or about.get("size") is None:
        raise OSError(errno.EINVAL, "a folder, or a file of a size that the server does not tell", place)
    return int(about["size"]), str([about[key] for key in _CHANGES if key in about])


def names_below(root: str, pattern: str = "") -> list[str]:
    """The files below a folder at a URL, relative to it and in order; those that match a glob, where one is given."""
    fs, path = filesystem(root)
    call = (lambda: fs.glob(posixpath.join(path, pattern))) if pattern else lambda: fs.find(path)
    return sorted(name[len(path.rstrip("/")) :].lstrip("/") for name in _asked(root, call))


def _asked(url: str, call: Callable[[], T]) -> T:
    """What a call answers, which is made again where it fails; OSError in words or RunError where it does not work."""
    for wait in (*WAITS, None):
        try:
            return call()
        except EarlyEnd:
            raise
        except Exception as error:  # every store has errors of its own
            # fsspec's https says "no such file" of a server that does not answer, too.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            reason = one_line(cause, 200)
            if isinstance(cause, _FOR_GOOD) or getattr(cause, "status", 500) < 500:
                words = "no such file" if isinstance(error, FileNotFoundError) else reason
                raise OSError(getattr(error, "errno", None) or errno.ENOENT, words, url) from None
        if wait is not None:
            time.sleep(wait)
    raise RunError(f"{url}: does not answer, asked {len(WAITS) + 1} times ({reason})")


class _Ranges(io.RawIOBase):
    """A file at a URL; each read is a request for a range."""

    def __init__(self, url: str) -> None:
        self._url, self._at, self._size = url, 0, state(url)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read_range(self._url, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
