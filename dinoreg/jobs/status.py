"""The status of jobs in words, from the scheduler, the job's own events and the progress of its run."""

import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.jobs import local_queue as local
from dinoreg.jobs import slurm
from dinoreg.jobs.records import (
    JOBS,
    Record,
    cancel_file,
    last_lines,
    launch_folder,
    log_files,
    read_events,
    read_records,
)
from dinoreg.runtime.durations import clock
from dinoreg.runtime.environment import is_alive
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import is_number, parsed_object, pointed_step, read_json, read_text

# Slurm's reasons in plain words, where its own are not.
REASONS = {
    "Resources": "waits for free machines",
    "Priority": "others come first",
    "Dependency": "waits for {after}",
    "BeginTime": "was requeued, may start at {begins}",
    "JobArrayTaskLimit": "waits for other tasks of its array",
    "JobHeldUser": "held; scontrol release {job} lets it go",
    "PartitionTimeLimit": "time= is above the partition's limit",
    "PartitionNodeLimit": "nodes= is above the partition's limit",
    "ReqNodeNotAvail": "the machines it needs are down or reserved",
}
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
ENDINGS = {
    "TIMEOUT": "killed at its time limit",
    "OUT_OF_MEMORY": "killed for want of memory (mem=)",
    "NODE_FAIL": "its machine was lost",
    "PREEMPTED": "preempted, and not requeued",
    "FAILED": "",
}
TIMES = {1: "once", 2: "twice"}


@dataclass(frozen=True)
class JobStatus:
    """The status of a job.

    state  "pending" | "running" | "finished" | "stopped" | "failed" | "cancelled" | "lost"
    text   details for the user
    """

    record: Record
    state: str
    text: str

    @property
    def is_over(self) -> bool:
        """Whether the job has ended and will not run again."""
        return self.state not in ("pending", "running")

    @property
    def is_well(self) -> bool:
        """Whether the job is pending, running or has succeeded."""
        return self.state in ("pending", "running", "finished")

    @property
    def line(self) -> str:
        """The job, its title, state and details in one line."""
        return f"{self.record.job}  {self.record.title}: {self.state}{self.text and f', {self.text}'}"


def examine(folder: str | Path, records: Sequence[Record] | None = None) -> list[JobStatus]:
    """The status of jobs of a folder (None: of all that were launched for it; UserError without any).

    raises  RunError when the scheduler does not answer
    """
    if records is None:
        records = read_records(folder)
        if not records:
            raise UserError(f"{folder}: nothing was launched for this folder (no {launch_folder(folder) / JOBS})")
    states: dict[str, slurm.JobState] = {}
    note = ""
    slurm_jobs = [record.job for record in records if record.cluster == "slurm"]
    if slurm_jobs and shutil.which("squeue"):
        states = slurm.states(slurm_jobs)
    elif slurm_jobs:
        note = "there is no squeue on this machine's PATH"
    return [_status_of(launch_folder(folder), record, states.get(record.job), note) for record in records]


def describe(folder: str | Path) -> list[str]:
    """The lines that `dinoreg launch status` prints; earlier launches whose jobs have all ended get one line each."""
    statuses = examine(folder)
    newest = max(each.record.launch for each in statuses)
    lines = []
    for number in sorted({each.record.launch for each in statuses}):
        jobs = [each for each in statuses if each.record.launch == number]
        if number == newest or any(not each.is_over for each in jobs):
            lines += [each.line for each in jobs]
        else:
            counts = ", ".join(f"{count} {state}" for state, count in Counter(each.state for each in jobs).items())
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(jobs[0].record.time))
            lines.append(f"launch {number} ({jobs[0].record.group}, {when}): {counts}")
    return lines


def _status_of(launch: Path, record: Record, known: slurm.JobState | None, note: str) -> JobStatus:
    events = read_events(launch, record.job)
    restarts = _restarts(events)
    if record.cluster == "local":
        known = _local_state(launch, record)
    if known is None:
        state, text = _ending(events, ("lost", "the scheduler knows it no more, and it wrote no ending"))
        parts = [text, note]
    elif known.state in PENDING:
        state, parts = "pending", [_reason(record, known), restarts]
    elif known.state in RUNNING:
        phase = "" if known.state == "RUNNING" else known.state.lower()
        place = " ".join(filter(None, (known.nodes and f"on {known.nodes}", known.elapsed and f"for {known.elapsed}")))
        ending = "asked to end" if cancel_file(launch, record.job).exists() else ""
        state, parts = "running", [phase, place, progress(record), restarts, ending]
    elif known.state == "COMPLETED":
        state, text = _ending(events, ("finished", ""))
        parts = [text, restarts]
    elif known.state == "CANCELLED":
        state, parts = "cancelled", [_last_save(record, events), restarts]
    elif known.state == "GONE":
        state = "lost"
        parts = ["its process is gone without an ending: the machine was restarted, or it was killed"]
    else:
        state, parts = "failed", [ENDINGS.get(known.state, known.state), failure(launch, record, events), restarts]
    return JobStatus(record, state, ", ".join(filter(None, parts)))


