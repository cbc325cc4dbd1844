"""Starts a function in processes on the fake device, and hands back what it returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.build import library, problem
from tests.fake_cuda.device import Counts

ROOT = Path(__file__).parent.parent.parent

needs_fake_cuda = pytest.mark.skipif(problem() is not None, reason=f"no fake CUDA device: {problem()}")


def environment(devices: int = 1, gib: float = 140.0) -> dict[str, str]:
    """The variables of a process with `devices` fake devices of `gib` GiB each."""
    ours = {"LD_PRELOAD": str(library()), "FAKE_CUDA_DEVICES": str(devices), "FAKE_CUDA_GIB": str(gib)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **ours, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(
    function: str, *, devices: int = 1, gib: float = 140.0, processes: int = 0, seconds: float = 900.0, **arguments: Any
) -> Any:
    """What a function of `scenarios.py` returns, as JSON values, when called with `arguments` on the fake device.

    devices    that the process sees, of `gib` GiB each
    processes  above 0: so many, as torchrun starts them; the answer is a list by rank
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "arguments.json")
        given.write_text(json.dumps(arguments))
        answers = [Path(folder, f"{rank}.json") for rank in range(max(1, processes))]
        command = [sys.executable, "-m", "tests.fake_cuda.device", f"tests.fake_cuda.scenarios:{function}", str(given)]
        started = []
        for rank, answer in enumerate(answers):
            variables = environment(devices, gib)
            if processes:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                variables |= {name: str(value) for name, value in world.items()}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
            with Path(folder, f"{rank}.log").open("w") as log:
                options: dict[str, Any] = {"env": variables, "cwd": ROOT, "stdout": log, "stderr": log}
                started.append(subprocess.Popen([*command, str(answer)], **options))
        try:
            codes = [process.wait(seconds) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = [Path(folder, f"{rank}.log").read_text()[-4000:] for rank in range(len(answers))]
        assert not any(codes), "\n".join(logs)
        returned = [json.loads(answer.read_text()) for answer in answers]
    return returned if processes else returned[0]


def counts_of(returned: dict[str, Any]) -> Counts:
    """The `Counts` that a scenario returned."""
    return Counts(**returned)
