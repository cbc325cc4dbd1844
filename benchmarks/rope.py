"""Rotary against learned positions from scratch: `quickstart` as it is and with a name that ends with _rope.

    python benchmarks/rope.py --out runs/rope

The tiny network of `quickstart` (500 steps of 64 on drawn scenes) is trained in both ways with each seed; runs that
`--out` holds already are not made again. Both keep their own kind of norms and keys (`_rope` is all of DINOv3's kind).
k-NN is the last probe inside the run, the linear probe logistic regression on class + mean patch token, on scenes that
no run has seen. In brackets 95 % intervals; *less learned* is the linear probe's difference on the same scenes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import measure
from stages import COUNTS, SHORT, shown

WAYS = {"learned": "vitt8_reg4", "rope": "vitt8_reg4_rope"}


def trained(way: str, seed: int, out: Path, short: bool) -> tuple[Any, dict[str, float]]:
    """The row of a run's linear probe, and the last probe inside the run, which is made unless it is there."""
    from dinoreg.commands.quickstart import probe_run
    from dinoreg.config.load import load_config
    from dinoreg.train.loop import pretrain

    run = out / f"{way}_s{seed}"
    keys = {"model.name": WAYS[way], "seed": seed, "out": str(run), "resume": run.is_dir(), "probe.max_share": 1.0}
    config = load_config("quickstart", keys | SHORT if short else keys)
    pretrain(config)
    last = json.loads((run / "probe.jsonl").read_text().splitlines()[-1])
    return probe_run(config, run, *COUNTS[short], baselines=False).headline, last


def main() -> None:
    from dinoreg.evaluation.comparison import compare

    options = measure.parser(__doc__)
    options.add_argument("--out", type=Path, help="folder of the runs; none: a temporary one")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in [0] if given.short else given.seeds:
            made = {way: trained(way, seed, given.out or Path(folder), given.short) for way in WAYS}
            for way, (row, last) in made.items():
                knn = shown(*(last[f"knn_top1{end}"] for end in ("", "_low", "_high")))
                difference = shown(*(compare(row, made["learned"][0])[key] for key in ("difference", "low", "high")))
                linear = shown(row.value, row.low, row.high)
                rows.append({"way": way, "seed": seed, "k-NN": knn, "linear probe": linear, "less learned": difference})
    measure.report("rope", {}, {"rows": rows}, measure.table(rows))


if __name__ == "__main__":
    main()
