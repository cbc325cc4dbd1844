"""`dinoreg quickstart`: pretrain a tiny register ViT on the embedded scenes, measure it, show it in a report.

The measure is a linear probe on scenes the run has not seen, beside two baselines under the same protocol: the same
network before training, and the raw pixels.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dinoreg.checkpoint.format import write_atomic
from dinoreg.checkpoint.run_folder import read_run
from dinoreg.commands.report import report_run
from dinoreg.config.load import Config, load_config
from dinoreg.evaluation.features.extract import ProbeRow, linear_probe, pixel_probe, probe_record
from dinoreg.reports.verdict import verdict
from dinoreg.scenes.render import CLASS_NAMES, NUM_CLASSES, SceneDataset
from dinoreg.train.loop import pretrain
from dinoreg.train.state import build_networks
from dinoreg.weights.load import load

# Scenes are endless; the probe's lie far behind those a run trains on.
FIRST_PROBE_SCENE = 20_000_000
NUM_TRAIN, NUM_TEST = 4000, 2000


def quickstart(out: str | Path | None = None, seed: int = 0, overwrite: bool = False) -> Path:
    """Pretrain, probe and report; returns the run folder. A run that was stopped goes on where it was.

    raises UserError when `out` holds something else
    """
    started = time.perf_counter()
    out = Path(out or "runs/quickstart")
    unfinished = not overwrite and (out / "config.yaml").is_file()
    config = load_config("quickstart", {"out": str(out), "seed": seed, "resume": unfinished, "overwrite": overwrite})
    pretrain(config)
    rows = probe_run(config, out)
    step = json.loads((out / "status.json").read_text())["step"]
    folder = out / "eval" / f"{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    trained = rows.pop("pretrained")
    record = probe_record("scenes", trained, rows)
    write_atomic(folder / "scenes.json", json.dumps(record, indent=1) + "\n")
    report = report_run(out)
    _show(trained, rows, verdict(read_run(out)).headline, time.perf_counter() - started, report)
    return out


def probe_run(config: Config, run: Path) -> dict[str, ProbeRow]:
    """Linear probes on held-out scenes: {"pretrained", "random init", "raw pixels"}, one protocol for all."""
    size = config.crops.global_size
    train = SceneDataset(NUM_TRAIN, size=size, seed=0, first=FIRST_PROBE_SCENE)
    test = SceneDataset(NUM_TEST, size=size, seed=0, first=FIRST_PROBE_SCENE + NUM_TRAIN)
    images = [np.stack([part.image(i) for i in range(len(part))]) for part in (train, test)]
    labels = [np.array([part.label(i) for i in range(len(part))]) for part in (train, test)]
    data = (images[0], labels[0], images[1], labels[1])
    networks = {"pretrained": load(run), "random init": build_networks(config)[0]["backbone"]}
    rows = {
        name: linear_probe(
            network,
            *data,
            num_classes=NUM_CLASSES,
            mean=config.augment.mean,
            std=config.augment.std,
            mean_patch=True,
        )
        for name, network in networks.items()
    }
    rows["raw pixels"] = pixel_probe(*data, num_classes=NUM_CLASSES)
    return rows


def _show(trained: ProbeRow, baselines: dict[str, ProbeRow], headline: str, seconds: float, report: Path) -> None:
    console = Console()
    table = Table(
        title=f"Linear probe on {trained.n_test} held-out scenes, {len(CLASS_NAMES)} classes "
        f"(chance {1 / NUM_CLASSES:.1%})"
    )
    for heading in ("features", "top-1", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for name, row in {"pretrained": trained, **baselines}.items():
        table.add_row(name, f"{row.accuracy:.1%}", f"{row.low:.1%} to {row.high:.1%}")
    console.print(table)
    console.print(f"{headline} {seconds / 60:.1f} minutes in all.", highlight=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
