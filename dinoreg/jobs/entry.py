"""The first lines of a job: `python entry.py -u -m MODULE ARGUMENT…` runs a module of this very copy of the package.

Run as a file, before anything else is imported. The signal to save (SIGUSR2) is blocked until the job has its
handlers: without one it would kill the process. The copy that this file belongs to comes first on the path, and the
working folder is not on it, so that a job never runs a checkout that happens to be its working folder.
"""

import signal
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Run the module that follows -m with the arguments after it; `arguments` are those of the Python interpreter."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    root = str(Path(__file__).resolve().parents[2])
    sys.path.pop(0)  # this file's own folder
    if root not in sys.path:
        sys.path.insert(0, root)
    import runpy

    name, *rest = arguments[arguments.index("-m") + 1 :]
    sys.argv = [name, *rest]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
