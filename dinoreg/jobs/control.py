"""Submitted jobs: follow them to their end, read their logs, cancel them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dinoreg.jobs import slurm
from dinoreg.jobs.records import Record, cancel_file, last_lines, launch_folder, log_files
from dinoreg.jobs.status import JobStatus, examine, require_jobs
from dinoreg.runtime.errors import RunError, UserError

POLL_SECONDS, MAX_POLL_SECONDS = 1.0, 30.0
LOG_SECONDS = 3.0


def follow(folder: Path, records: Sequence[Record], say: Callable[[str], None]) -> None:
    """Print changes of state until all jobs have ended. Ctrl-C leaves the jobs running.

    folder   that the jobs were launched for
    records  the jobs to follow
    say      prints a line
    raises   RunError, naming the first, where jobs have failed or were stopped or cancelled
    """
    printed: dict[str, str] = {}
    pause = POLL_SECONDS
    while True:
        statuses = examine(folder, records)
        for each in statuses:
            # Progress changes all the time; a line is worth printing when the state does, or at a slow poll.
            news = each.state if pause < MAX_POLL_SECONDS or each.is_over else each.line
            if printed.get(each.record.job) != news:
                printed[each.record.job] = news
                say(each.line)
        if all(each.is_over for each in statuses):
            break
        time.sleep(pause)
        pause = min(MAX_POLL_SECONDS, pause * 1.2)
    failed = [each for each in statuses if not each.is_well]
    if failed:
        which = "job" if len(failed) == 1 else f"{len(failed)} of {len(statuses)} jobs did not finish; the first:"
        raise RunError(f"{which} {failed[0].line}")


def show_logs(folder: str, job: str | None, task: int, lines: int, follows: bool, write: Callable[[str], None]) -> None:
    """Print the end of a job's log, and optionally what is added to it until the job has ended.

    folder   that the job was launched for
    job      None: one that runs, else one that failed, else the last with a log
    task     number of a process of the job, from 0
    lines    to print of the end of each file
    follows  whether to print what is added
    write    prints text
    raises   UserError for a folder, job or task that does not exist
    """
    launch = launch_folder(folder)
    chosen = _choose(launch, require_jobs(folder, job))
    record = chosen.record
    if not 0 <= task < record.nodes * record.tasks:
        raise UserError(f"task={task}: job {record.job} has tasks 0 to {record.nodes * record.tasks - 1}")
    paths = log_files(launch, record.job, task)
    write(f"job {chosen.line}\n")
    if not follows and not any(path.is_file() for path in paths):
        write(f"no log yet; it will be {paths[0]}\n")
    offsets = {path: path.stat().st_size if path.is_file() else 0 for path in paths}
    for path, size in offsets.items():
        if size:
            write(f"== {path}\n" + "".join(f"{line}\n" for line in last_lines(path, lines)))
    if follows:
        _tail(folder, record, offsets, write)


def _choose(launch: Path, statuses: Sequence[JobStatus]) -> JobStatus:
    running = [each for each in statuses if each.state == "running"]
    failed = [each for each in statuses if each.state == "failed"]
    logged = [each for each in statuses if any(path.is_file() for path in log_files(launch, each.record.job))]
    return (running or failed or logged or statuses)[-1]


def _tail(folder: str, record: Record, offsets: dict[Path, int], write: Callable[[str], None]) -> None:
    """Write what comes into the files after their offsets, until the job is over."""
    over = False
    while not over:
        over = examine(folder, [record])[0].is_over  # before the files are read: nothing comes after it
        for path, offset in offsets.items():
            if path.is_file() and path.stat().st_size > offset:
                with open(path, "rb") as file:
                    file.seek(offset)
                    added = file.read()
                offsets[path] = offset + len(added)
                write(added.decode(errors="replace"))
        if not over:
            time.sleep(LOG_SECONDS)


def cancel(folder: str, job: str | None, save: bool, say: Callable[[str], None]) -> None:
    """Cancel pending and running jobs, dependents first so that they do not start.

    job     None: all jobs of the folder
    save    ask running trainings to save and end, however long that takes; otherwise they save if they can within the
            site's time between SIGTERM and SIGKILL
    say     prints a line
    raises  UserError for a folder or job that does not exist, RunError when the scheduler refuses
    """
    live = [each for each in require_jobs(folder, job) if not each.is_over]
    if not live:
        say("nothing to cancel: all jobs are over")
    terminated = []
    for each in sorted(live, key=lambda each: (each.state == "running", not each.record.after)):
        record = each.record
        saves = save and each.state == "running" and bool(record.run)
        cancel_file(launch_folder(folder), record.job).write_text("save\n" if saves else "now\n")
        if record.cluster == "slurm" and saves:
            slurm.cancel([record.job], "--signal=USR2")
        elif record.cluster == "slurm":
            terminated.append(record.job)
        say(f"{record.job}  {record.title}: {'asked to save and end' if saves else 'cancelled'}")
    slurm.cancel(terminated)
