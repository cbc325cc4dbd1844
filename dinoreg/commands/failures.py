"""Explaining the failure of a command in one line."""

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dinoreg.commands.doctor import explain_error
from dinoreg.runtime.errors import Interrupted, RunError, UserError, one_line
from dinoreg.runtime.regular_files import open_to_append


@contextmanager
def running(out: str | None) -> Iterator[None]:
    """A context for the work of a command: failures name the log, an interruption explains how to resume.

    out     run folder; None: no log
    raises  RunError for any failure of a run, after appending the traceback to its train.log; Interrupted for Ctrl-C
            when there is a checkpoint
    """
    log = Path(out) / "train.log" if out else None
    try:
        yield
    except KeyboardInterrupt:
        if out is None or not (Path(out) / "checkpoints" / "last").is_file():
            raise
        advice = f"interrupted; go on with: dinoreg pretrain {out} resume=true"
        raise Interrupted(advice, signal.SIGINT) from None
    except (UserError, Interrupted, BrokenPipeError):
        raise
    except RunError as error:
        where = f" (log: {log})" if log is not None and log.is_file() else ""
        located = RunError(f"{one_line(error)}{where}")
        located.reported = error.reported
        raise located from error
    except Exception as error:
        if log is None or not (log.parent / "config.yaml").is_file():  # not (yet) a run's folder
            raise
        with suppress(OSError, UserError), open_to_append(log) as file:
            file.write(traceback.format_exc())
        if os.environ.get("DINOREG_DEBUG") == "1":
            traceback.print_exc()
        raise RunError(f"{explain_error(error)} (traceback: {log})") from error
