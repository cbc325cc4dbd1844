"""How long training waits for checkpoints: written in the foreground, and in the background from a copy in memory.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --folder /scratch --model vitb14_reg4

The state is that of a run: student, teacher and AdamW's two moments, here with random numbers in the shapes of a ViT-L
(303 M parameters, 4.9 GB on the disk, 1.2 GB more for the teacher file; --model takes another). While one is written in
the background, small steps of training (matrix products, on the processor) go on, and how long they take is compared
with steps without. Memory: the state twice and the teacher once more, 12 GiB.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch

SHORT_MODEL = "vitt16_reg4"


def build_state(name: str) -> dict[str, Any]:
    """Random tensors under the names and shapes of a run's state, without heads."""
    from dinoreg.models.registry import build

    with torch.device("meta"):
        shapes = {f"backbone.{key}": value.shape for key, value in build(name).state_dict().items()}
    torch.manual_seed(0)

    def draw() -> dict[str, torch.Tensor]:
        return {key: torch.rand(shape) for key, shape in shapes.items()}

    first, second = draw(), draw()
    moments = {
        key: {"step": torch.tensor(1.0), "exp_avg": first[key], "exp_avg_sq": second[key]} for key in list(shapes)
    }
    return {"student": draw(), "teacher": draw(), "optimizer": moments, "loss_scale": torch.tensor(1.0)}


def build_step(width: int) -> Callable[[], float]:
    """One step of a small network, forward, backward and update; returns the seconds it took."""
    network = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    inputs = torch.randn(256, width)

    def step() -> float:
        begun = time.perf_counter()
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - begun

    return step


def measure_saves(run: Path, state: dict[str, Any], asynchronous: bool, saves: int, width: int) -> dict[str, Any]:
    """Save again and again, each after the one before is on the disk, with steps in between and meanwhile."""
    from dinoreg.checkpoint.async_writer import Writer
    from dinoreg.config.schema import CheckpointConfig

    run.mkdir()
    step = build_step(width)
    alone = [step() for _ in range(20)][5:]
    stalls, writes, meanwhile = [], [], []
    options = CheckpointConfig(keep=1, asynchronous=asynchronous, max_failures=1)
    with Writer(run, options, describe_teacher={}, timeout=600.0) as writer:
        for number in range(1, saves + 1):
            begun = time.perf_counter()
            writer.save(number, state, {"step": number})
            stalls.append(writer.read_stall())
            while asynchronous and writer.saved != number:
                if writer.poll():
                    raise SystemExit(f"the checkpoint could not be written to {run}")
                meanwhile.append(step())
            writer.wait()
            writes.append(time.perf_counter() - begun - (stalls[-1] if asynchronous else 0.0))
    written = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    shutil.rmtree(run)
    return {"stalls": stalls, "writes": writes, "bytes": written, "alone": median(alone), "meanwhile": meanwhile}


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--model", default="vitl14_reg4", help="whose shapes the state has")
    options.add_argument("--saves", type=int, default=3, help="checkpoints of each kind")
    options.add_argument("--folder", type=Path, help="where they are written (a temporary folder)")
    options.add_argument("--width", type=int, default=512, help="of the network that is trained meanwhile")
    given = options.parse_args()
    if given.short:
        given.model, given.saves, given.width = SHORT_MODEL, 2, 32
    state = build_state(given.model)
    parameters = sum(tensor.numel() for tensor in state["student"].values())
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        waited = measure_saves(Path(folder) / "foreground", state, False, given.saves, given.width)
        staged = measure_saves(Path(folder) / "background", state, True, given.saves, given.width)
    whole = median(waited["stalls"])
    rows = {
        "foreground": waited["stalls"],
        "background, first": staged["stalls"][:1],
        "background, following": staged["stalls"][1:],
    }
    results: dict[str, Any] = {
        name: {"stall": [round(each, 4) for each in values], "share": round(median(values) / whole, 4)}
        for name, values in rows.items()
    }
    results["background write time"] = {"seconds": [round(each, 3) for each in staged["writes"]]}
    results["step"] = {
        "alone": round(staged["alone"], 5),
        "meanwhile": round(median(staged["meanwhile"] or [0.0]), 5),
        "number meanwhile": len(staged["meanwhile"]),
    }
    settings = {"model": given.model, "parameters": parameters, "bytes": waited["bytes"], "saves": given.saves}
    settings |= {"peak GiB": round(measure.peak_gib(torch.device("cpu")), 2)}
    table = measure.table(
        [
            {
                "checkpoint": name,
                "training waits, s": f"{median(values):.3f}",
                "of the foreground's": f"{100 * median(values) / whole:.1f} %",
            }
            for name, values in rows.items()
        ]
    )
    measure.report("checkpoint_stall", settings, results, table)


if __name__ == "__main__":
    main()
