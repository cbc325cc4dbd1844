"""Ten healthy runs of three configs: does the health monitor keep silent, and within which bands do their curves lie?

    python benchmarks/real_data.py FOLDER
    python benchmarks/healthy.py --pictures FOLDER/foods --bands dinoreg/reports/templates/healthy.json

`quickstart` on drawn scenes and `small` on the pictures, as they are but shorter, and the published recipe of
`vits14_reg4` (softmax centring, eight local crops, masks, drop path) with a network of 64 channels on the same
pictures. What the monitor says of each is listed (waiting for images is not the run's fault on a shared machine). The
bands are, for each twentieth of a run, the least and the greatest value over all runs of signals that have no scale of
their own.
Runs that are there already are kept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np

from dinoreg.config.load import load_config
from dinoreg.runtime.json_files import read_json, read_json_lines
from dinoreg.train.health import read_signals
from dinoreg.train.loop import pretrain

PARTS = 20
# Shares of ln K, shares of prototypes, and of the weights' norm.
SIGNALS = ("entropy", "marginal", "prototype_usage", "feature_std", "update_ratio")
TINY = {"model.name": "vitt14_reg4", "model.dim": 64, "model.depth": 3, "model.heads": 2}
SMALL_HEAD = {"head.prototypes": 512, "head.hidden_dim": 256, "head.bottleneck_dim": 64}
RECIPE = {**TINY, **SMALL_HEAD, "crops.global_size": 56, "crops.local_size": 28, "batch_size": 32, "optim.lr": 1e-3}
# Config: its options, its number of runs.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "quickstart": ({"steps": 300}, 4),
    "small": ({"steps": 300, "images": None}, 3),
    "vits14_reg4": ({**RECIPE, "steps": 300, "images": None, "epochs": None}, 3),
}


def trained(config: str, options: Mapping[str, Any], seed: int, pictures: Path | None, out: Path, short: bool) -> Path:
    """The folder of a run, which is made unless it is there."""
    if read_json(out / "status.json").get("phase") == "finished":
        return out
    given: dict[str, Any] = {**options, "seed": seed, "out": str(out), "probe.every": 0, "log.tensorboard": False}
    if pictures is not None and config != "quickstart":
        given["data.source"] = str(pictures)
    elif short or config != "quickstart":
        given["data.source"] = "scenes:count=200,size=64"
    if short:
        given |= {"steps": 6, "batch_size": 4, "log.every": 1}
    pretrain(load_config(config, {**given, "overwrite": out.exists()}))
    return out


def curves(out: Path, num_prototypes: int) -> dict[str, np.ndarray]:
    """Each signal at `PARTS` equal parts of a run, (PARTS,); NaN where nothing was written."""
    lines = read_json_lines(out / "metrics.jsonl")
    last = lines[-1]["step"]
    found = {name: np.full((2, PARTS), np.nan) for name in SIGNALS}
    for line in lines:
        if line["step"] == 1:  # at a rate of 0
            continue
        signals = read_signals(line, num_prototypes)
        part = min(PARTS - 1, PARTS * (line["step"] - 1) // last)
        for name, ends in found.items():
            for row, better in enumerate((np.fmin, np.fmax)):
                ends[row, part] = better(ends[row, part], float(signals[name]))
    return found


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--pictures", type=Path, help="photographs; none: drawn scenes")
    options.add_argument("--out", type=Path, help="folder of the runs; none: a temporary one")
    options.add_argument("--bands", type=Path, help="file to write the bands to")
    given = options.parse_args()
    rows, all_curves = [], []
    with tempfile.TemporaryDirectory() as folder:
        for config, (settings, count) in RUNS.items():
            for seed in range(1 if given.short else count):
                out = (given.out or Path(folder)) / f"{config}_s{seed}"
                trained(config, settings, seed, given.pictures, out, given.short)
                events = {line["name"] for line in read_json_lines(out / "health" / "events.jsonl")} - {"data-bound"}
                rows.append({"config": config, "seed": seed, "named": ", ".join(sorted(events)) or "nothing"})
                all_curves.append(curves(out, load_config(out / "config.yaml").head.prototypes))
    bands = {
        name: [
            [float(f"{value * outward:.4g}") for value in ends([each[name][row] for each in all_curves], axis=0)]
            for row, (ends, outward) in enumerate(((np.nanmin, 0.999), (np.nanmax, 1.001)))
        ]
        for name in SIGNALS
    }
    if given.bands:
        given.bands.write_text(json.dumps({"runs": len(rows), **bands}) + "\n")
    measure.report("healthy", {"runs": len(rows)}, {"rows": rows, "bands": bands}, measure.table(rows))


if __name__ == "__main__":
    main()
