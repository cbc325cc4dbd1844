"""The errors with which a command ends early: wrong input, a failure while running, or a signal."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dinoreg.runtime.printable import printable

_QUERY = re.compile(r"(://[^\s?'\"]*\?)[^\s'\"]*[^\s'\":,;)]")


class EarlyEnd(Exception):
    """An end that is reported in one line, without a traceback; what is asked of a server in a URL may be a key to it.

    reported  another process of the command prints it
    """

    reported = False

    def __str__(self) -> str:
        return _QUERY.sub(r"\1…", super().__str__())


class UserError(EarlyEnd, ValueError):
    """Bad input: a key, a value, a path or a file. One line: what, where, what was expected. Exit code 2."""


class RunError(EarlyEnd, RuntimeError):
    """A failure while running (disk, data, numerics), reported in one line. Exit code 1."""


class Interrupted(EarlyEnd):
    """A signal asked the run to stop; its state has been saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An error's text in one line, cut to `limit` characters (None: not cut); its type's name where it has no text."""
    return printable(" ".join(str(error).split()))[:limit] or type(error).__name__


@contextmanager
def reworded(sentence: str, *kinds: type[BaseException], into: Callable[[str], EarlyEnd] = UserError) -> Iterator[None]:
    """Context in which errors of these kinds become one, `into`: the sentence, and in brackets their own words.

    What is in one line already stays as it is.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, EarlyEnd):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 200)
        raise into(f"{sentence} ({reason})") from None


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Context in which a file or folder that cannot be read, or is no UTF-8, is a UserError that begins with `what`."""
    with reworded(f"{what} cannot be read", OSError), reworded(f"{what} is not UTF-8 text", UnicodeDecodeError):
        yield
