"""Interpreters with their imports behind them: each command runs in a fork of one process that has only imported.

    python tests/warm_interpreter.py MODULE ...     (driven by WarmInterpreter)

`import torch` with timm or transformers takes seconds, and tests that start dozens of interpreters would pay it each
time. A fork of a process that has imported, has one thread and has done nothing else is as good as a new one: it finds
the arguments, environment, working folder and import path of its command, and leaves by the interpreter's own exit.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

PR_SET_PDEATHSIG = 1
# All that a training imports, also what it imports late.
RUN_IMPORTS = (
    *("torch.distributed.checkpoint", "torch.utils.serialization", "numpy.ctypeslib", "rich._emoji_codes"),
    *("torch._dynamo", "omegaconf", "matplotlib.backends.backend_svg"),
    *("dinoreg.commands.main", "dinoreg.checkpoint.async_writer", "dinoreg.train.loop"),
    *("dinoreg.reports.run_report", "dinoreg.visualize.run_pictures"),
)


class WarmProcess:
    """A command that runs; as much of `subprocess.Popen` as the tests use. Its end is known once."""

    def __init__(self, interpreter: WarmInterpreter, pid: int, outputs: Sequence[Path]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._interpreter = interpreter
        self._outputs = outputs

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        return self._wait(0.0)

    def wait(self, timeout: float) -> int:
        code = self._wait(timeout)
        if code is None:
            raise TimeoutError(f"process {self.pid} runs for more than {timeout} seconds")
        return code

    def _wait(self, timeout: float) -> int | None:
        if self.returncode is None:
            answer = self._interpreter.answer(timeout)
            self.returncode = None if answer is None else answer["code"]
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def output(self) -> str:
        return self._outputs[0].read_text(errors="replace")

    def errors(self) -> str:
        return self._outputs[1].read_text(errors="replace")


class WarmInterpreter:
    """Runs Python commands one at a time; a context manager, at whose end no process is left."""

    def __init__(self, *modules: str) -> None:
        """modules  what is imported once, for all commands"""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # nothing that `select` does not see
        )
        self._scratch = tempfile.TemporaryDirectory()
        self._count = 0
        assert self.answer(600.0) == {"ready": True}

    def __enter__(self) -> WarmInterpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # a command that still runs goes with it
        self._process.wait(30)
        self._scratch.cleanup()

    def start(
        self, command: Sequence[str], cwd: Path | str | None = None, env: Mapping[str, str] | None = None
    ) -> WarmProcess:
        """Start `[python, options ..., "-c" CODE | "-m" MODULE | SCRIPT, arguments ...]`; the command
        before it has to have ended.
        """
        self._count += 1
        outputs = [Path(self._scratch.name) / f"{self._count}.{name}" for name in ("out", "err")]
        request = {
            "command": list(command[1:]),
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "outputs": [str(path) for path in outputs],
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = self.answer(60.0)
        assert answer is not None
        return WarmProcess(self, answer["pid"], outputs)

    def run(
        self,
        command: Sequence[str],
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        **other: Any,
    ) -> subprocess.CompletedProcess[str]:
        """In place of `subprocess.run`, always with captured text."""
        process = self.start(command, cwd, env)
        code = process.wait(timeout)
        return subprocess.CompletedProcess(list(command), code, process.output(), process.errors())

    def answer(self, timeout: float) -> dict[str, Any] | None:
        """The next answer of the process, or None where there is none in `timeout` seconds."""
        answers = self._process.stdout
        assert answers is not None
        if not select.select([answers], [], [], timeout)[0]:
            return None
        line = answers.readline()
        assert line, "the warm interpreter has ended"
        return json.loads(line)


# In the warm process


def become(request: Mapping[str, Any]) -> None:
    """In the fork: take the place of a new interpreter with this command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, path in enumerate((os.devnull, *request["outputs"])):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    command = list(request["command"])
    while command[0] == "-W":  # the warm process ignores warnings itself
        del command[:2]
    kind, rest = (command[0], command[1:]) if command[0] in ("-c", "-m") else ("", command)
    # sys.path as a new interpreter has it: the script's folder, PYTHONPATH, and what is installed.
    first = "" if kind else str(Path(rest[0]).resolve().parent)
    sys.path[:0] = [first, *(part for part in request["env"].get("PYTHONPATH", "").split(os.pathsep) if part)]
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else list(rest)
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(rest[0], run_name="__main__")


def main(modules: Sequence[str]) -> None:
    del sys.path[0]  # the folder of this file
    for name in modules:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    own = {part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part}
    sys.path[:] = [part for part in sys.path if part not in own]
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after the imports; a fork would lose all but one"
    gc.collect()
    gc.freeze()  # a fork that ends would otherwise visit, and so copy, all that was imported
    answers = os.dup(1)
    os.set_inheritable(answers, False)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        os.write(answers, f"{json.dumps(values)}\n".encode())

    answer(ready=True)
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            become(json.loads(line))
            return
        answer(pid=pid)
        answer(code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
