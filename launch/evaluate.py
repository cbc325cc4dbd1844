"""Evaluations side by side: `dinoreg launch evaluate pets,cifar10 weights=runs/a root=/datasets gpus_per_node=1`.

An array with one task for each dataset, all writing into one folder, and a job after it that makes the report of what
is there, whether or not every task went well. The weights of a run are kept for the jobs: training may retire them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dinoreg.commands.main import script
from dinoreg.jobs.job_type import ONE_PROCESS, Group, Job, Plan, Request
from dinoreg.jobs.training_job import kept_weights
from dinoreg.runtime.errors import UserError

# What evaluates takes seconds to import, and `dinoreg launch --help` reads this file.
if TYPE_CHECKING:
    from dinoreg.evaluation.benchmark import Benchmark
    from dinoreg.evaluation.runner import Request as Evaluation

REPORT_MINUTES = 60


def plan(request: Request) -> Plan:
    from dinoreg.checkpoint.run_folder import run_of, teacher_step
    from dinoreg.commands.evaluate import read_request
    from dinoreg.weights.resolve import find_weights

    evaluation = read_request(request.overrides)
    if evaluation.options.weights is None:
        raise UserError("launch evaluate: weights= is missing: a run folder, a weight file, or a model's name")
    request.require_one_process("a dataset is evaluated by one")
    chosen, notes = datasets(request.source, evaluation)

    weights = evaluation.options.weights
    file, run = find_weights(weights), run_of(weights)
    links: Mapping[Path, Path] = {}
    files: Mapping[Path, str] = {}
    weights_argument = weights
    if run is not None and file is not None:
        links, files, kept = kept_weights(run, file)
        weights_argument = str(kept)
    stem = Path(weights).stem if file is not None else weights.replace(":", "-").replace("/", "-")
    out = Path(evaluation.options.out or run or Path("runs") / "eval" / stem)
    step = (teacher_step(file) if file is not None else None) or 0

    commands = []
    for name, benchmark in chosen.items():
        keys = [item for item in request.without("weights", "out") if _concerns(item, benchmark)]
        commands.append(("eval", name, f"weights={weights_argument}", f"out={out}", *keys, "report=false"))
    results = out / "eval" / f"{step:07d}"
    groups = (
        Group("evaluate", tuple(commands), options=ONE_PROCESS),
        Group(
            "report",
            (("report", str(results)),),
            options={**ONE_PROCESS, "gpus_per_node": None, "time": _shorter(request)},
            after=("evaluate",),
            removes=tuple(links),
        ),
    )
    return Plan(out, groups, files, links, notes=tuple(notes))


def datasets(names: str, evaluation: Evaluation) -> tuple[dict[str, Benchmark], list[str]]:
    """{argument of `dinoreg eval`: benchmark} of those whose data are there, and notes on those `all` leaves out."""
    from dinoreg.evaluation.runner import choose

    parts = [names] if Path(names).exists() else [name for name in names.split(",") if name]
    skips = parts == ["all"]
    if skips:
        requested = [(benchmark.name, benchmark) for benchmark in choose(parts, evaluation)]
    else:
        requested = [(part, benchmark) for part in parts for benchmark in choose([part], evaluation)]
    chosen, notes = {}, []
    for name, benchmark in requested:
        try:
            _find(benchmark, evaluation)
        except UserError as error:
            if not skips:
                raise
            notes.append(f"not evaluated: {error}")
        else:
            chosen[name] = benchmark
    if skips and not chosen:
        raise UserError(f"evaluate all: none of the datasets can be read below root={evaluation.options.root}")
    return chosen, notes


def _find(benchmark: Benchmark, evaluation: Evaluation) -> None:
    """UserError where a dataset's files are not below root."""
    if not benchmark.layouts:
        return
    if evaluation.options.root is None:
        raise UserError(f"{benchmark.name}: root= is missing, the folder that holds the datasets")
    benchmark.find(evaluation.options.root)


def _concerns(item: str, benchmark: Benchmark) -> bool:
    """Whether a key is for this dataset: NAME.KEY of another one is not."""
    from dinoreg.commands.evaluate import read_request

    return set(read_request([item]).dataset) <= {benchmark.name, *benchmark.aliases}


def _shorter(request: Request) -> str | None:
    """The report takes minutes, and a short job finds its place soon."""
    minutes = request.options.minutes
    return None if minutes is None else str(min(minutes, REPORT_MINUTES))


JOB = Job(
    name="evaluate",
    summary="an array of evaluations, one task for each dataset, and the report when all have ended",
    usage="evaluate NAME[,NAME…]|all|PATH weights=… root=FOLDER [gpus_per_node=1 max_parallel= time= …]",
    plan=plan,
    source="NAMES: datasets with commas between, all, or a labelled folder",
)

if __name__ == "__main__":
    script(JOB, "launch")
