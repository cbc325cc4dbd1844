"""Weak scaling on this machine: whole runs on one and two processes, each process with its own batch and one thread.

    python benchmarks/scaling.py [--rounds 3]

Two processes that know nothing of each other are measured beside those that train together: they share the machine's
memory and caches as well, so that what is lost against them is what talking costs.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure

# A ViT-Ti/16 at 96 pixels with a head of 4096 prototypes: some seconds of work and 40 MB of gradients a step.
FULL = {
    "model.name": "vitt16_reg4",
    "crops.global_size": 96,
    "crops.local_size": 48,
    "crops.num_local": 4,
    "head.prototypes": 4096,
    "head.hidden_dim": 512,
    "head.bottleneck_dim": 128,
    "batch_size": 16,
    "steps": 12,
    "data": "scenes:count=2000,size=96",
}
SHORT = {**FULL, "model.depth": 1, "crops.global_size": 32, "crops.local_size": 16, "batch_size": 2, "steps": 3}
SHORT |= {"head.prototypes": 32, "data": "scenes:count=50,size=32"}
COMMON = ("loss.centering=sinkhorn", "log.every=1", "log.tensorboard=false", "probe.every=0", "data.workers=1")
COMMON += ("device=cpu", "precision=fp32", "threads=1")
WARM_UP = 2  # steps that are not counted: allocator, first collectives


def run(settings: dict[str, object], variant: str) -> measure.Measurement:
    """One short run of a variant: images a second of all processes together, and a step's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"{key}={value}" for key, value in settings.items()] + [*COMMON]
        keys.append(f"checkpoint.every={settings['steps']}")
        if variant == "2 apart":
            started = [_start(keys, Path(folder) / str(number)) for number in range(2)]
            outs = [_wait(each) for each in started]
        else:
            outs = [_wait(_start(keys, Path(folder) / "run", variant))]
        times = [step for out in outs for step in _step_times(out)]
    step_time = statistics.median(times)
    num_processes = 1 if variant == "1" else 2
    return {"images_per_second": num_processes * int(str(settings["batch_size"])) / step_time, "step_time": step_time}


def _start(keys: list[str], out: Path, variant: str = "1") -> tuple[list[subprocess.Popen], Path]:
    """The processes of one run: alone, or as `2 ddp` and `2 fsdp` say."""
    count, _, strategy = variant.partition(" ")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    keys = [*keys, f"out={out}", *([f"parallel.strategy={strategy}"] if strategy else [])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(int(count)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {name: str(value) for name, value in place.items()} if int(count) > 1 else {}
        command = [sys.executable, "-W", "ignore", "-m", "dinoreg", "pretrain", "vits14_reg4", *keys]
        processes.append(
            subprocess.Popen(
                command,
                env={**environment, "PYTHONPATH": str(measure.HERE.parent), **own},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes, out


def _wait(started: tuple[list[subprocess.Popen], Path]) -> Path:
    processes, out = started
    for process in processes:
        _, errors = process.communicate(timeout=1200)
        if process.returncode:
            raise SystemExit(f"a run ended with {process.returncode}: {errors.strip().splitlines()[-1:]}")
    return out


def _step_times(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step_time"] for line in lines[min(WARM_UP, len(lines) - 1) :]]


def main() -> None:
    options = measure.parser(__doc__ or "")
    options.set_defaults(rounds=3)
    given = options.parse_args()
    settings = SHORT if given.short else FULL
    variants = ("1", "2 ddp") if given.short else ("1", "2 apart", "2 ddp", "2 fsdp")
    takes: dict[str, Callable[[], measure.Measurement]] = {name: partial(run, settings, name) for name in variants}
    workers = {name: measure.Inline(take) for name, take in takes.items()}
    rounds = measure.in_turn(workers, 1 if given.short else given.rounds, given.budget)
    summary = measure.compare(rounds, "images_per_second", ("1", "2 apart"))
    rows = measure.comparison_rows(summary, "images_per_second", "img/s")
    measure.report("scaling", settings, {"variants": summary}, measure.table(rows))


if __name__ == "__main__":
    main()
