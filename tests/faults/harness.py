"""Short runs on one or two processes that meet with a fault, and what became of them.

`Faults` keeps the warm process (`zygote.py`) and starts runs: `start` a run with faults in some of its ranks, let it
end, `assert_sound` that no checkpoint is torn, then start it again with resume=true and compare its losses with those
of `unbroken`, bit for bit. Ranks are real processes of the command `dinoreg pretrain`, placed by torchrun's variables.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

from processes import free_port  # noqa: E402
from training import TINY, loss_trace  # noqa: E402

STEPS = 10
RUN = {
    **TINY,
    "steps": STEPS,
    "batch_size": 4,
    "model.dim": 16,
    "model.depth": 1,
    "crops.num_local": 1,
    "checkpoint.every": 2,
    "parallel.timeout": 6,
    "threads": 1,
}
Hook = tuple[str, Mapping[str, Any]]


@dataclass
class Rank:
    """One process of a run: where it writes, and, once it has ended, its exit code (-9: killed by signal 9)."""

    pid: int
    errors: Path
    code: int | None = None
    ended: float | None = None  # time.monotonic() of hearing of it

    def said(self) -> list[str]:
        """What it wrote to stderr, a line each, the console's lines of a run left out."""
        lines = self.errors.read_text(errors="replace").splitlines() if self.errors.exists() else []
        return [line for line in lines if line.startswith("dinoreg: ")]

    def console(self) -> str:
        """All of it."""
        return self.errors.read_text(errors="replace") if self.errors.exists() else ""

    def send(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)


@dataclass
class Start:
    """One start of a run, on one or several processes."""

    out: Path
    ranks: list[Rank]
    began: float = field(default_factory=time.monotonic)
    wall: float = field(default_factory=time.time)

    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    def running(self) -> bool:
        return any(rank.code is None for rank in self.ranks)

    def describe(self) -> str:
        return "\n".join(
            f"rank {number}: exit code {rank.code}\n{rank.console()}" for number, rank in enumerate(self.ranks)
        )


