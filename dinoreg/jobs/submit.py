"""Submitting a plan: everything is checked first, then written, then submitted; a refused launch leaves no files."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from dinoreg.config.bundled import PACKAGE
from dinoreg.config.overwrite import put_back, refuse_live, set_aside
from dinoreg.config.schema import Config
from dinoreg.jobs import local_queue as local
from dinoreg.jobs import slurm
from dinoreg.jobs.attempt import Command
from dinoreg.jobs.job_type import Group, Job, Plan, Request
from dinoreg.jobs.options import NO_TIMEOUT, PLACEMENT, LaunchOptions
from dinoreg.jobs.records import Record, add_records, launch_folder, next_launch, read_records, replace_text
from dinoreg.jobs.snapshot import copy_package
from dinoreg.jobs.status import examine
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.json_files import flatten
from dinoreg.runtime.templates import render


def launch(
    job: Job, request: Request, run_verb: Callable[..., None], say: Callable[[str], None]
) -> tuple[Path, list[Record]]:
    """Submit the jobs of a request; returns (folder whose `launch/` has the records, jobs), no jobs for a dry run.

    run_verb  runs one of dinoreg's verbs inside a job, see `Command`
    say       prints a line
    raises    UserError, with nothing written, for what is wrong with the request or refused by the scheduler
    """
    options = request.options
    if options.on_slurm:
        slurm.require(options)
    plan = job.plan(request)
    settings = {group.name: _group_options(group, options, plan.folder) for group in plan.groups}
    if not options.on_slurm:
        for each in settings.values():
            local.check(each)
    _refuse_a_second_launch(plan)
    for note in plan.notes:
        say(note)
    if options.dry_run:
        say(dry_run(plan, settings))
        return plan.folder, []
    return plan.folder, _Submission(plan, settings, run_verb).run()


def dry_run(plan: Plan, settings: dict[str, LaunchOptions]) -> str:
    """The text that describes a launch in full; nothing is written.

    settings  {group name: its options}
    """
    launch = launch_folder(plan.folder).absolute()
    scripts: dict[str, list[str]] = {group.name: [] for group in plan.groups}
    for group in plan.groups:
        options = settings[group.name]
        code = launch / "code" / "CONTENT" if options.code == "copy" else PACKAGE.parent
        for size in _array_sizes(group) if options.on_slurm else ():
            executor = slurm.make_executor(launch, options, code, ["JOB"] if group.after else [], size)
            scripts[group.name].append(slurm.script(executor, size))
    helpers = {"command_line": command_line, "differing": _differing, "PLACEMENT": PLACEMENT}
    return render("jobs/templates/dry_run.txt.j2", plan=plan, settings=settings, scripts=scripts, **helpers).rstrip()


def _differing(text: str) -> list[str]:
    """The values of a config's YAML that are not the defaults, as KEY=VALUE; [] for another file."""
    from omegaconf import OmegaConf

    try:
        values = flatten(OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
    except Exception:  # YAML has many ways to be wrong; a file that is none is not shown
        return []
    defaults = flatten(json.loads(json.dumps(dataclasses.asdict(Config()))))
    return [f"{key}={value}" for key, value in values.items() if key in defaults and value != defaults[key]]


def command_line(arguments: Sequence[str]) -> str:
    """A command of dinoreg as text for a shell."""
    return shlex.join(["dinoreg", *arguments])


def _group_options(group: Group, options: LaunchOptions, folder: Path) -> LaunchOptions:
    """The options of a group's jobs, with a name that squeue can show."""
    own = dataclasses.replace(options, **dict(group.options))
    name = own.name or f"{group.name}-{folder.resolve().name}"
    return dataclasses.replace(own, name=re.sub(r"[^\w.=+-]+", "-", name)[:100])


def _refuse_a_second_launch(plan: Plan) -> None:
    """UserError where one of the plan's runs is at work: in a job that has not ended, or without one."""
    runs = [run for group in plan.groups for run in group.runs]
    resolved = {run.resolve() for run in runs}
    for folder in sorted({plan.folder, *runs}):
        records = [record for record in read_records(folder) if record.run and Path(record.run).resolve() in resolved]
        for status in examine(folder, records):
            if not status.is_over:
                raise UserError(
                    f"out={status.record.run}: job {status.record.job} ({status.record.title}) is still "
                    f"{status.state}; dinoreg launch cancel {folder} ends it"
                )
    for run in runs:
        refuse_live(run)


class _Submission:
    """The submission of one launch; when it is refused, its files are removed again."""

    def __init__(self, plan: Plan, settings: dict[str, LaunchOptions], run_verb: Callable[..., None]) -> None:
        self.plan, self.settings, self.run_verb = plan, settings, run_verb
        self.options = settings[plan.groups[0].name]
        self.launch = launch_folder(plan.folder).absolute()
        self.commands = {group.name: self._commands(group) for group in plan.groups}
        self.undo = contextlib.ExitStack()
        self.submitted: dict[str, list[str]] = {}

    def run(self) -> list[Record]:
        try:
            with self.undo:
                aside = self._write()
                number = next_launch(self.launch)
                runner = self._submit_to_slurm() if self.options.on_slurm else self._start_local_runner(number)
                records = self._records(number, runner)
                add_records(self.launch, records)
                self.undo.pop_all()
        except OSError as error:
            raise UserError(f"{self.launch}: cannot be written ({error.strerror or error})") from None
        except RunError as error:  # the scheduler's refusal is the request's fault
            raise UserError(str(error)) from None
        for path in aside:
            shutil.rmtree(path, ignore_errors=True)
        return records

    def _write(self) -> list[Path]:
        """Write the jobs' files; returns the runs to overwrite, which are moved aside until the jobs are accepted."""
        aside = []
        for path in self.plan.clears:
            aside.append(set_aside(path))
            self.undo.callback(put_back, aside[-1])
        self._make_folder(self.launch)
        self.code = copy_package(self.launch / "code") if self.options.code == "copy" else PACKAGE.parent
        for path, text in self.plan.files.items():
            self._make_folder(path.parent)
            replace_text(path, text)
        for path, source in self.plan.links.items():
            self._make_folder(path.parent)
            keep(source, path)
        return aside

    def _make_folder(self, path: Path) -> None:
        for missing in [each for each in (*path.parents[::-1], path) if not each.exists()]:
            missing.mkdir(exist_ok=True)
            if missing.name == "launch" or self.launch in missing.parents:
                self.undo.callback(shutil.rmtree, missing, ignore_errors=True)
            else:
                self.undo.callback(_remove_empty, missing)

    def _records(self, number: int, runner: list[int]) -> list[Record]:
        return [
            Record(
                job=job,
                launch=number,
                group=group.name,
                cluster="slurm" if self.options.on_slurm else "local",
                command=list(command.arguments),
                nodes=self.settings[group.name].nodes,
                tasks=self.settings[group.name].tasks,
                run=command.run,
                after=self._dependencies(group),
                runner=runner,
                time=time.time(),
            )
            for group in self.plan.groups
            for job, command in zip(self.submitted[group.name], self.commands[group.name])
        ]

    def _dependencies(self, group: Group) -> list[str]:
        return [job for name in group.after for job in self.submitted[name]]

    def _commands(self, group: Group) -> list[Command]:
        return [
            Command(
                run_verb=self.run_verb,
                arguments=arguments,
                launch=str(self.launch),
                run=run,
                evaluate=group.evaluate,
                removes=tuple(map(str, group.removes)),
                requeues=self.settings[group.name].requeues,
            )
            for arguments, run in zip(group.commands, map(str, group.runs or ("",) * len(group.commands)))
        ]

    def _submit_to_slurm(self) -> list[int]:
        """Submit every group; returns [], since on Slurm `Record.runner` is empty."""
        self.undo.callback(self._cancel)
        for group in self.plan.groups:
            after = sorted({job.partition("_")[0] for job in self._dependencies(group)}, key=int)  # arrays as a whole
            jobs, commands = self.submitted.setdefault(group.name, []), self.commands[group.name]
            for size in _array_sizes(group):
                executor = slurm.make_executor(self.launch, self.settings[group.name], self.code, after, size)
                jobs += slurm.submit(executor, commands[len(jobs) : len(jobs) + size])
        return []

    def _cancel(self) -> None:
        with contextlib.suppress(RunError, UserError):
            slurm.cancel([job for jobs in self.submitted.values() for job in jobs])

    def _start_local_runner(self, number: int) -> list[int]:
        """Write the local jobs and start their runner; returns `Record.runner`."""
        local_jobs: list[local.LocalJob] = []
        python = slurm.interpreter(self.options, self.launch, self.code)
        for group in self.plan.groups:
            options, commands = self.settings[group.name], self.commands[group.name]
            name = f"local{number}.{len(self.submitted)}"
            jobs = [name] if len(commands) == 1 else [f"{name}_{index}" for index in range(len(commands))]
            for job, command in zip(jobs, commands):
                delayed = DelayedSubmission(command)
                delayed.set_timeout(NO_TIMEOUT, options.requeues)
                delayed.dump(self.launch / f"{job}_submitted.pkl")
                local_jobs.append(
                    local.LocalJob(
                        job=job,
                        after=self._dependencies(group),
                        tasks=options.tasks,
                        gpus=options.gpus_per_node or 0,
                        seconds=60 * (options.minutes or 0),
                        signal_seconds=options.signal_seconds,
                        setup=options.setup_lines,
                        python=python,
                        trains=bool(command.run),
                    )
                )
            self.submitted[group.name] = jobs
        # Without GPUs to count by, jobs side by side would only slow each other down.
        places = self.options.max_parallel or (len(local.devices()) if self.options.gpus_per_node else 1)
        return local.begin(self.launch, number, local_jobs, places, python)


def keep(source: Path, target: Path) -> None:
    """Give a file a second name `target`, so that it survives the removal of the first: a hard link, else a copy."""
    aside = target.with_name(f"{target.name}.part")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    os.replace(aside, target)


def _array_sizes(group: Group) -> list[int]:
    """Sizes of the arrays that a group's jobs are submitted in."""
    size, count = slurm.max_array_size(), len(group.commands)
    return [min(size, count - first) for first in range(0, count, size)]


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
