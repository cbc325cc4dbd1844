"""Files by their path or by a URL of fsspec's (s3://, gs://, hf://, https://, memory://): listed, and read by ranges.

No network is touched for anything but what the user names by a URL. Credentials are found in fsspec's own ways, copies
are kept where one of its prefixes says so (`simplecache::https://…`). What fails for another reason than that the file
is not there, or not ours to read, is asked for again. Stores that fsspec makes of other files (`reference::`, `zip::`)
are refused, as such a file may name any other.
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
from dinoreg.runtime.errors import EarlyEnd, RunError, UserError, one_line, reworded
from dinoreg.runtime.regular_files import MAX_BYTES, in_hand, open_regular, read_regular

T = TypeVar("T")
WAITS = (0.5, 2.0, 8.0)  # seconds before a URL is asked for once more
_URL = re.compile(r"[a-z][a-z0-9+.\-]+(?:::|://)", re.IGNORECASE)
_BUFFER = 1 << 22  # bytes that a file at a URL is read by: fewer requests, and no more than is of use
_STORE = re.compile(r"https?|s3a?|gs|gcs|az|abfss?|hf|memory|file|local|(simple|file|block)cache")
_USER = re.compile(r"(https?://|\w+://[^/?#@]*:)[^/?#@]*@")
_CHANGES = re.compile("etag|mtime|last[-_]?modified|updated|created|blob_id|content-md5|digest", re.IGNORECASE)
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
    """(the file system of fsspec's, its own name of the place) of a URL.

    raises  UserError where a package is missing, for another store, and for a user or password in the URL
    """
    for part in url.split("::"):
        store, _, rest = part.partition("://")
        if not _STORE.fullmatch(store):
            raise UserError(f"{url} cannot be opened: {store!r}, expected https, s3, gs, az, abfs, hf, memory or file")
        if _USER.match(part):
            raise UserError(f"{store}://…@{rest.partition('@')[2]} names a user; leave credentials to fsspec's ways")
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
    if end <= start:
        return b""
    more = {} if fs.async_impl else {"cache_type": "none"}  # else megabytes behind the range come with it
    with in_hand(place):
        if "https" in type(fs).protocol:
            return _asked(place, lambda: _over_http(fs, path, start, end))
        return bytes(_asked(place, lambda: fs.cat_file(path, start=start, end=end, **more)))


def _over_http(fs: Any, url: str, start: int, end: int) -> bytes:
    """A range of a file, with no more in memory than that; fsspec reads first whatever the server sends."""
    from fsspec.asyn import sync

    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options = {**fs.kwargs, "headers": {**fs.kwargs.get("headers", {}), **headers}}

    async def streamed() -> bytearray:
        session, data = await fs.set_session(), bytearray()
        async with session.get(fs.encode_url(url), **options) as answer:
            fs._raise_not_found_for_status(answer, url)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise RunError(f"{url}: the server packs what it hands out, which cannot be read by ranges")
            while len(data) <= end - start and (block := await answer.content.read(_BUFFER)):
                data += block
            if len(data) > end - start or (start and answer.status != 206):
                raise RunError(f"{url}: the server hands out whole files, not the ranges that are asked for")
        return data

    return bytes(sync(fs.loop, streamed))


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
    return int(about["size"]), str([about[key] for key in about if _CHANGES.fullmatch(key)])


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
            status = getattr(cause, "status", 500)  # of HTTP
            if isinstance(cause, _FOR_GOOD) or (status < 500 and status not in (408, 425, 429)):  # these: ask later
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
