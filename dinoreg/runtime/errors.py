"""The two ways a command ends early: what the user gave is wrong, or the run itself failed."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a key, a value, a path or a file. One line: what, where, what was expected. Exit code 2."""

    collective = False  # all processes of the command end with it
    reported = False  # another of them says it


class RunError(RuntimeError):
    """A failure while running (disk, data, numerics), said in one line. Exit code 1."""

    collective = False  # all processes of the command end with it
    reported = False  # another of them says it


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.collective = True  # all processes of the command end with it
        self.reported = False  # another of them says it


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An error's text in one line, at most `limit` characters of it; its type where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
