"""How jobs are doing, in words: what the scheduler says, what the job wrote about itself, how far the run has come."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.jobs import local_queue as local
from dinoreg.jobs import slurm
from dinoreg.jobs.records import (
    Record,
    cancel_file,
    last_lines,
    launch_folder,
    log_files,
    read_events,
    read_records,
)
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import read_json

# Slurm's reasons, as people say them.
REASONS = {
    "Resources": "waits for free machines",
    "Priority": "others come first",
    "Dependency": "waits for {after}",
    "BeginTime": "was requeued, may start at {begins}",
    "JobArrayTaskLimit": "waits for other tasks of its array",
    "JobHeldUser": "held; scontrol release {job} lets it go",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "time= is above the partition's limit",
    "PartitionNodeLimit": "nodes= is above the partition's limit",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs",
    "ReqNodeNotAvail": "the machines it needs are down or reserved",
    "Nodes_required_for_job_are_DOWN": "the machines it needs are down",
    "DependencyNeverSatisfied": "waits for a job that will not come",
    "AssocGrpGRES": "the account's GPUs are all in use",
}
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
ENDINGS = {
    "TIMEOUT": "killed at its time limit",
    "OUT_OF_MEMORY": "killed for want of memory (mem=)",
    "NODE_FAIL": "its machine was lost",
    "DEADLINE": "its deadline passed",
    "BOOT_FAIL": "its machine did not start",
    "PREEMPTED": "preempted, and not requeued",
}
TIMES = {1: "once", 2: "twice"}


@dataclass(frozen=True)
class JobStatus:
    """A job now. `state` is pending | running | finished | stopped | failed | cancelled | lost; `text` says more."""

    record: Record
    state: str
    text: str

    @property
    def is_over(self) -> bool:
        return self.state not in ("pending", "running")

    @property
    def is_well(self) -> bool:
        return self.state in ("pending", "running", "finished")

    @property
    def line(self) -> str:
        return f"{self.record.job}  {self.record.title}: {self.state}{self.text and f', {self.text}'}"


def examine(folder: str | Path, records: Sequence[Record] | None = None) -> list[JobStatus]:
    """Every job launched for a folder; only those of its last launch that matter where it was launched often."""
    records = read_records(folder) if records is None else records
    known: dict[str, slurm.JobState] = {}
    note = ""
    wanted = [record.job for record in records if record.cluster == "slurm"]
    if wanted and shutil.which("squeue"):
        known = slurm.states(wanted)
    elif wanted:
        note = "there is no squeue on this machine's PATH"
    return [_status_of(launch_folder(folder), record, known.get(record.job), note) for record in records]


def describe(folder: str | Path) -> list[str]:
    """What `dinoreg launch status` prints. Of finished launches but the last, one line each."""
    found = examine(folder)
    newest = max(each.record.launch for each in found)
    lines = []
    for number in sorted({each.record.launch for each in found}):
        jobs = [each for each in found if each.record.launch == number]
        if number == newest or any(not each.is_over for each in jobs):
            lines += [each.line for each in jobs]
        else:
            words = [each.state for each in jobs]
            counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(jobs[0].record.time))
            lines.append(f"launch {number} ({jobs[0].record.kind}, {when}): {counts}")
    return lines


def _status_of(launch: Path, record: Record, known: slurm.JobState | None, note: str) -> JobStatus:
    events = read_events(launch, record.job)
    restarts = _restarts(events)
    if record.cluster == "local":
        known = _local_state(launch, record)
    if known is None:
        state, text = _from_events(launch, record, events)
        return JobStatus(record, state, _join(text, note))
    slurm_state = known.state
    if slurm_state in PENDING:
        return JobStatus(record, "pending", _join(_reason(record, known), restarts))
    if slurm_state in RUNNING:
        where = f"on {known.nodes}" if known.nodes else ""
        spent = f"{where} for {known.elapsed}".strip() if known.elapsed else where
        ending = "" if slurm_state == "RUNNING" else slurm_state.lower()
        wish = "asked to end" if cancel_file(launch, record.job).exists() else ""
        return JobStatus(record, "running", _join(ending, spent, progress(record), restarts, wish))
    if slurm_state == "COMPLETED":
        state, text = _from_events(launch, record, events, "finished")
        return JobStatus(record, state, _join(text, restarts))
    if slurm_state.startswith("CANCELLED"):
        return JobStatus(record, "cancelled", _join(_last_save(record, events), restarts))
    if slurm_state == "GONE":
        return JobStatus(
            record, "lost", "its process is gone without an ending: the machine was restarted, or it was killed"
        )
    return JobStatus(record, "failed", _join(ENDINGS.get(slurm_state, ""), failure(launch, record, events), restarts))


def _local_state(launch: Path, record: Record) -> slurm.JobState:
    content = local.read_state(launch, record.job)
    state = str(content["state"])
    if state not in local.ENDED and not local.is_alive(record.runner):
        state = "GONE"
    begun = content.get("begun")
    elapsed = clock(time.time() - begun) if state == "RUNNING" and isinstance(begun, (int, float)) else ""
    reason = "Dependency" if record.after else "Resources"
    return slurm.JobState(state, reason if state == "PENDING" else "", "", elapsed)


def _reason(record: Record, known: slurm.JobState) -> str:
    reason = known.reason.partition(",")[0].strip("() ")
    if reason in REASONS:
        after = ", ".join(dict.fromkeys(job.partition("_")[0] for job in record.after)) or "another job"
        begins = known.begins.replace("T", " ") or "a moment"
        return REASONS[reason].format(after=after, begins=begins, job=record.job)
    return reason


def _from_events(
    launch: Path, record: Record, events: Sequence[dict[str, Any]], otherwise: str = "lost"
) -> tuple[str, str]:
    """(state, text) from what the job wrote last."""
    last = next((line for line in reversed(events) if line["event"] in ("end", "stopped", "failed")), None)
    if last is None:
        return otherwise, "" if otherwise != "lost" else "the scheduler knows it no more, and it wrote no ending"
    if last["event"] == "end":
        return "finished", ""
    if last["event"] == "stopped":
        return "stopped", str(last.get("why", ""))
    return "failed", str(last.get("error", ""))


def failure(launch: Path, record: Record, events: Sequence[dict[str, Any]]) -> str:
    """Why a job failed, in one line: its own words, else the last of its log."""
    starts = [line["time"] for line in events if line["event"] == "start"]
    own = [line for line in events if line["event"] == "failed" and line["time"] >= max(starts, default=0)]
    if own:
        line = next((line for line in own if not line.get("reported")), own[0])
        rank = f"rank {line['rank']}: " if record.tasks * record.nodes > 1 and line["rank"] else ""
        return f"{rank}{line.get('error', '')}"
    for task in range(record.tasks * record.nodes):
        for path in log_files(launch, record.job, task):
            lines = [line.strip() for line in last_lines(path, 40)]
            words = [line for line in lines if line and not re.match(r"(srun|slurmstepd|submitit)\b|\*\*\* ", line)]
            said = [line for line in lines if line.startswith(("slurmstepd: error", "srun: error"))]
            if words or said:
                return f"{(words or said)[-1]} ({path})"
    where = "" if record.cluster == "local" else f"; do the machines share the disk of {launch}?"
    return f"it ended before it wrote a line{where}"


def _last_save(record: Record, events: Sequence[dict[str, Any]]) -> str:
    stopped = [line for line in events if line["event"] == "stopped"]
    if stopped:
        return str(stopped[-1].get("why", ""))
    step = saved_step(record.run) if record.run else None
    return f"saved at step {step}" if step else ""


def saved_step(run: str | Path) -> int | None:
    """The step that a run would go on from; None where nothing is saved."""
    try:
        found = re.fullmatch(r"step_(\d+)", (Path(run) / "checkpoints" / "last").read_text().strip())
    except OSError:
        return None
    return int(found[1]) if found else None


def progress(record: Record) -> str:
    """How far a training is: "step 1200 of 5000, 35.2 images/s, 1:02:03 left"; "" for other jobs."""
    if not record.run:
        return ""
    state = read_json(Path(record.run) / "status.json")
    metrics: dict[str, Any] = {}
    for line in last_lines(Path(record.run) / "metrics.jsonl", 2):
        with contextlib.suppress(ValueError):
            metrics = json.loads(line)
    step, total = metrics.get("step", state.get("step")), state.get("num_steps")
    if not isinstance(step, int) or not isinstance(total, int):
        return "not training yet"
    words = [f"step {step} of {total}"]
    if isinstance(metrics.get("images_per_second"), (int, float)):
        words.append(f"{metrics['images_per_second']:.1f} images/s")
    if isinstance(metrics.get("step_time"), (int, float)):
        words.append(f"{clock((total - step) * metrics['step_time'])} left")
    return ", ".join(words)


def _restarts(events: Sequence[dict[str, Any]]) -> str:
    count = max((int(line.get("restarts", 0)) for line in events if line["event"] == "start"), default=0)
    return f"requeued {TIMES.get(count, f'{count} times')}" if count else ""


def clock(seconds: float) -> str:
    """3:20, 1:02:03 or 2-01:02:03, as Slurm shows durations."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def require_jobs(folder: str | Path, job: str | None) -> list[JobStatus]:
    """The jobs of a folder, or the one that was named (an array: all its elements); UserError when there is none."""
    found = examine(folder)
    if job is None:
        return found
    named = [each for each in found if each.record.job == job or each.record.job.partition("_")[0] == job]
    if not named:
        known = ", ".join(dict.fromkeys(each.record.job for each in found))
        raise UserError(f"job={job}: no job of {folder}; known: {known[:300]}")
    return named
