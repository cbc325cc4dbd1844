"""Standard output and error that a command outlives: a closed terminal, a pipe whose reader left, a full disk."""

import errno
import io
import os
import sys
from typing import Any, TextIO


class Lasting:
    """A text stream that drops what is written after its first failure, which is kept in `failure`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop, a text; returns its length."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless writing has failed."""
        self._attempt("flush")

    def _attempt(self, name: str, *arguments: str) -> None:
        if self.failure is None:
            try:
                getattr(self._stream, name)(*arguments)
            except OSError as error:
                self.failure = error
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for what is buffered still

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_streams() -> Lasting:
    """Make stdout and stderr of this process last; returns the one of stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get its number, and what others print
            os.open(os.devnull, os.O_RDWR)
    streams = [stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115 - never closed
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the locale has not every character
    out, err = map(Lasting, streams)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    return out


def lost(stream: Lasting) -> str:
    """Why results did not reach `stream`; "" where they did or where the reader of a pipe, such as head, had enough."""
    stream.flush()
    failure = stream.failure
    return "" if failure is None or failure.errno == errno.EPIPE else failure.strerror or str(failure)
