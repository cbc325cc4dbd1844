"""Writing files atomically, and explaining in words why one could not be written or read."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dinoreg.runtime.errors import one_line


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (fsync); OSError when that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, token: str = "") -> Iterator[Path]:
    """A context that yields a temporary path to write to; at its end the file replaces `path` in one rename.

    token   part of the temporary name, where another process may be writing the same file
    raises  an OSError that names `path`, after removing the temporary file; `path` is unchanged
    """
    aside = part_name(path, token)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a device would be replaced
            raise OSError(errno.EINVAL, "not a regular file")
        if aside.is_symlink() or not aside.is_file():  # the one would be followed, a pipe waited for
            aside.unlink(missing_ok=True)
        yield aside
        sync(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        first = cause(error)
        if not isinstance(first, OSError):
            raise
        named = str(path) if first.filename in (None, str(aside)) else first.filename
        raise OSError(first.errno or errno.EIO, reason(first), named) from error
    sync(path.parent)


def write_atomic(path: Path, content: str | bytes, token: str = "") -> None:
    """Write `content` (text as UTF-8) to `path` in one rename: a kill leaves the old content or the new.

    Bytes of file names that are no UTF-8, which Python keeps as surrogates, are written as \\udcff.

    token   as for `replacing`
    raises  OSError
    """
    with replacing(path, token) as aside:
        aside.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_picture(path: Path, image: Any) -> None:
    """Write a picture of Pillow as PNG to `path`, in one rename; OSError when that fails."""
    with replacing(path) as aside:
        image.save(aside, "PNG")


def share(path: Path) -> None:
    """Let whoever reads a file's folder read the file, too, where possible: safetensors lets its owner alone."""
    with suppress(OSError):
        path.chmod(path.parent.stat().st_mode & 0o666)


def part_name(path: Path, token: str = "") -> Path:
    """The temporary path under which `path` is written: PATH.part, or PATH.TOKEN.part."""
    return path.with_name(f"{path.name}{token and '.'}{token}.part")


def cause(error: BaseException) -> BaseException:
    """The root cause of an error, an OSError where one can be found; of a collective save, the lowest rank's error."""
    if failures := _failures(error):
        return cause(failures[min(failures)][0])
    while not isinstance(error, OSError) and isinstance(error.__cause__ or error.__context__, BaseException):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
        if _failures(error):
            return cause(error)
    if "inline_container.cc" in str(error):  # what torch's writer makes of a write that failed; the first error is lost
        return OSError(errno.ENOSPC, f"a write was cut short ({os.strerror(errno.ENOSPC)}, or a failing disk)")
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


def _failures(error: BaseException) -> Mapping[int, Any]:
    """Of a collective save, rank -> (its error, ...): torch's CheckpointException, recognised by what it holds.

    Its class is not imported: with it comes torch, which a report does without.
    """
    failures = getattr(error, "failures", None)
    return failures if isinstance(failures, Mapping) else {}


def reason(error: BaseException) -> str:
    """A short phrase for why a file could not be written or read, from `cause`."""
    error = cause(error)
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 200)


def remedy(error: BaseException, run: Path) -> str:
    """One sentence on what to do about a checkpoint in the run folder `run` that could not be written."""
    right = f"Give this user the right to write to {run} again."
    broken = f"The storage under {run} fails: have it looked at before more is written there."
    known = {
        errno.ENOSPC: f"Make room on the disk of {run}, or lower checkpoint.keep.",
        errno.EDQUOT: f"The quota on the disk of {run} is used up: make room there, or lower checkpoint.keep.",
        **dict.fromkeys((errno.EACCES, errno.EPERM), right),
        errno.EROFS: f"The disk of {run} can only be read: have it mounted for writing.",
        **dict.fromkeys((errno.EIO, errno.ESTALE), broken),
    }
    return known.get(getattr(cause(error), "errno", 0), "None needed if the next one is written.")
