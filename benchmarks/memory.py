"""The memory that `dinoreg plan` foretells, against a whole step on fake tensors and, on CUDA, against the real one.

    python benchmarks/memory.py [--models vits14_reg4 vitb14_reg4 vitl16_short_reg4_in1k] [--batch-size 32]
    python benchmarks/memory.py --cpu [--models vits14_reg4 quickstart] [--batch-sizes 2 8 32] [-- probe.every=0]

The plan extends a step of a few blocks; here the step is run with all of them, which a test does for small models. What
kernels take for themselves is in the measured figure only, which needs a CUDA device that the run fits on. With --cpu
the plan is held against the peak of the processes of short runs (resident memory, as the system counts it).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import measure
import torch

GIB = 2**30
MODELS = ("vits14_reg4", "vitb14_reg4", "vitl16_short_reg4_in1k")


def compare(config: Any) -> dict[str, Any]:
    """One row: what the plan says, what a whole step holds, and what a CUDA device allocated, in GiB."""
    from dinoreg.plan.devices import find_device, local_device
    from dinoreg.plan.job import describe
    from dinoreg.plan.memory import memory_of
    from dinoreg.plan.speed import probe
    from dinoreg.plan.trace import trace_job

    job = describe(config, 1, 1, find_device("h200"))
    begun = time.perf_counter()
    planned = memory_of(job).allocated
    seconds = time.perf_counter() - begun
    whole = trace_job(job, job.sizes.depth, (job.masked_patches(config.batch_size, worst=True),)).peaks
    traced = max(sum(parts.values()) for parts in whole.values())
    row = {
        "model": config.model.name,
        "batch": config.batch_size,
        "plan": round(planned / GIB, 2),
        "whole step": round(traced / GIB, 2),
        "plan over whole step": round(planned / traced, 3),
        "seconds to plan": round(seconds, 1),
    }
    if torch.cuda.is_available():
        job = describe(config, 1, 1, local_device())
        memory = memory_of(job)
        measured = probe(job, torch.device("cuda", torch.cuda.current_device())) if memory.fits else None
        if measured is not None and measured.peak_memory:
            row["measured"] = round(measured.peak_memory / GIB, 2)
            row["plan over measured"] = round(memory.allocated / measured.peak_memory, 3)
            row["images/s"] = round(measured.images_per_second, 1)
    return row


def run_on_cpu(name: str, overrides: list[str]) -> dict[str, Any]:
    """One row: what the plan says of a run on the CPU, and the most that its process held, in GiB."""
    from dinoreg.config.load import load_config
    from dinoreg.plan.run import plan

    config = load_config(name, overrides)
    planned = plan(config, probe=False).memory
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dinoreg", "pretrain", name, *overrides, f"out={folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    measured = 1024 * used.ru_maxrss
    row = {"model": name, "batch": config.batch_size, "tensors": round(planned.allocated / GIB, 2)}
    row |= {"plan": round(planned.needed / GIB, 2), "process": round(measured / GIB, 2)}
    row["plan over process"] = round(planned.needed / measured, 3)
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--models", nargs="+", default=list(MODELS), help="names in configs/, or YAML files")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    options.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, after a --")
    options.add_argument("--cpu", action="store_true", help="short runs on the CPU")
    options.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 8, 32], help="of these runs")
    given = options.parse_args()
    if given.cpu:
        models = given.models if given.models != list(MODELS) else ["vits14_reg4", "quickstart"]
        keys = ["device=cpu", "steps=4", "data=scenes:count=256,size=256", *given.overrides]
        rows = [run_on_cpu(name, [*keys, f"batch_size={size}"]) for name in models for size in given.batch_sizes]
        named = {f"{row['model']} {row['batch']}": row for row in rows}
        measure.report("memory-cpu", {"overrides": given.overrides}, named, measure.table(rows))
        return
    from dinoreg.config.load import load_config

    overrides = [
        f"batch_size={2 if given.short else given.batch_size}",
        f"precision={given.precision}",
        "model.attention=sdpa",
        *given.overrides,
    ]
    if given.short:
        given.models = given.models[:1]
        overrides += ["model.dim=64", "model.depth=2", "model.heads=1", "head.prototypes=64"]
    rows = [compare(load_config(name, overrides)) for name in given.models]
    settings = {"batch_size": given.batch_size, "precision": given.precision, "overrides": given.overrides}
    measure.report("memory", settings, {row["model"]: row for row in rows}, measure.table(rows))


if __name__ == "__main__":
    main()