class Faults:
    """Starts runs and waits for them; a context manager, at whose end no process is left."""

    def __init__(self, scratch: Path) -> None:
        """scratch  an existing folder for what ranks write to stdout and stderr"""
        self.scratch = scratch
        self._number = 0
        self._ranks: dict[int, Rank] = {}
        self._early: dict[int, int] = {}
        self._traces: dict[str, tuple[list[tuple[float, ...]], float]] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_plain_environment(),
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._pending = b""
        self._answers: list[dict[str, Any]] = []
        self._answer(300.0, "ready")

    def __enter__(self) -> Faults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self._ranks.values():
            rank.send(signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    # Starting and waiting

    def start(
        self,
        out: Path | str,
        *,
        processes: int = 1,
        hooks: Mapping[int, Sequence[Hook]] | None = None,
        folders: Sequence[Path] | None = None,
        networks: Sequence[str] | None = None,
        address: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Start:
        """Start a run, or go on with the one in `out`; returns at once.

        hooks      by rank: (function of hooks.py, its arguments)
        folders    the working folder of each rank
        networks   the network namespace of each rank; `address` is then where rank 0 is found
        overrides  config keys, with `__` for the dot; strategy is short for parallel.strategy
        """
        port = free_port()
        values = {**RUN, "resume": "true", "out": out}
        if "strategy" in overrides:
            values["parallel.strategy"] = overrides.pop("strategy")
        values |= {key.replace("__", "."): value for key, value in overrides.items()}
        config = self.scratch / "plain.yaml"
        if not config.exists():
            config.write_text("batch_size: 4\n")
        arguments = [f"{key}={_text(value)}" for key, value in values.items()]
        ranks = []
        began, wall = time.monotonic(), time.time()
        for number in range(processes):
            self._number += 1
            place = (
                {}
                if processes == 1
                else {
                    "RANK": str(number),
                    "LOCAL_RANK": str(number),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": address,
                    "MASTER_PORT": str(port),
                }
            )
            errors = self.scratch / f"{self._number}.err"
            request = {
                "arguments": ["pretrain", str(config), *arguments],
                "environment": {**_plain_environment(), **(environment or {}), **place},
                "folder": str(folders[number] if folders else self.scratch),
                "network": networks[number] if networks else None,
                "output": str(self.scratch / f"{self._number}.out"),
                "errors": str(errors),
                "hooks": [[name, dict(values)] for name, values in (hooks or {}).get(number, ())],
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            pid = self._answer(60.0, "pid")["pid"]
            ranks.append(Rank(pid, errors, self._early.pop(pid, None)))
            self._ranks[pid] = ranks[-1]
        return Start(Path(out), ranks, began, wall)

    def wait(self, start: Start, timeout: float = 60.0) -> list[int | None]:
        """The exit codes of all ranks; those that still run after `timeout` seconds are killed, and AssertionError."""
        deadline = time.monotonic() + timeout
        while start.running():
            left = deadline - time.monotonic()
            if left <= 0:
                hung = [number for number, rank in enumerate(start.ranks) if rank.code is None]
                for rank in start.ranks:
                    rank.send(signal.SIGKILL)
                raise AssertionError(f"ranks {hung} still ran after {timeout:.0f} s\n{start.describe()}")
            self._read(min(left, 1.0))
        return start.codes()

    def wait_for_rank(self, rank: Rank, timeout: float = 60.0) -> None:
        """Wait for one rank alone; AssertionError when it does not end."""
        deadline = time.monotonic() + timeout
        while rank.code is None:
            self._read(0.5)
            if time.monotonic() > deadline:
                raise AssertionError(f"a rank still ran after {timeout:.0f} s\n{rank.console()}")

    def poll(self, start: Start) -> bool:
        """Whether some rank still runs; never waits."""
        self._read(0.0)
        return start.running()

    def until(self, path: Path, start: Start, timeout: float = 30.0) -> None:
        """Wait for a file, which a hook of the run writes."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            if not self.poll(start) or time.monotonic() > deadline:
                raise AssertionError(f"{path.name} never came\n{start.describe()}")
            time.sleep(0.002)

    # Comparing

    def unbroken(self, processes: int = 1, strategy: str = "ddp") -> list[tuple[float, ...]]:
        """The losses of a run that nothing happens to; made once for each kind."""
        return self._whole(processes, strategy)[0]

    def duration(self, processes: int = 1, strategy: str = "ddp") -> float:
        """Seconds that a run takes to which nothing happens."""
        return self._whole(processes, strategy)[1]

    def _whole(self, processes: int, strategy: str) -> tuple[list[tuple[float, ...]], float]:
        key = f"{processes}-{strategy if processes > 1 else ''}"
        if key not in self._traces:
            out = self.scratch / f"whole-{key}"
            start = self.start(out, processes=processes, strategy=strategy)
            codes = self.wait(start)
            assert codes == [0] * processes, start.describe()
            self._traces[key] = loss_trace(out), time.monotonic() - start.began
        return self._traces[key]

    def finish(self, out: Path, *, processes: int = 1, strategy: str = "ddp", **overrides: Any) -> Start:
        """Resume a run, to its end, and compare its losses with the unbroken run's, bit for bit."""
        start = self.start(out, processes=processes, strategy=strategy, **overrides)
        codes = self.wait(start)
        assert codes == [0] * processes, start.describe()
        assert loss_trace(out) == self.unbroken(processes, strategy)
        assert_sound(out, STEPS)
        return start

    # The warm process

    def _answer(self, timeout: float, key: str) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            for number, values in enumerate(self._answers):
                if key in values:
                    return self._answers.pop(number)
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"the warm process does not answer ({self._answers})")
            self._read(1.0)

    def _read(self, timeout: float) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        if not select.select([descriptor], [], [], timeout)[0]:
            return
        *lines, self._pending = (self._pending + os.read(descriptor, 1 << 16)).split(b"\n")
        for line in lines:
            values = json.loads(line)
            if "ended" not in values:
                self._answers.append(values)
            elif values["ended"] in self._ranks:
                rank = self._ranks.pop(values["ended"])
                rank.code, rank.ended = values["code"], time.monotonic()
            else:
                self._early[values["ended"]] = values["code"]


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plain_environment() -> dict[str, str]:
    """Ours, without a place in some other run."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


# ------------------------------------------------------------------------------------------------------------
# What has to hold, whatever has happened


def torn(out: Path) -> list[str]:
    """What is wrong with the published state of a run: checkpoints that do not verify, a pointer to none."""
    from dinoreg.checkpoint import format as checkpoint
    from dinoreg.runtime.digest import digest
    from dinoreg.runtime.errors import RunError

    folder = out / "checkpoints"
    problems = []
    names = sorted(path.name for path in folder.glob("step_*"))
    for name in names:
        try:
            numbers = checkpoint.verify(folder / name)
            if checkpoint.step_name(numbers["step"]) != name:
                problems.append(f"{name} holds step {numbers['step']}")
        except RunError as error:
            problems.append(str(error))
        teacher = out / "teacher" / f"{name}.safetensors"
        try:
            described = json.loads(teacher.with_suffix(".json").read_text())
            if described["sha256"] != digest(teacher):
                problems.append(f"{teacher} is not what was written")
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{teacher}: {error}")
    last = checkpoint.read_pointer(folder, "last")
    if last is not None and last not in names:
        problems.append(f"last points to {last}, there are {names}")
    if len(names) > 1 and last is None:
        problems.append(f"last is missing, there are {names}")
    return problems


def unpointed(out: Path) -> bool:
    """Whether the run's first checkpoint is there, whole, but `last` is not yet: a kill between the two renames.

    Resuming looks at the checkpoints themselves, and `last` comes with the next.
    """
    from dinoreg.checkpoint import format as checkpoint

    folder = out / "checkpoints"
    return len(list(folder.glob("step_*"))) == 1 and checkpoint.read_pointer(folder, "last") is None


def assert_sound(out: Path, last: int | None = None) -> None:
    """Every published checkpoint verifies and `last` points to one of them: that of step `last`, if given."""
    assert torn(out) == []
    assert not unpointed(out)
    if last is not None:
        from dinoreg.checkpoint import format as checkpoint

        assert checkpoint.read_pointer(out / "checkpoints", "last") == checkpoint.step_name(last)


def assert_one_line(rank: Rank, *parts: str) -> str:
    """The rank ended with one line of its own, which holds all `parts`; returns it. No traceback beside it."""
    said = rank.said()
    assert len(said) == 1, rank.console()
    for part in parts:
        assert part in said[0], said[0]
    assert "Traceback" not in rank.console(), rank.console()
    return said[0]
