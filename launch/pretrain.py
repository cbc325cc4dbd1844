"""A training as one job of any number of processes: `dinoreg launch pretrain CONFIG data=… out=… nodes=2 …`.

Every start of the job is the same command, `dinoreg pretrain RUN/launch/config.yaml resume=true`: the first finds no
checkpoint; starts after a time limit, a preemption or a lost machine resume. With evaluate=NAMES each saved teacher is
evaluated by jobs of its own while training continues; their keys are written evaluate.KEY=VALUE.
"""

from dataclasses import replace

from dinoreg.commands.main import script
from dinoreg.jobs.job_type import Arguments, Job, Plan, Request, trainings
from dinoreg.jobs.options import PLACEMENT, split_options
from dinoreg.runtime.errors import UserError

# Options that evaluations inherit from the training where they are not given, so that they run in the same place.
INHERITED = ("cluster", *PLACEMENT, "setup", "python", "code")


def plan(request: Request) -> Plan:
    """One job that trains, of all its processes; UserError for what is wrong with the request."""
    overrides = [item for item in request.overrides if not item.startswith(("evaluate=", "evaluate."))]
    found = trainings("pretrain", request, [overrides])
    (group,) = found.groups
    return replace(found, groups=(replace(group, evaluate=evaluation(request)),))


def evaluation(request: Request) -> Arguments:
    """Arguments of `dinoreg launch` that evaluate a teacher of this run, without the teacher; () without evaluate=.

    raises  UserError for arguments that this launch would refuse
    """
    names = request.value("evaluate")
    texts = [item.removeprefix("evaluate.") for item in request.overrides if item.startswith("evaluate.")]
    if names is None:
        if texts:
            raise UserError(f"evaluate.{texts[0]}: expected evaluate=NAMES beside it, the datasets to evaluate on")
        return ()
    if request.options.container is not None:
        raise UserError("evaluate: a job in a container cannot submit others; leave evaluate= or container= out")
    _, keys, given = split_options(texts)
    for item in keys:
        if item.partition("=")[0] in ("weights", "out"):
            raise UserError(f"evaluate.{item}: each checkpoint's teacher is evaluated into the run's folder")
    request.check(("eval", names, *keys))
    inherited = {name: text for name, text in request.given.items() if name in INHERITED}
    if request.options.gpus_per_node:
        inherited["gpus_per_node"] = "gpus_per_node=1"
    return ("evaluate", names, *keys, *{**inherited, **given}.values())


JOB = Job(
    name="pretrain",
    summary="train as one job of all processes; evaluate=NAMES evaluates each checkpoint in jobs of its own",
    usage="pretrain CONFIG data=FOLDER out=FOLDER [nodes= gpus_per_node= time= …] [evaluate=NAMES evaluate.root=… …]",
    plan=plan,
    source="CONFIG, a name in configs/, a YAML file or a run folder",
)

if __name__ == "__main__":
    script(JOB, "launch")
