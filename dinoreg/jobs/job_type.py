"""How a kind of job is declared: a `launch/NAME.py` with one `JOB`, which turns a request into dinoreg's own commands.

Jobs run ordinary command lines: a declaration states the command lines, their dependencies and their resources.
dinoreg finds declarations by name or path; they import this module.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoreg.config.bundled import bundled, run_file
from dinoreg.config.load import Config, load_config, to_yaml
from dinoreg.config.option import nearest
from dinoreg.config.overwrite import run_entries
from dinoreg.jobs.options import LaunchOptions
from dinoreg.jobs.records import launch_folder
from dinoreg.runtime.errors import UserError

Arguments = tuple[str, ...]  # of the command `dinoreg`


@dataclass(frozen=True)
class Request:
    """The arguments of `dinoreg launch JOB`.

    source     the positional argument: a config, a list of datasets; "" without one
    overrides  key=value for the command; the job's own keys are in `options`
    given      {name: NAME=VALUE as typed} of the options that were given; others have their defaults
    check      raises UserError for a command line that its verb would refuse, without starting anything
    """

    source: str
    overrides: tuple[str, ...]
    options: LaunchOptions
    given: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Sequence[str]], None] = lambda arguments: None

    def value(self, key: str) -> str | None:
        """The text given for a key of the command; None where it was not given."""
        texts = [item.partition("=")[2] for item in self.overrides if item.partition("=")[0] == key]
        return texts[-1] if texts else None

    def require_one_process(self, reason: str) -> None:
        """UserError, ending with `reason`, where the options specify several processes."""
        if self.options.world_size > 1:
            raise UserError(f"nodes={self.options.nodes}, {self.options.tasks} processes: {reason}")

    def without(self, *keys: str) -> list[str]:
        """The `overrides` without those of the given keys."""
        return [item for item in self.overrides if item.partition("=")[0] not in keys]


@dataclass(frozen=True)
class Group:
    """Commands that are submitted together: one job, or an array of jobs where there are several.

    commands  arguments of `dinoreg`, one tuple per job
    runs      the run folder of each command that trains; its checkpoints show whether a restart made progress
    options   values of `LaunchOptions` for these jobs, in place of the user's
    after     names of groups whose jobs must have ended, successfully or not, before these start
    evaluate  arguments of `dinoreg launch evaluate`, which is started at each checkpoint of the training
    removes   files to delete when the command has succeeded
    """

    name: str
    commands: tuple[Arguments, ...]
    runs: tuple[Path, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    evaluate: Arguments = ()
    removes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that one launch does.

    folder   its records, logs and code go to `folder/launch/`
    groups   jobs, in the order of submission
    files    {path: text} to write before submission
    links    {new path: file to keep under it}, hard links where the disk supports them
    clears   folders whose run is deleted (overwrite=true)
    notes    lines to print for the user
    """

    folder: Path
    groups: tuple[Group, ...]
    files: Mapping[Path, str] = field(default_factory=dict)
    links: Mapping[Path, Path] = field(default_factory=dict)
    clears: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A kind of job.

    summary  one line for the help
    usage    the arguments of `dinoreg launch`
    plan     turns a request into a plan; UserError for what is wrong with it
    source   a description of the positional argument, "CONFIG, a YAML file", where it is required
    """

    name: str
    summary: str
    usage: str
    plan: Callable[[Request], Plan]
    source: str = ""


def job_files() -> dict[str, Path]:
    """The paths of the shipped declarations, by name."""
    return {path.stem: path for path in sorted(bundled("launch").glob("*.py"))}


def find_job(name: str) -> Job:
    """A shipped kind of job by name, or the `JOB` of a user's Python file by path; the file is run.

    raises UserError for an unknown name, and for a file that is missing, fails or has no JOB
    """
    known = job_files()
    path = Path(name) if name.endswith(".py") else known.get(name)
    if path is None:
        raise UserError(
            f"launch: {name}: unknown job{nearest(name, known)}; known: {', '.join(known)}, or a .py of one's own"
        )
    if not path.is_file():
        raise UserError(f"launch: {path}: no such file; expected a Python file with a JOB")
    job = getattr(run_file(path, "dinoreg_job"), "JOB", None)
    if not isinstance(job, Job):
        raise UserError(f"launch: {path}: has no JOB of type dinoreg.jobs.job_type.Job")
    return job


# ------------------------------------------------------------------------------------------------------------
# Trainings, which several kinds of job submit


def trainings(name: str, request: Request, runs: Iterable[Sequence[str]]) -> Plan:
    """A plan of one group, `name`, with a training of the request's config for each of `runs`, its overrides.

    The first start of a training and its restarts are the same command, independent of later changes of the config
    file: the resolved config is written to the run's `launch/`. `overwrite=true` takes effect once, at submission.

    returns  with the folder of the first training
    raises   UserError for everything that `dinoreg pretrain` would refuse before it opens the data
    """
    configs: dict[Path, Config] = {}
    for overrides in runs:
        request.check(("pretrain", request.source, *overrides))
        config = load_config(request.source, overrides)
        out = Path(str(config.out))
        if out in configs:
            raise UserError(f"{out}: two of the trainings have this folder; expected values whose names differ")
        configs[out] = config
    files = {launch_folder(out) / "config.yaml": to_yaml(config) for out, config in configs.items()}
    commands = tuple(("pretrain", str(path), "resume=true") for path in files)
    clears = tuple(out for out, config in configs.items() if config.overwrite and run_entries(out))
    notes = tuple(f"{out}: what is there is deleted once the job is accepted" for out in clears)
    return Plan(next(iter(configs)), (Group(name, commands, tuple(configs)),), files, clears=clears, notes=notes)
