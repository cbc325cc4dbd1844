"""How long the command line takes to answer where nothing is computed, against an import of torch alone.

    python benchmarks/startup.py [--rounds 15]

Each command is a process of its own, started in an empty folder. Beside the seconds that it takes there are those of
CPU time (user and system), which other work on the machine changes less. The commands are run in turn with
`python -c "import torch"`, of which ratios are taken: what computes nothing has to do without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

TORCH = "import torch"
PLAIN = ("--help", "--version", "eval --list", "pretrain small --help", "completion bash")  # at most 0.3 s
WRONG = (  # at most 0.5 s
    *(
        "pretrian small",
        "pretrain smal data=. out=x",
        "pretrain small data=nope out=x",
        "pretrain small learning_rate=1",
    ),
    *(
        "inspect nope",
        "eval pest weights=random:vitt14_reg4",
        "embed . weights=nope out=x.parquet",
        "view pac weights=x",
    ),
    *("verdict nope weights=random:vitt14_reg4", "plan vits14_reg4 gpus=0", "launch nope", "report nope"),
)


class Command:
    """A command that is started anew for each measurement."""

    def __init__(self, arguments: list[str], folder: str, expected: int) -> None:
        """expected  its exit code"""
        self.arguments, self.folder, self.expected = arguments, folder, expected
        package = Path(measure.__file__).resolve().parent.parent
        self.env = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def measure(self) -> measure.Measurement:
        """Seconds by the clock and of CPU time, once."""
        started = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *self.arguments], cwd=self.folder, env=self.env, **quiet)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != self.expected:
            raise SystemExit(f"{self.arguments}: exit code {process.returncode}, expected {self.expected}")
        return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime}

    def close(self) -> None:
        """Nothing to end."""


def main() -> None:
    options = measure.parser(__doc__)
    options.set_defaults(rounds=15)
    given = options.parse_args()
    plain, wrong = (PLAIN[:1], WRONG[:1]) if given.short else (PLAIN, WRONG)
    with tempfile.TemporaryDirectory() as folder:
        commands = {TORCH: Command(["-c", TORCH], folder, 0), "pass": Command(["-c", "pass"], folder, 0)}
        for code, lines in ((0, plain), (2, wrong)):
            commands |= {line: Command(["-m", "dinoreg", *line.split()], folder, code) for line in lines}
        for command in commands.values():
            command.measure()  # from here on, files are in the page cache
        rounds = measure.in_turn(commands, 1 if given.short else given.rounds, given.budget)
    summaries = {key: measure.compare(rounds, key, [TORCH]) for key in ("seconds", "cpu")}
    tables = [measure.table(measure.comparison_rows(found, key, f"{key}, s")) for key, found in summaries.items()]
    measure.report("startup", {"rounds": len(rounds)}, summaries, *tables)


if __name__ == "__main__":
    main()
