"""From a plan to jobs: everything is looked at first, then written, then submitted; what is refused leaves nothing.

What runs inside a job is made by the caller (`make`), so that this part knows submission only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from submitit.core.utils import DelayedSubmission

from dinoreg.config.overwrite import put_back, set_aside
from dinoreg.jobs import local_queue as local
from dinoreg.jobs import slurm
from dinoreg.jobs.job_type import Group, Job, Plan, Request
from dinoreg.jobs.options import LaunchOptions
from dinoreg.jobs.records import JOBS, Record, add_records, launch_folder, next_launch, read_records
from dinoreg.jobs.snapshot import copy_package
from dinoreg.runtime.errors import RunError, UserError

PACKAGE = Path(__file__).resolve().parents[1]
NO_TIMEOUT = 60 * 24 * 365  # minutes; what submitit counts with where there is no limit


class Make(Protocol):
    """Builds what a job runs: one command of a group."""

    def __call__(self, group: Group, index: int, launch: Path, requeues: int) -> Callable[[], Any]: ...


@dataclass(frozen=True)
class Launched:
    """Jobs that were submitted, and the folder whose `launch/` tells of them."""

    folder: Path
    records: tuple[Record, ...]


def launch(job: Job, request: Request, make: Make, say: Callable[[str], None]) -> Launched | None:
    """Submit what a request asks for; None for a dry run.

    raises UserError, with nothing written, for whatever is wrong with the request or refused by the scheduler
    """
    options = request.options
    if options.on_slurm:
        slurm.require(options)
    plan = job.plan(request)
    settings = {group.name: _settings(group, options, plan.folder) for group in plan.groups}
    if not options.on_slurm:
        for each in settings.values():
            local.check(each)
    _refuse_a_second_launch(plan)
    for note in plan.notes:
        say(note)
    if options.dry_run:
        show(plan, settings, say)
        return None
    return Launched(plan.folder, tuple(_Submission(job, plan, settings, make).run()))


def show(plan: Plan, settings: dict[str, LaunchOptions], say: Callable[[str], None]) -> None:
    """What a launch would do, in full; nothing is written."""
    folder = launch_folder(plan.folder).absolute()
    for path in plan.clears:
        say(f"would delete the run in {path}")
    for path, source in plan.links.items():
        say(f"would keep {source} as {path}")
    for number, (path, text) in enumerate(plan.files.items()):
        say(f"would write {path}" + (f":\n{_indented(text)}" if number == 0 else ", in the same form"))
    for group in plan.groups:
        options = settings[group.name]
        jobs = "one job" if len(group.commands) == 1 else f"{len(group.commands)} jobs"
        after = f", after {' and '.join(group.after)} (however it ended)" if group.after else ""
        say(f"{group.name}: {jobs}{after}, each {options.in_words()}")
        for command in group.commands:
            say(f"  {shown(command)}")
        if options.on_slurm:
            code = folder / "code" / "CONTENT" if options.code == "copy" else PACKAGE.parent
            for size in _pieces(len(group.commands), slurm.max_array_size()):
                made = slurm.executor(folder, options, str(options.name), code, ["JOB"] * bool(group.after), size)
                say(f"would submit:\n{_indented(slurm.script(made, size))}")
    say("dry_run=true: nothing was written, nothing submitted")


def shown(command: Sequence[str]) -> str:
    return shlex.join(["dinoreg", *command])


def _settings(group: Group, options: LaunchOptions, folder: Path) -> LaunchOptions:
    """What the jobs of a group ask for, under a name that squeue can show."""
    own = dataclasses.replace(options, **dict(group.options))
    name = own.name or f"{group.name}-{folder.resolve().name}"
    return dataclasses.replace(own, name=re.sub(r"[^\w.=+-]+", "-", name)[:100])


def _refuse_a_second_launch(plan: Plan) -> None:
    """A run folder belongs to one job at a time."""
    from dinoreg.jobs.status import examine

    wanted = {run.resolve() for group in plan.groups for run in group.runs}
    for folder in sorted({plan.folder, *(run for group in plan.groups for run in group.runs)}):
        if not (launch_folder(folder) / JOBS).is_file():
            continue
        records = [record for record in read_records(folder) if record.run and Path(record.run).resolve() in wanted]
        for found in examine(folder, records):
            if not found.is_over:
                raise UserError(
                    f"out={found.record.run}: job {found.record.job} ({found.record.title}) is still {found.state}; "
                    f"dinoreg launch cancel {folder} ends it"
                )


class _Submission:
    """One launch on its way; what it had made is taken back when it is refused."""

    def __init__(self, job: Job, plan: Plan, settings: dict[str, LaunchOptions], make: Make) -> None:
        self.job, self.plan, self.settings, self.make = job, plan, settings, make
        self.launch = launch_folder(plan.folder).absolute()
        self.made: list[Path] = []  # files and folders that were not there before
        self.aside: list[Path] = []  # runs that are to be overwritten, until the jobs have been accepted
        self.submitted: dict[str, list[str]] = {}
        self.records: list[Record] = []

    def run(self) -> list[Record]:
        try:
            self._write()
            self.number = next_launch(self.launch)
            if next(iter(self.settings.values())).on_slurm:
                for group in self.plan.groups:
                    self._submit_to_slurm(group)
            else:
                self._start_here()
            add_records(self.launch, self.records)
            for path in self.aside:
                shutil.rmtree(path, ignore_errors=True)
        except BaseException as error:
            self._take_back()
            if isinstance(error, OSError):
                raise UserError(f"{self.launch}: cannot be written ({error.strerror or error})") from None
            if isinstance(error, RunError):  # the scheduler's refusal is the request's fault
                raise UserError(str(error)) from None
            raise
        return self.records

    def _write(self) -> None:
        for path in self.plan.clears:
            self.aside.append(set_aside(path))
        self._make_folder(self.launch)
        options = next(iter(self.settings.values()))
        self.code = copy_package(self.launch / "code") if options.code == "copy" else PACKAGE.parent
        for path, text in self.plan.files.items():
            self._make_folder(path.parent)
            aside = path.with_name(f"{path.name}.part")
            aside.write_text(text)
            os.replace(aside, path)
        for path, source in self.plan.links.items():
            self._make_folder(path.parent)
            keep(source, path)

    def _make_folder(self, path: Path) -> None:
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self.made += missing[::-1]

    def _take_back(self) -> None:
        """Nothing submitted, nothing written."""
        jobs = [job for group in self.submitted.values() for job in group]
        if jobs:
            with contextlib.suppress(RunError, UserError):
                slurm.cancel(jobs)
        for path in reversed(self.made):
            if path.name == "launch" or self.launch in path.parents:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.rmdir()
        for path in self.aside:
            put_back(path)

    def _record(self, group: Group, index: int, job: str, runner: list[int]) -> None:
        options = self.settings[group.name]
        self.records.append(
            Record(
                job=job,
                launch=self.number,
                kind=self.job.name,
                group=group.name,
                cluster="slurm" if options.on_slurm else "local",
                command=list(group.commands[index]),
                nodes=options.nodes,
                tasks=options.tasks,
                run=str(group.runs[index]) if group.runs else "",
                after=self._waits_for(group),
                runner=runner,
                code=str(self.code),
                directory=str(Path.cwd()),
                time=time.time(),
            )
        )

    def _waits_for(self, group: Group) -> list[str]:
        return [job for name in group.after for job in self.submitted[name]]

    def _commands(self, group: Group) -> list[Callable[[], Any]]:
        requeues = self.settings[group.name].requeues
        return [self.make(group, index, self.launch, requeues) for index in range(len(group.commands))]

    def _submit_to_slurm(self, group: Group) -> None:
        options = self.settings[group.name]
        after = sorted({job.partition("_")[0] for job in self._waits_for(group)}, key=int)  # an array by its one number
        jobs: list[str] = []
        self.submitted[group.name] = jobs
        commands = self._commands(group)
        for size in _pieces(len(commands), slurm.max_array_size()):
            made = slurm.executor(self.launch, options, str(options.name), self.code, after, size)
            jobs += slurm.submit(made, commands[len(jobs) : len(jobs) + size])
        for index, job in enumerate(jobs):
            self._record(group, index, job, [])

    def _start_here(self) -> None:
        plans: list[local.LocalJob] = []
        for group in self.plan.groups:
            options = self.settings[group.name]
            first = f"local{self.number}.{len(self.submitted)}"
            commands = self._commands(group)
            jobs = [first] if len(commands) == 1 else [f"{first}_{index}" for index in range(len(commands))]
            python = slurm.interpreter(options, self.launch, self.code)
            for job, command in zip(jobs, commands):
                delayed = DelayedSubmission(command)
                delayed.set_timeout(NO_TIMEOUT, options.requeues)
                delayed.dump(self.launch / f"{job}_submitted.pkl")
                plans.append(
                    local.LocalJob(
                        job=job,
                        after=self._waits_for(group),
                        tasks=options.tasks,
                        gpus=options.gpus_per_node or 0,
                        seconds=60 * (options.minutes or 0),
                        signal_seconds=options.signal_seconds,
                        setup=options.setup_lines,
                        python=python,
                        trains=bool(group.runs),
                    )
                )
            self.submitted[group.name] = jobs
        options = next(iter(self.settings.values()))
        # Without GPUs to count by, jobs side by side would only slow each other down.
        places = options.max_parallel or (len(local.devices()) if options.gpus_per_node else 1)
        runner = local.begin(
            self.launch, self.number, plans, places, slurm.interpreter(options, self.launch, self.code)
        )
        for group in self.plan.groups:
            for index, job in enumerate(self.submitted[group.name]):
                self._record(group, index, job, runner)
        self.submitted.clear()


def keep(source: Path, target: Path) -> None:
    """Have a file under a second name, whatever becomes of the first; a copy where the disk has no hard links."""
    aside = target.with_name(f"{target.name}.part")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    os.replace(aside, target)


def _pieces(count: int, size: int) -> list[int]:
    """Sizes of the arrays that `count` jobs are submitted in."""
    return [min(size, count - first) for first in range(0, count, size)]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().splitlines())
