"""`dinoreg launch`: submitting jobs, and `status`, `logs` and `cancel` for submitted ones.

`dinoreg.jobs` handles clusters, independent of the commands that jobs run; this module passes it the functions that
check and run them.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from dinoreg.commands.arguments import check_early, is_key_value, read_options, split_arguments
from dinoreg.commands.options import ACTIONS, CancelOptions, LogsOptions
from dinoreg.commands.registry import VERBS, run_verb
from dinoreg.jobs import control, status
from dinoreg.jobs.job_type import Request, find_job, job_files
from dinoreg.jobs.options import OPTION_NAMES, split_options
from dinoreg.jobs.records import read_records
from dinoreg.jobs.slurm import outside_job
from dinoreg.jobs.submit import command_line, launch
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import pointed_step
from dinoreg.runtime.printable import printable


def _say(text: str, end: str = "\n") -> None:
    print(printable(text, keep="\n\r\t"), end=end, flush=True)


def launch_command(*arguments: str) -> None:
    """Run `dinoreg launch ARGUMENTS`.

    raises  UserError for wrong arguments, with nothing written or submitted; with wait=true RunError for failed jobs
    """
    jobs = job_files()
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"launch: missing JOB; expected {', '.join([*jobs, *ACTIONS])}, or a .py of your own")
    name, *rest = arguments
    close = get_close_matches(name, ACTIONS, n=1, cutoff=0.75)
    if name in ACTIONS:
        _act(name, rest)
    elif close and name not in jobs:
        raise UserError(f"launch: {name}: unknown job; did you mean {close[0]}?")
    else:
        _launch(name, rest)


def _launch(name: str, arguments: Sequence[str]) -> None:
    job = find_job(name)
    plain, keys = split_arguments(arguments)
    if len(plain) > 1:
        raise UserError(f"launch {job.name}: {plain[1]}: expected key=value; usage: dinoreg launch {job.usage}")
    options, overrides, given = split_options(keys)
    if job.source and not plain:
        raise UserError(f"launch {job.name}: missing {job.source}")
    request = Request("".join(plain), tuple(overrides), options, given, check_command)
    try:
        folder, records = launch(job, request, run_verb, _say)
    except UserError as error:
        key, unknown, _ = str(error).partition(": unknown key")
        close = get_close_matches(key, OPTION_NAMES, n=1, cutoff=0.75) if unknown else []
        raise UserError(f"{key}: unknown key; did you mean {close[0]}?") if close else error from None
    if options.dry_run:
        return
    for group in dict.fromkeys(record.group for record in records):
        jobs = [record for record in records if record.group == group]
        names = jobs[0].job if len(jobs) == 1 else f"{jobs[0].job} to {jobs[-1].job}"
        _say(f"submitted: {group}, job {names}: {command_line(jobs[0].command)}{' …' if len(jobs) > 1 else ''}")
    _say(f"dinoreg launch status {folder}")
    if options.wait:
        try:
            control.follow(folder, records, _say)
        except KeyboardInterrupt:
            _say(f"the jobs go on; dinoreg launch cancel {folder} ends them")
            raise


def check_command(arguments: Sequence[str]) -> None:
    """UserError for a command line, from the verb on, that its verb would refuse at once; nothing is started."""
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(f"{verb}: unknown verb; a job runs one of {', '.join(VERBS)}")
    with outside_job():
        check_early(VERBS[verb].parse(rest))


def _act(name: str, arguments: Sequence[str]) -> None:
    folders, options = read_options(ACTIONS[name], arguments, positional=None)
    if len(folders) != 1:
        problem = "missing RUN, the folder of the launch" if not folders else f"{folders[1]}: one folder at a time"
        raise UserError(f"launch {name}: {problem}")
    if isinstance(options, LogsOptions):
        control.show_logs(folders[0], options.job, options.task, options.lines, options.follow, partial(_say, end=""))
    elif isinstance(options, CancelOptions):
        control.cancel(folders[0], options.job, options.save, _say)
    else:
        from dinoreg.checkpoint.steps import which_steps

        _say("\n".join(status.describe(folders[0])))
        for run in dict.fromkeys(record.run for record in read_records(folders[0]) if record.run):
            if pointed_step(run, "last") is not None:
                _say(which_steps(Path(run)))
