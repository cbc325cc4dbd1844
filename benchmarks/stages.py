"""Crops in stages, small first and full at the end: what the probes lose by it, and how much of the time it saves.

    python benchmarks/stages.py --out runs/stages --write docs/results/stages.md

The network and the constants of `quickstart` (500 steps of 64) with global crops of 64 and local crops of 32 pixels,
on 10,000 scenes of 96 pixels that lie on the disk (drawing them would take as long as the steps), are trained as they
are and with `crops.stages=[WAY]`, with each seed. Runs that `--out` holds already are not made again. Both probes see
64 pixels. k-NN: class tokens, 1,000 scenes to learn from, 1,000 to test. Linear probe: logistic regression on class +
mean patch token, 4,000 and 2,000. In brackets 95 % intervals; *less plain* is the linear probe's difference to the
plain run on the same scenes; *within* says whether neither probe is below the plain run's interval. *Time* is that of
a way's steps over the plain run's, each size timed in turn from reading the pictures to the update, so that other
work slows all alike; *operations* are counted.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
from PIL import Image

PLAIN, WAYS = "plain", ("0.6:32/16", "0.75:32/16")
SCENES, SIZE = 10_000, 96
SHORT = {"steps": 4, "batch_size": 4, "head.prototypes": 16, "probe.num_images": 48}
COUNTS = (4000, 2000), (96, 48)  # scenes to learn from and to test, and those of the short form


def drawn(folder: Path, count: int) -> Path:
    """A folder of scenes, which are drawn unless they are there."""
    from dinoreg.scenes.render import render_image

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(list(folder.glob("*.png"))), count):
        Image.fromarray(render_image(index, SIZE)).save(folder / f"{index:05d}.png")
    return folder


def configured(way: str, folder: Path, short: bool, **keys: Any) -> Any:
    """The config of a run in one way; `folder` holds the scenes."""
    from dinoreg.config.load import load_config

    keys = {"crops.global_size": 64, "crops.local_size": 32, "data.source": str(folder / "scenes"), **keys}
    keys["crops.stages"] = None if way == PLAIN else way.split(",")
    return load_config("quickstart", keys | SHORT if short else keys)


def stepper(config: Any) -> measure.Inline:
    """Times steps of a config, with what prepares their batches, and counts their operations."""
    from dinoreg.plan.devices import cpu_device
    from dinoreg.plan.job import describe
    from dinoreg.plan.memory import operations_of
    from dinoreg.train.prepare import Setup
    from dinoreg.train.step import train_step

    setup = Setup(config)
    state = setup.new_state()
    batches = setup.batches(state)

    def step() -> None:
        train_step(state, next(batches), setup.schedules.at(state.step))

    def take() -> measure.Measurement:
        for _ in range(config.data.prefetch + 1):  # batches that were ready in advance
            step()
        return {"time": measure.seconds(step, setup.device, 10), "operations": operations}

    operations = operations_of(describe(config, 1, 1, cpu_device())).total
    return measure.Inline(take)


def costs(ways: list[str], out: Path, short: bool, rounds: int) -> dict[str, dict[str, float]]:
    """{way: {"time", "operations"}} of its steps, relative to those of the plain run."""
    config, steps = configured(PLAIN, out, short, **{"out": "nowhere", "probe.every": 0}), {}
    for way in ways:
        stages = configured(way, out, short).stages(config.steps)
        steps[way] = {stages[first]: end - first for first, end in itertools.pairwise([*stages, config.steps])}
    sizes = {crops: str(crops) for crops in itertools.chain(*steps.values())}
    taken = measure.in_turn({name: stepper(replace(config, crops=crops)) for crops, name in sizes.items()}, rounds)

    def share(way: str, key: str) -> float:
        ratios = {crops: measure.ratio(taken, name, str(config.crops), key) for crops, name in sizes.items()}
        return round(sum(count * ratios[crops] for crops, count in steps[way].items()) / config.steps, 3)

    return {way: {key: share(way, key) for key in ("time", "operations")} for way in ways}


def trained(way: str, seed: int, out: Path, short: bool) -> tuple[Any, dict[str, float]]:
    """The row of a run's linear probe, and the last probe inside the run, which is made unless it is there."""
    from dinoreg.commands.quickstart import probe_run
    from dinoreg.train.loop import pretrain

    run = out / f"{way.replace(':', '_').replace('/', '-')}_s{seed}"
    config = configured(way, out, short, out=str(run), seed=seed, resume=run.is_dir(), **{"probe.max_share": 1.0})
    pretrain(config)
    last = json.loads((run / "probe.jsonl").read_text().splitlines()[-1])
    return probe_run(config, run, *COUNTS[short], baselines=False).headline, last


def shown(*values: float) -> str:
    value, low, high = (100 * each for each in values)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    from dinoreg.evaluation.comparison import compare

    options = measure.parser(__doc__)
    options.add_argument("--out", type=Path, help="folder of the runs; none: a temporary one")
    options.add_argument("--write", type=Path, help="Markdown file for the table")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--ways", nargs="+", default=WAYS, help="values of crops.stages")
    given = options.parse_args()
    ways = [PLAIN, *(WAYS[:1] if given.short else given.ways)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        drawn(out / "scenes", 40 if given.short else SCENES)
        cost = costs(ways, out, given.short, 1 if given.short else given.rounds)
        for seed in [0] if given.short else given.seeds:
            made = {way: trained(way, seed, out, given.short) for way in ways}
            plain, start = made[PLAIN]
            for way, (row, last) in made.items():
                within = row.value >= plain.low and last["knn_top1"] >= start["knn_top1_low"]
                knn = shown(*(last[f"knn_top1{end}"] for end in ("", "_low", "_high")))
                probes = {"k-NN": knn, "linear probe": shown(row.value, row.low, row.high)}
                against = shown(*(compare(row, plain)[key] for key in ("difference", "low", "high")))
                rows.append({"way": way, "seed": seed, **probes, "less plain": against, "within": within, **cost[way]})
    table, machine = measure.table(rows), measure.fingerprint()
    if given.write:
        where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, commit {machine['commit']}"
        given.write.write_text(f"# {__doc__}\n{where}:\n\n{table}\n")
    measure.report("stages", {"rounds": given.rounds}, {"rows": rows}, table)


if __name__ == "__main__":
    main()