def _local_state(launch: Path, record: Record) -> slurm.JobState:
    content = local.read_state(launch, record.job)
    state, begun = str(content["state"]), content["begun"]
    if state not in local.ENDED and not (len(record.runner) == 2 and is_alive(*record.runner)):
        state = "GONE"
    elapsed = clock(time.time() - begun) if state == "RUNNING" and is_number(begun) else ""
    reason = "Dependency" if record.after else "Resources"
    return slurm.JobState(state, reason if state == "PENDING" else "", "", elapsed)


def _reason(record: Record, known: slurm.JobState) -> str:
    reason = known.reason.partition(",")[0].strip("() ")
    if reason in REASONS:
        after = ", ".join(dict.fromkeys(job.partition("_")[0] for job in record.after)) or "another job"
        begins = known.begins.replace("T", " ") or "a moment"
        return REASONS[reason].format(after=after, begins=begins, job=record.job)
    return reason


def _ending(events: Sequence[dict[str, Any]], otherwise: tuple[str, str]) -> tuple[str, str]:
    """(state, text) from the last ending that the job wrote, or `otherwise` where it wrote none."""
    endings = {"end": "finished", "stopped": "stopped", "failed": "failed"}
    lines = [line for line in events if line["event"] in endings]
    if not lines:
        return otherwise
    return endings[lines[-1]["event"]], str(lines[-1].get("why") or lines[-1].get("error") or "")


def failure(launch: Path, record: Record, events: Sequence[dict[str, Any]]) -> str:
    """The reason why a job failed, on one line: its recorded error, else the last line of its log."""
    starts = [line["time"] for line in events if line["event"] == "start"]
    failures = [line for line in events if line["event"] == "failed" and line["time"] >= max(starts, default=0)]
    if failures:
        line = next((line for line in failures if not line.get("reported")), failures[0])
        rank = f"rank {line['rank']}: " if record.tasks * record.nodes > 1 and line["rank"] else ""
        return f"{rank}{line.get('error', '')}"
    for task in range(record.tasks * record.nodes):
        for path in log_files(launch, record.job, task):
            lines = [line.strip() for line in last_lines(path, 40)]
            own = [line for line in lines if line and not re.match(r"(srun|slurmstepd|submitit)\b|\*\*\* ", line)]
            slurms = [line for line in lines if line.startswith(("slurmstepd: error", "srun: error"))]
            if own or slurms:
                return f"{(own or slurms)[-1]} ({path})"
    where = "" if record.cluster == "local" else f"; do the machines share the disk of {launch}?"
    return f"it ended before it wrote a line{where}"


def _last_save(record: Record, events: Sequence[dict[str, Any]]) -> str:
    stopped = [line for line in events if line["event"] == "stopped"]
    if stopped:
        return str(stopped[-1].get("why", ""))
    step = pointed_step(record.run, "last") if record.run else None
    return f"saved at step {step}" if step else ""


def progress(record: Record) -> str:
    """The progress of a training: "step 1200 of 5000, 35.2 images/s, 1:02:03 left, attention sdpa"; "" for others."""
    if not record.run:
        return ""
    state = read_json(Path(record.run) / "status.json")
    metrics: dict[str, Any] = {}
    for line in last_lines(Path(record.run) / "metrics.jsonl", 2):
        metrics = parsed_object(line) or metrics  # the last may be half written
    step, total = metrics.get("step", state.get("step")), state.get("num_steps")
    if not isinstance(step, int) or not isinstance(total, int):
        return "not training yet"
    text = f"step {step} of {total}"
    if is_number(metrics.get("images_per_second")):
        text += f", {metrics['images_per_second']:.1f} images/s"
    if is_number(metrics.get("step_time")):
        text += f", {clock((total - step) * metrics['step_time'])} left"
    if headers := re.findall(r" M parameters, .*, attention (\w+)", read_text(Path(record.run) / "train.log")):
        text += f", attention {headers[-1]}"
    return text


def _restarts(events: Sequence[dict[str, Any]]) -> str:
    counts = (line.get("restarts") for line in events if line["event"] == "start")
    count = max((count for count in counts if type(count) is int), default=0)
    return f"requeued {TIMES.get(count, f'{count} times')}" if count else ""


def require_jobs(folder: str | Path, job: str | None) -> list[JobStatus]:
    """The status of all jobs of a folder, or of job `job` (of an array: of all its elements); UserError without any."""
    statuses = examine(folder)
    if job is None:
        return statuses
    named = [each for each in statuses if job in (each.record.job, each.record.job.partition("_")[0])]
    if not named:
        known = ", ".join(dict.fromkeys(each.record.job for each in statuses))
        raise UserError(f"job={job}: no job of {folder}; known: {known[:300]}")
    return named
