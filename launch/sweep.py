"""A grid of trainings: `dinoreg launch sweep CONFIG data=… out=runs/s 'sweep.optim.lr=[1e-3,2e-3]' 'sweep.seed=[0,1]'`.

`sweep.KEY=[A,B]` makes a training for each value, several such keys for each combination; other keys apply to all.
Each training is a job of its own in OUT/KEY=VALUE,…, and a job after them compares their results.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from dinoreg.commands.main import script
from dinoreg.jobs.job_type import Group, Job, Plan, Request, trainings
from dinoreg.runtime.errors import UserError

MAX_NAME = 120


def plan(request: Request) -> Plan:
    """One job per combination of the swept values and a comparison after them.

    raises  UserError for what is wrong with the request or with one of the trainings
    """
    grid = read_grid(request.overrides)
    out = request.value("out")
    if out is None:
        raise UserError("out: missing; say where the runs' folders go, for example out=runs/sweep")
    shared = [item for item in request.without("out") if not item.startswith("sweep.")]
    runs = []
    for values in itertools.product(*grid.values()):
        chosen = [f"{key}={value}" for key, value in zip(grid, values)]
        runs.append([*shared, *chosen, f"out={Path(out) / run_name(chosen)}"])
    found = trainings("sweep", request, runs)
    report = Group(
        "report",
        (("report", out, f"out={Path(out) / 'compare.html'}"),),
        options={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": None},
        after=("sweep",),
    )
    note = f"{len(runs)} trainings: {' x '.join(f'{len(values)} of {key}' for key, values in grid.items())}"
    return replace(found, folder=Path(out), groups=(*found.groups, report), notes=(note, *found.notes))


def read_grid(overrides: Sequence[str]) -> dict[str, list[str]]:
    """{key: its values as typed} of the keys `sweep.KEY`.

    raises  UserError without such a key, for a value that is not a list of different values, and for a repeated key
    """
    grid: dict[str, list[str]] = {}
    for item in overrides:
        if not item.startswith("sweep."):
            continue
        key, _, text = item.removeprefix("sweep.").partition("=")
        if not (text.startswith("[") and text.endswith("]")):
            raise UserError(f"sweep.{key}={text}: expected a list of values, as sweep.{key}=[A,B]")
        values = split_values(text[1:-1])
        if not values or "" in values or len(set(values)) < len(values):
            raise UserError(f"sweep.{key}={text}: expected values that differ, with commas between")
        if key in grid or any(each.partition("=")[0] == key for each in overrides):
            raise UserError(f"{key}: given twice")
        grid[key] = values
    if not grid:
        raise UserError(
            "launch sweep: nothing varies; expected sweep.KEY=[A,B], for example sweep.optim.lr=[1e-3,2e-3]"
        )
    return grid


def split_values(text: str) -> list[str]:
    """Split at commas outside brackets: "[0.2,1],[0.3,1]" has two values."""
    values = re.split(r",(?![^\[{(]*[\]})])", text)
    return [value.strip() for value in values] if text.strip() else []


def run_name(chosen: list[str]) -> str:
    """The name of a run's folder, from its overrides; at most about `MAX_NAME` characters."""
    name = re.sub(r"[^\w.=+,-]+", "-", ",".join(chosen))
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{sha256(name.encode()).hexdigest()[:8]}"


JOB = Job(
    name="sweep",
    summary="a grid of trainings, each a job of its own, and their comparison when all have ended",
    usage="sweep CONFIG data=FOLDER out=FOLDER sweep.KEY=[A,B] [sweep.KEY2=[C,D]] [max_parallel= gpus_per_node= …]",
    plan=plan,
    source="CONFIG, a name in configs/ or a YAML file",
)

if __name__ == "__main__":
    script(JOB, "launch")
