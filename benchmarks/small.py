"""Pretraining from scratch on small sets of real pictures: does it learn, and how does a peer do on the same?

    python benchmarks/real_data.py FOLDER
    python benchmarks/small.py FOLDER --out runs/small [--peer-python PATH]

Every way trains the same network (96 wide, 3 deep, patch 8, 4 registers) on the same pictures without their labels, on
as many images, with crops of the same sizes. Then `dinoreg eval` judges its frozen features by k-NN and logistic
regression (class token and mean patch), paired with random weights of the network and with raw pixels on the same test
pictures. Runs and features that are there already are kept, so the same command finishes what was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
from alternatives import ALTERNATIVES, replaced

from dinoreg import evaluate, load, pretrain
from dinoreg.evaluation.comparison import compare
from dinoreg.evaluation.result import Row, headlines

SETS = {"tiles": "tiles/train", "elpv_defect": "elpv_defect", "foods": "foods"}  # what is judged, what is trained on
# The network and crops of `small`, for a config that has others.
NETWORK = {"model.name": "vitt8_reg4", "model.dim": 96, "model.depth": 3, "model.heads": 2}
CROPS = {"crops.global_size": 40, "crops.local_size": 24, "crops.num_local": 2}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small", {}),
    "small, colours of DINOv2": (
        "small",
        {
            **{"augment.brightness": 0.4, "augment.contrast": 0.4, "augment.saturation": 0.2, "augment.hue": 0.1},
            **{"augment.grayscale": 0.2, "augment.solarize_global2": 0.2},
        },
    ),
    "small, wide crops": (
        "small",
        {"crops.global_scale": [0.7, 1.0], "crops.local_scale": [0.3, 0.7], "augment.vflip": 0.5},
    ),
    "small, KoLeo 0.1": ("small", {"loss.koleo_weight": 0.1}),
    "small, 1,024 prototypes": ("small", {"head.prototypes": 1024}),
    "small, 64 prototypes": ("small", {"head.prototypes": 64}),
    "small, KDE": ("small", {"loss.koleo_weight": 0.1}),
    "small, SIGReg": ("small", {"loss.koleo_weight": 0.02}),
    "small, Sinkhorn queue": ("small", {}),
    "vits14_reg4's settings": ("vits14_reg4", {**NETWORK, **CROPS}),
}
PEERS = {
    "lightly-train dinov2, small's constants": "constants",
    "lightly-train dinov2": "dinov2",
    "lightly-train dino": "dino",
}
PROTOCOLS = ["logistic", "knn"]


def train(given: argparse.Namespace, data: Path, way: str, batch: int, seed: int, out: Path) -> Any:
    """Train in one way; returns what `dinoreg.evaluate` takes."""
    if way in PEERS:
        weights = out / "exported_models" / "exported_last.pt"
        if not weights.is_file():
            settings = {"data": str(data), "out": str(out), "method": PEERS[way], "batch": batch, "seed": seed}
            command = [given.peer_python, str(Path(__file__).with_name("peers.py")), "--train"]
            command.append(json.dumps({**settings, "images": given.images, "threads": given.threads}))
            # The peer's environment is its own.
            subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        return load(weights, heads=NETWORK["model.heads"])
    config, options = WAYS[way]
    told = {"data": str(data), "out": str(out), "images": given.images, "batch_size": batch, "seed": seed}
    told |= {"threads": given.threads, "data.workers": 1, "probe.every": 0, "log.tensorboard": False, "resume": True}
    if not (out / "checkpoints" / "last").exists():
        alternative = way.removeprefix("small, ")
        with replaced(alternative if alternative in ALTERNATIVES else None):
            pretrain(config, **told, **options)
    return out


def judge(given: argparse.Namespace, folder: Path, way: str, batch: int, seed: int) -> dict[str, Row]:
    """The first row of each protocol for one run, trained and measured unless that is done."""
    name = f"{way.replace(', ', '_').replace(' ', '-')}_b{batch}_s{seed}"
    out = given.out / folder.name / name
    weights = train(given, given.folder / SETS[folder.name], way, batch, seed, out)
    options = {"logistic.token": "cls+mean", "logistic.num_c": 21, "image_size": CROPS["crops.global_size"]}
    options["features"] = str(given.out / "features")
    place = given.out / folder.name / "results" / name
    shutil.rmtree(place, ignore_errors=True)  # a kept result has no resamples of its baselines, features are kept
    result = evaluate(weights, folder, protocols=PROTOCOLS, out=str(place), workers=1, report=False, **options)
    return {row.protocol: row for row in headlines(result.rows)}


def in_words(found: dict[str, Any]) -> str:
    """A paired difference in points with its interval, bold where it is one."""
    text = f"{100 * found['difference']:+.1f}"
    if found["low"] is not None:
        text += f" [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"**{text}**" if found["verdict"] in ("better", "worse") else text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="what real_data.py wrote")
    options.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    options.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=[*WAYS, *PEERS])
    options.add_argument("--batches", nargs="+", type=int, default=[64])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--images", type=int, default=64_000, help="that each run trains on")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--peer-python", default=sys.executable, help="the Python that has lightly-train")
    given = options.parse_args()
    given.folder, given.out = given.folder.absolute(), given.out.absolute()
    rows = []
    for name in given.sets:
        for batch in given.batches:
            for seed in given.seeds:
                first: dict[str, Row] = {}
                for way in given.ways:
                    judged = judge(given, given.folder / name, way, batch, seed)
                    row: dict[str, Any] = {"set": name, "way": way, "batch": batch, "seed": seed}
                    for protocol, figure in judged.items():
                        row[protocol] = f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
                        row |= {f"{protocol} - {other}": in_words(found) for other, found in figure.against.items()}
                        before = first.setdefault(protocol, figure)
                        row[f"{protocol} - {given.ways[0]}"] = (
                            "" if before is figure else in_words(compare(figure, before))
                        )
                    rows.append(row)
                    print(measure.table([row]), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    measure.report("small", settings, {"rows": rows}, measure.table(rows))


if __name__ == "__main__":
    main()
