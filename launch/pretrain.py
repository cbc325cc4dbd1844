"""A training as one job of any number of processes: `dinoreg launch pretrain CONFIG data=… out=… nodes=2 …`.

Every start of the job is the same command, `dinoreg pretrain RUN/launch/config.yaml resume=true`: the first finds
nothing to go on from, those after a time limit, a preemption or a lost machine do. With evaluate=NAMES each teacher
that is saved is evaluated by jobs of its own while training goes on; keys of these are written evaluate.KEY=VALUE.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dinoreg.commands.main import main
from dinoreg.jobs.job_type import Arguments, Group, Job, Plan, Request
from dinoreg.jobs.options import OPTION_NAMES, split_options
from dinoreg.jobs.training_job import training
from dinoreg.runtime.errors import UserError

# What evaluations ask for unless they are told otherwise: where training runs, too, but not as much of it.
INHERITED = (
    *("cluster", "partition", "account", "qos", "constraint", "exclude", "reservation"),
    *("setup", "python", "code"),
)


def plan(request: Request) -> Plan:
    if request.source is None:
        raise UserError("launch pretrain: missing CONFIG, a name in configs/, a YAML file or a run folder")
    mine = [item for item in request.overrides if not item.startswith(("evaluate=", "evaluate."))]
    found = training(request.source, mine)
    evaluate = evaluation(request)
    notes = [f"{folder}: what is there is deleted once the job is accepted" for folder in found.clears]
    group = Group("pretrain", (found.command,), runs=(found.out,), evaluate=evaluate)
    return Plan(found.out, (group,), {found.config_file: found.config_text}, clears=found.clears, notes=tuple(notes))


def evaluation(request: Request) -> Arguments:
    """Arguments of `dinoreg launch` that evaluate a teacher of this run, but for the teacher; () without evaluate=.

    Raises UserError for what that launch would refuse.
    """
    names = request.value("evaluate")
    own = [item.removeprefix("evaluate.") for item in request.overrides if item.startswith("evaluate.")]
    if names is None:
        if own:
            raise UserError(f"evaluate.{own[0]}: expected evaluate=NAMES beside it, the datasets to evaluate on")
        return ()
    if request.options.container is not None:
        raise UserError("evaluate: a job in a container cannot submit others; leave evaluate= or container= out")
    _, keys, given = split_options(own)
    for item in keys:
        if item.partition("=")[0] in ("weights", "out"):
            raise UserError(f"evaluate.{item}: each checkpoint's teacher is evaluated into the run's folder")
    request.check(("eval", names, *keys))
    inherited = [text for name in INHERITED if name not in given for text in _written(request, name)]
    if request.options.gpus_per_node and "gpus_per_node" not in given:
        inherited.append("gpus_per_node=1")
    return ("evaluate", names, *keys, *inherited, *(item for item in own if item.partition("=")[0] in OPTION_NAMES))


def _written(request: Request, name: str) -> Sequence[str]:
    """An option as it can be typed, where it was given."""
    value = getattr(request.options, name)
    if name not in request.given or value is None:
        return []
    return [f"{name}=[{','.join(_quoted(item) for item in value)}]" if isinstance(value, list) else f"{name}={value}"]


def _quoted(item: str) -> str:
    return '"' + item.replace('"', '""') + '"'


JOB = Job(
    name="pretrain",
    summary="train as one job of all processes; evaluate=NAMES evaluates each checkpoint in jobs of its own",
    usage="pretrain CONFIG data=FOLDER out=FOLDER [nodes= gpus_per_node= time= …] [evaluate=NAMES evaluate.root=… …]",
    plan=plan,
)

if __name__ == "__main__":
    sys.exit(main(["launch", __file__, *sys.argv[1:]]))
