"""Evaluations side by side: `dinoreg launch evaluate pets,cifar10 weights=runs/a root=/datasets gpus_per_node=1`.

An array with one task for each dataset, all writing into one folder, and a job after it that writes the report of the
existing results, whether or not every task succeeded. The weights of a run are linked for the jobs, since training may
remove the originals.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dinoreg.commands.main import script
from dinoreg.jobs.job_type import Group, Job, Plan, Request
from dinoreg.jobs.records import launch_folder
from dinoreg.runtime.errors import UserError

# These imports take seconds, and `dinoreg launch --help` reads this file.
if TYPE_CHECKING:
    from dinoreg.evaluation.benchmark import Benchmark
    from dinoreg.evaluation.request import Request as Evaluation

REPORT_MINUTES = 60


def plan(request: Request) -> Plan:
    """One task per dataset and a job for the report after them.

    raises  UserError for what is wrong with the request, and for datasets that are not below root=
    """
    from dinoreg.checkpoint.run_folder import run_of
    from dinoreg.checkpoint.steps import PROBED
    from dinoreg.evaluation.request import read_request
    from dinoreg.runtime.json_files import step_in
    from dinoreg.weights.resolve import find_weights

    evaluation = read_request(request.overrides)
    weights = evaluation.options.weights
    if weights is None:
        raise UserError("launch evaluate: weights= is missing: a run folder, a weight file, or random:NAME")
    request.check(("eval", request.source, *request.overrides))
    request.require_one_process("a dataset is evaluated by one")
    chosen, notes = datasets(request.source, evaluation)

    file = find_weights(weights)
    run = run_of(file) if file is not None else None
    links: dict[Path, Path] = {}
    files: dict[Path, str] = {}
    weights_argument = weights
    if run is not None and file is not None:
        # The linked weights are in a small run folder of the same name, which reports show.
        home = launch_folder(run) / "weights" / run.resolve().name
        kept = [path for path in (file, file.with_suffix(".json")) if path.is_file()]
        links = {home / "teacher" / path.name: path for path in kept}
        # With what says how the step was chosen.
        about = [run / name for name in ("config.yaml", PROBED, "checkpoints/last", "checkpoints/best")]
        files = {home / path.relative_to(run): path.read_text() for path in about if path.is_file()}
        weights_argument = str(home / "teacher" / file.name)
    stem = Path(weights).stem if file is not None else weights.replace(":", "-").replace("/", "-")
    out = Path(evaluation.options.out or run or Path("runs") / "eval" / stem)
    step = step_in(file.stem) or 0 if file is not None else 0

    commands = []
    for name, benchmark in chosen.items():
        keys = [item for item in request.without("weights", "out") if _concerns(item, benchmark)]
        commands.append(("eval", name, f"weights={weights_argument}", f"out={out}", *keys, "report=false"))
    minutes = request.options.minutes  # a short job finds its place soon
    report = Group(
        "report",
        (("report", str(out / "eval" / f"{step:07d}")),),
        options={"gpus_per_node": None, "time": None if minutes is None else str(min(minutes, REPORT_MINUTES))},
        after=("evaluate",),
        removes=tuple(links),
    )
    return Plan(out, (Group("evaluate", tuple(commands)), report), files, links, notes=tuple(notes))


def datasets(names: str, evaluation: Evaluation) -> tuple[dict[str, Benchmark], list[str]]:
    """{argument of `dinoreg eval`: benchmark} of those whose data exist, and notes on those that `all` leaves out.

    names   "all", a path, or datasets with commas between
    raises  UserError for a named dataset whose data are missing, and where `all` finds none
    """
    from dinoreg.evaluation.request import choose, folder_of, split_names

    everything = names == "all"
    chosen, notes = {}, []
    for part in filter(None, split_names(names)):
        for benchmark in choose([part], evaluation):
            try:
                folder_of(benchmark, evaluation)
            except UserError as error:
                if not everything:
                    raise
                notes.append(f"not evaluated: {error}")
            else:
                chosen[benchmark.name if everything else part] = benchmark
    if everything and not chosen:
        raise UserError(f"evaluate all: none of the datasets can be read below root={evaluation.options.root}")
    return chosen, notes


def _concerns(item: str, benchmark: Benchmark) -> bool:
    """Whether a key applies to this dataset; NAME.KEY of another dataset does not."""
    from dinoreg.evaluation.request import read_request

    return set(read_request([item]).dataset) <= {benchmark.name, *benchmark.aliases}


JOB = Job(
    name="evaluate",
    summary="an array of evaluations, one task for each dataset, and the report when all have ended",
    usage="evaluate NAME[,NAME…]|all|PATH weights=… root=FOLDER [gpus_per_node=1 max_parallel= time= …]",
    plan=plan,
    source="NAMES: datasets with commas between, all, or a labelled folder",
)

if __name__ == "__main__":
    script(JOB, "launch")
