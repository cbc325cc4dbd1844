"""Faults that a rank of a test run carries in itself: each function patches the process that is about to train.

They are named in `harness.Faults.start(hooks=…)` and called by `zygote.become`; nothing of this is in the product.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_step(step: int, what: str, **arguments: Any) -> None:
    """Do `what` when `step` optimizer steps have been taken, before the next begins."""
    from dinoreg.train import loop

    train_step = loop.train_step
    action: Callable[..., None] = ACTIONS[what]

    def run(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.step == step:
            action(state=state, **arguments)
        return train_step(state, *args, **kwargs)

    loop.train_step = run


def in_writing(step: int, moment: str, what: str, **arguments: Any) -> None:
    """Do `what` in the background thread that writes the checkpoint of `step`, at one of its moments.

    moment  begun (a folder, no file) | files (this rank's are written) | digests (taken) | named (rank 0: under its
            final name, `last` still names the one before)
    """
    from dinoreg.checkpoint import format as checkpoint

    name = checkpoint.step_name(step)
    place: dict[str, tuple[Any, str, bool]] = {
        "begun": (checkpoint.dcp, "save", False),
        "files": (checkpoint.dcp.FileSystemWriter, "write_data", True),
        "digests": (checkpoint, "_own_files", True),
        "named": (checkpoint, "write_pointer", False),
    }
    module, function, late = place[moment]
    original = getattr(module, function)
    steps: list[str] = []
    save = checkpoint.save

    def noted(folder: Path, number: int, *args: Any, **kwargs: Any) -> Any:
        steps.append(checkpoint.step_name(number))
        return save(folder, number, *args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        meant = steps[-1:] == [name]
        if meant and not late:
            ACTIONS[what](**arguments)
        result = original(*args, **kwargs)
        if meant and late:
            ACTIONS[what](**arguments)
        return result

    checkpoint.save = noted
    setattr(module, function, run)


def at_call(function: str, what: str, **arguments: Any) -> None:
    """Do `what` when `dinoreg.MODULE:FUNCTION` is about to be called."""
    import importlib

    module_name, _, name = function.partition(":")
    module = importlib.import_module(module_name)
    original = getattr(module, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        ACTIONS[what](**arguments)
        return original(*args, **kwargs)

    setattr(module, name, run)


def bad_picture(after: int) -> None:
    """A worker meets an error that no reader of pictures is known to raise, at one picture of this rank's share."""
    from dinoreg.data.source import ScenesSource

    read, seen = ScenesSource.read, []

    def run(self: Any, number: int) -> Any:
        seen.append(number)
        if len(seen) > after:
            raise LookupError(f"the storage driver gave up on picture {number}")
        return read(self, number)

    ScenesSource.read = run  # type: ignore[method-assign]


def stuck_read(after: int, flag: str) -> None:
    """A file of this rank's share is opened and never read, as on a mount that hangs; `flag` is made then."""
    from dinoreg.runtime import regular_files

    opened, seen = regular_files._without_waiting, []

    def run(path: str, flags: int) -> int:
        seen.append(path)
        if len(seen) > after and threading.current_thread().name.startswith("dinoreg-data"):
            Path(flag).touch()
            time.sleep(10_000)
        return opened(path, flags)

    regular_files._without_waiting = run


def shared_seconds(seconds: float) -> None:
    """Do not wait as long as for a slow NFS."""
    from dinoreg.train import prepare as setup

    setup.SHARED_SECONDS = seconds


# ------------------------------------------------------------------------------------------------------------
# What can be done


def _signal(number: int, **_: Any) -> None:
    os.kill(os.getpid(), number)


def _wait(flag: str, **_: Any) -> None:
    """Say that the moment has come (`flag`.reached) and wait for `flag`.go."""
    Path(f"{flag}.reached").touch()
    deadline = time.monotonic() + 60
    while not Path(f"{flag}.go").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(flag)
        time.sleep(0.002)


def _flip(tensor: str, state: Any) -> None:
    """Flip a bit of the first number of one of this rank's tensors, as a faulty memory would."""
    import torch

    from dinoreg.train.parallelize import local

    local(state.replicated()[tensor]).detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 16)


def _clock(jump: float, **_: Any) -> None:
    """Somebody sets the clock; time.monotonic, by which everything waits, goes on."""
    wall = time.time
    time.time = lambda: wall() + jump


ACTIONS: dict[str, Callable[..., None]] = {"signal": _signal, "wait": _wait, "flip": _flip, "clock": _clock}
KILL: dict[str, Any] = {"what": "signal", "number": int(signal.SIGKILL)}
