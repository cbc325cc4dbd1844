"""Jobs that are there: follow them to their end, read their logs, end them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dinoreg.jobs import slurm
from dinoreg.jobs.records import Record, cancel_file, last_lines, launch_folder, log_files
from dinoreg.jobs.status import JobStatus, examine, require_jobs
from dinoreg.runtime.errors import RunError, UserError

POLL_SECONDS, MAX_POLL_SECONDS = 1.0, 30.0
LOG_SECONDS = 0.5


def follow(folder: Path, records: Sequence[Record], say: Callable[[str], None]) -> list[JobStatus]:
    """Say what changes until all jobs are over; returns how they ended. Ctrl-C ends the following, not the jobs."""
    printed: dict[str, str] = {}
    pause = POLL_SECONDS
    while True:
        found = examine(folder, records)
        for each in found:
            # Progress changes all the time; a line is worth printing when the state does, or at a slow poll.
            known = each.state if pause < MAX_POLL_SECONDS or each.is_over else each.line
            if printed.get(each.record.job) != known:
                printed[each.record.job] = known
                say(each.line)
        if all(each.is_over for each in found):
            return found
        time.sleep(pause)
        pause = min(MAX_POLL_SECONDS, pause * 1.2)


def failed(found: Sequence[JobStatus]) -> RunError | None:
    """The failure of one job, or the number of those that failed."""
    bad = [each for each in found if not each.is_well]
    if not bad:
        return None
    if len(bad) == 1:
        return RunError(f"job {bad[0].line}")
    return RunError(f"{len(bad)} of {len(found)} jobs did not finish; the first: {bad[0].line}")


def show_logs(folder: str, job: str | None, task: int, lines: int, follows: bool, write: Callable[[str], None]) -> None:
    """Print the end of a job's log, and what is added to it until the job is over.

    job  None: one that runs, else one that failed, else the last that wrote anything
    """
    chosen = _choose(folder, require_jobs(folder, job))
    launch = launch_folder(folder)
    record = chosen.record
    if not 0 <= task < record.nodes * record.tasks:
        raise UserError(f"task={task}: job {record.job} has tasks 0 to {record.nodes * record.tasks - 1}")
    paths = [path for path in log_files(launch, record.job, task) if path.is_file()]
    write(f"job {chosen.line}\n")
    if not paths and not follows:
        write(f"no log yet; it will be {log_files(launch, record.job, task)[0]}\n")
    places: dict[Path, int] = {}
    for path in paths:
        places[path] = path.stat().st_size
        if places[path]:
            write(f"== {path}\n" + "".join(f"{line}\n" for line in last_lines(path, lines)))
    if follows:
        _tail(folder, record, list(log_files(launch, record.job, task)), places, write)


def _choose(folder: str, found: Sequence[JobStatus]) -> JobStatus:
    launch = launch_folder(folder)
    for wanted in (lambda each: each.state == "running", lambda each: each.state == "failed"):
        for each in reversed(found):
            if wanted(each):
                return each
    written = [each for each in found if any(path.is_file() for path in log_files(launch, each.record.job))]
    return (written or list(found))[-1]


def _tail(
    folder: str, record: Record, paths: Sequence[Path], places: dict[Path, int], write: Callable[[str], None]
) -> None:
    checked = time.monotonic()
    over = False
    while True:
        for path in paths:
            if path.is_file() and path.stat().st_size > places.get(path, 0):
                with open(path, "rb") as file:
                    file.seek(places.get(path, 0))
                    new = file.read()
                places[path] = places.get(path, 0) + len(new)
                write(new.decode(errors="replace"))
        if over:
            return
        if time.monotonic() - checked > 5:
            checked = time.monotonic()
            over = examine(folder, [record])[0].is_over
        time.sleep(LOG_SECONDS)


def cancel(folder: str, job: str | None, save: bool, say: Callable[[str], None]) -> None:
    """End what is pending or running, dependents first so that they do not start.

    save  trainings that run are asked to save and end by themselves, however long that takes; otherwise they save if
          they can within the time that the site leaves between SIGTERM and SIGKILL
    """
    launch = launch_folder(folder)
    live = [each for each in require_jobs(folder, job) if not each.is_over]
    if not live:
        say("nothing to cancel: all jobs are over")
        return
    live.sort(key=lambda each: (each.state == "running", not each.record.after))
    at_once = []
    for each in live:
        record = each.record
        waits = save and each.state == "running" and bool(record.run)
        cancel_file(launch, record.job).write_text("save\n" if waits else "now\n")
        if record.cluster == "slurm":
            if waits:
                slurm.ask_to_save(record.job)
            else:
                at_once.append(record.job)
        how = "asked to save and end" if waits else "cancelled"
        say(f"{record.job}  {record.title}: {how}")
    if at_once:
        slurm.cancel(at_once)
