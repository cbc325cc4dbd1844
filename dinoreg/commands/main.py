"""The command line: a verb, its arguments, and `key=value`.

Every verb parses all its arguments before it starts, so that a wrong key or value ends with one line, exit
code 2 and nothing written. A failure at run time is one line, the log's path and exit code 1. The modules
that do the work are imported inside the verbs, so that help and messages about wrong arguments appear at once.
"""

import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from dinoreg import __version__
from dinoreg.commands.arguments import VERB_NAMES, canonical, corrected
from dinoreg.commands.completion import candidates
from dinoreg.commands.doctor import explain_error
from dinoreg.commands.help import overview, verb_help
from dinoreg.commands.registry import VERBS, run_verb
from dinoreg.commands.streams import keep_streams, lost
from dinoreg.commands.watch import watch
from dinoreg.config.option import nearest
from dinoreg.runtime.environment import DATA_THREADS
from dinoreg.runtime.errors import Interrupted, RunError, UserError
from dinoreg.runtime.parallel import READERS
from dinoreg.runtime.printable import print_status

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
_WRITES_FILES = set(VERBS) - {"inspect", "plan", "runs", "launch", "doctor", "completion"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of sys.argv; errors are printed to stderr in one line.

    returns  the exit code: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 128 + number after another signal
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "WORLD_SIZE" in os.environ:  # DDP and the store print expected warnings once per process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        _dispatch(arguments)
        return OK
    except (UserError, RunError, Interrupted) as error:
        if not error.reported:
            print_status(f"dinoreg: {corrected(error, arguments)}")
        if isinstance(error, Interrupted):
            return 128 + error.signal_number
        return REFUSED if isinstance(error, UserError) else FAILED
    except KeyboardInterrupt:
        print_status("dinoreg: interrupted")
        return INTERRUPTED
    except Exception as error:
        debugging = os.environ.get("DINOREG_DEBUG") == "1"
        if debugging:
            traceback.print_exc()
        hint = "" if debugging else " (DINOREG_DEBUG=1 shows the traceback)"
        print_status(f"dinoreg: {explain_error(error, hint)}")
        return FAILED


def entry() -> NoReturn:
    """The command `dinoreg`: ends the process with the code of `main`, whatever became of the console.

    It is 1, too, where a verb whose result is what it prints could not print it.
    """
    results = keep_streams()
    watch()
    code = main()
    if (reason := lost(results)) and code == OK and not _WRITES_FILES.intersection(sys.argv[1:2]):
        print_status(f"dinoreg: stdout cannot be written ({reason})")
        code = FAILED
    sys.stderr.flush()
    # A thread that waits for a disk which does not answer would keep the process.
    readers = [thread for thread in threading.enumerate() if thread.name.startswith((DATA_THREADS, READERS))]
    for thread in readers:
        thread.join(1.0)
    if any(thread.is_alive() for thread in readers):
        os._exit(code)
    sys.exit(code)


def script(declaration: Any, verb: str = "eval") -> NoReturn:
    """Run a declaration as a script: `python eval/pets.py weights=…` is `dinoreg eval pets weights=…`.

    declaration  a benchmark or a job with a name
    verb         of the command line, "eval" or "launch"
    raises       SystemExit with the exit code of `main`
    """
    sys.argv[1:1] = [verb, str(getattr(sys.modules["__main__"], "__file__", None) or declaration.name)]
    entry()


def _dispatch(arguments: list[str]) -> None:
    name, *rest = arguments or ["help"]
    name = VERB_NAMES.get(name, name)
    if name in ("-h", "--help", "help"):
        print(overview(VERBS))
    elif name in ("-V", "--version", "version"):
        print(f"dinoreg {__version__}")
    elif name == "completion" and rest[:1] == ["words"]:
        print("\n".join(candidates(VERBS, rest[1:])))
    elif name not in VERBS:
        raise UserError(f"{name}: unknown verb{nearest(name, VERBS)}; known: {', '.join(VERBS)}")
    elif any(argument in ("-h", "--help") for argument in rest):
        print(verb_help(VERBS[name], rest))
    else:
        run_verb(name, canonical(VERBS[name], rest))
