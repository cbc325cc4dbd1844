"""From a folder of JPEGs to training steps: how much of the step-only rate is left, and how long the step waited.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --model vitt16_reg4 --prototypes 1024 --workers 2

Both rates are of one program in one process: the step alone on a batch that is there already, and the whole of
sampling, decoding, cropping, augmentation, masks and step. The small model shows what the data costs where the step is
short; on a CPU, data and step share the cores.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

SMALL = {"model": "vitt16_reg4", "depth": 2, "prototypes": 1024}
VARIANTS: dict[str, dict[str, Any]] = {"as asked": {}, "small model": SMALL}


def build(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """One model with its loader, warmed up; see `measure.serve`."""
    from dinoreg.config.load import load_config
    from dinoreg.train.prepare import Setup
    from dinoreg.train.step import train_step

    overrides = {
        "out": settings["out"],
        "data.source": settings["folder"],
        "data.index_dir": settings["index_dir"],
        "data.workers": settings["workers"],
        "model.name": settings["model"],
        "head.prototypes": settings["prototypes"],
        "crops.local_size": settings["local_size"],
        "batch_size": settings["batch_size"],
        "device": settings["device"],
        "threads": settings["threads"],
        "steps": 10_000,
    }
    overrides |= {f"model.{key}": settings[key] for key in ("dim", "depth", "heads") if settings.get(key)}
    overrides |= {f"crops.{key}": settings[key] for key in ("global_size", "num_local") if settings.get(key)}
    config = load_config(None, overrides)
    setup = Setup(config)
    state = setup.new_state()
    batches = setup.batches(state)

    def step(batch: Any) -> None:
        train_step(state, batch, setup.schedules.at(state.step))

    kept = next(batches)

    def take() -> measure.Measurement:
        count = settings["steps"]
        time.sleep(settings["settle"])  # the loader's threads fill their queue before the step is timed alone
        alone = measure.seconds(lambda: step(kept), setup.device, count)
        waited = 0.0

        def from_files() -> None:
            nonlocal waited
            batch = next(batches)
            waited += batch.data_time
            step(batch)

        for batch in itertools.islice(batches, config.data.prefetch):  # those that were ready in advance
            step(batch)
        whole = measure.seconds(from_files, setup.device, count)
        return {
            "images_per_s": config.batch_size / whole,
            "step_only": config.batch_size / alone,
            "share": alone / whole,
            "data_wait": waited / count / whole,
        }

    step(kept)
    return take


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--only", nargs="+", choices=tuple(VARIANTS), help="measure these variants, by name")
    options.add_argument("--photos", type=Path, help="a folder of JPEGs; none: 500x375 photographs are written")
    options.add_argument("--model", default="vits16_reg4")
    options.add_argument("--prototypes", type=int, default=65536)
    options.add_argument("--local-size", type=int, default=96)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--workers", type=int, help="data threads; none: dinoreg's choice")
    options.add_argument("--device", default="auto")
    options.add_argument("--threads", type=int)
    options.add_argument("--steps", type=int, default=2, help="steps of one measurement, each way")
    given = options.parse_args()
    if given.worker:
        measure.serve(build, given.worker)
        return
    keys = ("model", "prototypes", "local_size", "batch_size", "workers", "device", "threads", "steps")
    settings = {**{key: getattr(given, key) for key in keys}, "settle": 1.0}
    variants = {name: VARIANTS[name] for name in given.only or VARIANTS}
    if given.short:
        tiny = {
            "dim": 32,
            "depth": 2,
            "heads": 2,
            "prototypes": 64,
            "global_size": 32,
            "local_size": 16,
            "num_local": 2,
        }
        settings |= {**tiny, "batch_size": 2, "steps": 1, "settle": 0.0}
        given.rounds, variants = 1, {"as asked": {}}
    with tempfile.TemporaryDirectory() as scratch:
        from photos import write_photos

        folder = given.photos or Path(scratch) / "photos"
        if given.photos is None:
            write_photos(folder, 6 if given.short else 120)
        places = {"folder": str(folder), "index_dir": scratch, "out": str(Path(scratch) / "run")}
        started = {
            name: ("end_to_end.py", {**settings, **places, **own}, sys.executable, None)
            for name, own in variants.items()
        }
        with measure.workers_of(started, build if given.short else None) as workers:
            rounds = measure.in_turn(workers, given.rounds, given.budget)
    summary = measure.compare(rounds, "images_per_s")
    table = []
    for row in measure.comparison_rows(summary, "images_per_s", "img/s end to end"):
        values = summary[row["variant"]]
        row |= {
            "img/s step only": f"{values['step_only']:.4g}",
            "end to end / step only": f"{values['share']:.3f}",
            "waited for data": f"{100 * values['data_wait']:.1f} %",
        }
        table.append(row)
    measure.report("end_to_end", {**settings, "rounds": len(rounds)}, summary, measure.table(table))


if __name__ == "__main__":
    main()
