"""The errors with which a command ends early: wrong input, a failure while running, or a signal."""

from dinoreg.runtime.printable import printable


class EarlyEnd(Exception):
    """An end that is reported in one line, without a traceback.

    reported  another process of the command prints it
    """

    reported = False


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
