"""A warm process that forks the ranks of runs: `import torch` is paid once, not by every start.

    python tests/faults/zygote.py     (driven by harness.Faults)

It reads one JSON request a line and answers {"pid"}; when a rank has ended it writes {"ended", "code"}. It has one
thread and has done nothing but import, so that a fork is as good as a new process; a rank then finds the environment,
the working folder and the two output files of its request, and leaves through the interpreter's own exit. When the
harness goes away, so do the ranks.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
IMPORTS = (
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel"),
    *("torch.utils.serialization", "numpy.ctypeslib", "rich._emoji_codes"),
    *("torch._dynamo", "omegaconf", "matplotlib.backends.backend_svg"),
    *(
        "dinoreg.commands.main",
        "dinoreg.checkpoint.async_writer",
        "dinoreg.train.loop",
        "dinoreg.reports.run_report",
        "dinoreg.visualize.run_pictures",
        "hooks",
    ),
)
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000


def import_everything() -> None:
    """All that a run on several processes imports, also what it imports late."""
    for name in IMPORTS:
        importlib.import_module(name)
    import PIL.Image
    import torch

    from dinoreg.config.load import load_config

    torch.set_num_threads(1)
    PIL.Image.init()
    load_config(None, {})


def become(request: dict[str, Any]) -> NoReturn:
    """In the new process: take the request's place in the world, inject its faults, run the command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, path in ((0, os.devnull), (1, request["output"]), (2, request["errors"])):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["network"]:
        enter_network(request["network"])
    os.chdir(request["folder"])
    import hooks

    from dinoreg.commands import report

    report.report_run = lambda run: run  # written after the run, and slower than it
    for name, arguments in request["hooks"]:
        getattr(hooks, name)(**arguments)
    from dinoreg.commands.main import entry

    sys.argv[1:] = request["arguments"]
    entry()


def enter_network(name: str) -> None:
    """Into the network namespace that `ip netns add` made, with the name service's settings of that network."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"network {name}")

    with open(f"/run/netns/{name}") as namespace:
        check(libc.setns(namespace.fileno(), _CLONE_NEWNET))
    check(libc.unshare(_CLONE_NEWNS))
    private, bind = 0x44000, 0x1000  # MS_REC | MS_PRIVATE, MS_BIND
    check(libc.mount(b"none", b"/", None, private, None))
    for path in Path(f"/etc/netns/{name}").glob("*"):
        check(libc.mount(str(path).encode(), f"/etc/{path.name}".encode(), None, bind, None))


def main() -> int:
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
    import_everything()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        print(json.dumps({"problem": f"{threads} threads after the imports; a fork would lose all but one"}))
        return 1
    wakeup, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    answers = os.dup(1)
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        os.write(answers, f"{json.dumps(values)}\n".encode())

    answer({"ready": os.getpid()})
    pending = b""
    while True:
        readable, _, _ = select.select([0, wakeup], [], [])
        if wakeup in readable:
            os.read(wakeup, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                answer({"ended": pid, "code": os.waitstatus_to_exitcode(status)})
        if 0 in readable:
            block = os.read(0, 1 << 16)
            if not block:
                return 0  # the ranks follow by PR_SET_PDEATHSIG
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for descriptor in (answers, wakeup, woken):
                        os.close(descriptor)
                    become(request)
                answer({"pid": pid})


if __name__ == "__main__":
    sys.exit(main())
