"""Slurm: what the site offers, submission through submitit, and the states of jobs in Slurm's own terms."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from dinoreg.config.option import nearest
from dinoreg.jobs import entry as start
from dinoreg.jobs.options import LaunchOptions
from dinoreg.runtime.errors import RunError, UserError

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
DEFAULT_ARRAY_SIZE = 1001
ANSWER_SECONDS = 60


@dataclass(frozen=True)
class JobState:
    """A job as Slurm tells it.

    state    PENDING, RUNNING, COMPLETED, FAILED, …
    reason   why it is pending, or has ended
    elapsed  running time of this start, as 3:20 or 1-02:03:04
    begins   when a pending job is expected to start, "" where Slurm does not know
    """

    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    begins: str = ""


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; UserError when it is not there, RunError when it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise UserError(f"cluster=slurm: there is no {command[0]} on the PATH") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]} did not answer within {ANSWER_SECONDS} s") from None


def require(options: LaunchOptions) -> None:
    """UserError in one line where there is no Slurm, or no such partition."""
    for name in PROGRAMS:
        if shutil.which(name) is None:
            raise UserError(
                f"cluster=slurm: there is no {name} on the PATH; use a machine of the cluster, or cluster=local"
            )
    answer = ask("sinfo", "-a", "-h", "-o", "%R")
    if answer.returncode:
        raise UserError(f"cluster=slurm: sinfo failed: {_words(answer.stderr)}")
    known = sorted(set(answer.stdout.split()))
    for name in (options.partition or "").split(","):
        if name and name not in known:
            raise UserError(f"partition={name}: unknown here{nearest(name, known)}; known: {', '.join(known)}")


def max_array_size() -> int:
    """Jobs that one array may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config").stdout)
    return max(1, int(found[1])) if found else DEFAULT_ARRAY_SIZE


# ------------------------------------------------------------------------------------------------------------
# Submission


def executor(
    launch: Path, options: LaunchOptions, name: str, code: Path, after: Sequence[str] = (), size: int = 1
) -> submitit.SlurmExecutor:
    """submitit's executor for one job, or an array of `size`, that asks for what `options` say."""
    made = submitit.SlurmExecutor(launch, max_num_timeout=options.requeues, python=interpreter(options, launch, code))
    srun_args = ["--kill-on-bad-exit=1"]
    if options.cpus_per_task:  # srun does not take it over from sbatch
        srun_args.append(f"--cpus-per-task={options.cpus_per_task}")
    if options.container and not _is_apptainer(options.container):
        mounts = ",".join(dict.fromkeys([*_own_mounts(launch, code), *options.mounts]))
        srun_args += [f"--container-image={options.container}", f"--container-mounts={mounts}"]
        srun_args.append(f"--container-workdir={Path.cwd()}")
    extra: dict[str, Any] = {"requeue": True}
    if options.reservation:
        extra["reservation"] = options.reservation
    for item in options.extra_args:
        key, separator, value = item.partition("=")
        extra[key] = value if separator else True
    made.update_parameters(
        job_name=name,
        nodes=options.nodes,
        ntasks_per_node=options.tasks,
        gpus_per_node=options.gpus_per_node or None,
        cpus_per_task=options.cpus_per_task,
        mem=options.mem,
        time=options.minutes,
        signal_delay_s=options.signal_seconds,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        constraint=options.constraint,
        exclude=options.exclude,
        dependency=f"afterany:{':'.join(after)}" if after else None,
        array_parallelism=options.max_parallel or size,
        setup=options.setup_lines or None,
        teardown=_requeue_from_outside(launch) if options.container else None,
        srun_args=srun_args,
        wckey=None,  # submitit's default is a key that a site need not know
        additional_parameters=extra,
    )
    return made


def script(made: submitit.SlurmExecutor, size: int = 1) -> str:
    """The file that sbatch will get."""
    held = dict(made.parameters)
    try:
        if size > 1:
            made.parameters["map_count"] = size
        return made._make_submission_file_text(made._submitit_command_str, "")
    finally:
        made.parameters = held


def submit(made: submitit.SlurmExecutor, commands: Sequence[Callable[[], Any]]) -> list[str]:
    """Submit one job, or an array; returns the jobs' names. RunError with sbatch's own words when it refuses."""
    # A job that submits another must not hand on what Slurm told it about itself; SLURM_CONF is the site's.
    conf = os.environ.get("SLURM_CONF")
    unsaid = io.StringIO()  # submitit prints sbatch's words, which are in its exception, too
    try:
        with submitit.helpers.clean_env(), contextlib.redirect_stderr(unsaid):
            if conf is not None:
                os.environ["SLURM_CONF"] = conf
            jobs = made.submit_array(list(commands))
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"sbatch refused the job: {_words(str(error))}") from None
    return [job.job_id for job in jobs]


def interpreter(options: LaunchOptions, launch: Path, code: Path) -> str:
    """The shell words that start Python in a job, up to the module that is to be run."""
    place = code / "dinoreg" / "jobs" / Path(start.__file__).name
    if options.container is None:
        program = shlex.quote(options.python or sys.executable)
        return f"{' '.join([*_hold_back(), program])} {shlex.quote(str(place))}"
    words = [options.python or "python3", str(place)]
    if _is_apptainer(options.container):
        binds = ",".join(dict.fromkeys([*_own_mounts(launch, code), *options.mounts]))
        gpus = ["--nv"] if options.gpus_per_node else []
        words = ["apptainer", "exec", *gpus, "--bind", binds, options.container, *words]
    return shlex.join(words)


@lru_cache(maxsize=1)
def _hold_back() -> tuple[str, ...]:
    """Start programs with SIGUSR2 held back, where this system's `env` can: before Python's first line, too."""
    program = shutil.which("env")
    if program is None or subprocess.run([program, "--block-signal=USR2", "true"], capture_output=True).returncode:
        return ()
    return ("env", "--block-signal=USR2")


def _is_apptainer(container: str) -> bool:
    return container.endswith(".sif")


def _own_mounts(launch: Path, code: Path) -> Iterator[str]:
    for folder in (Path.cwd(), launch, code):
        yield f"{folder.resolve()}:{folder.resolve()}"


def _requeue_from_outside(launch: Path) -> list[str]:
    """An image has no scontrol: a job in it leaves a note for the batch script, which is outside."""
    name = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    note = f"{shlex.quote(str(launch.resolve()))}/{name}_requeue"
    return [
        "code=$?",
        f'if [ -e {note} ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then',
        f"  rm {note}; scontrol requeue $SLURM_JOB_ID",
        "fi",
        "exit $code",
    ]


# ------------------------------------------------------------------------------------------------------------
# Jobs that are there


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """What Slurm knows of these jobs; those it has forgotten are left out.

    squeue knows what is pending, running or has ended within minutes, sacct, where the site keeps accounts, all.
    """
    wanted = list(jobs)
    found: dict[str, JobState] = {}
    for chunk in _chunks(sorted({job.partition("_")[0] for job in wanted})):
        answer = ask("squeue", "-a", "-h", "-r", "-t", "all", "-j", ",".join(chunk), "-o", "%i|%T|%r|%N|%M|%S")
        if answer.returncode and "Invalid job id" not in answer.stderr:
            raise RunError(f"squeue failed: {_words(answer.stderr)}")
        for line in answer.stdout.splitlines():
            job, *rest = line.split("|")
            if len(rest) == 5:
                found[job] = JobState(*(text if text not in ("N/A", "None") else "" for text in rest))
    forgotten = [job for job in wanted if job not in found]
    if forgotten and shutil.which("sacct"):
        for chunk in _chunks(sorted({job.partition("_")[0] for job in forgotten})):
            form = "JobID,State,Reason,NodeList,Elapsed"
            answer = ask("sacct", "-X", "-n", "-P", "-j", ",".join(chunk), "-o", form)
            for line in answer.stdout.splitlines():
                job, *rest = line.split("|")
                if len(rest) == 4 and job in forgotten:
                    state, reason, nodes, elapsed = (text if text != "None" else "" for text in rest)
                    found[job] = JobState(state.partition(" ")[0], reason, nodes, elapsed)
    return {job: found[job] for job in wanted if job in found}


def cancel(jobs: Sequence[str]) -> None:
    """End jobs: SIGTERM, and SIGKILL after the site's KillWait."""
    for chunk in _chunks(list(jobs)):
        answer = ask("scancel", *chunk)
        if answer.returncode and "Invalid job id" not in answer.stderr:
            raise RunError(f"scancel failed: {_words(answer.stderr)}")


def ask_to_save(job: str) -> None:
    answer = ask("scancel", "--signal=USR2", job)
    if answer.returncode:
        raise RunError(f"scancel failed: {_words(answer.stderr)}")


def own_state(job: str) -> str:
    """State of the job that asks, "" where it cannot be known (no squeue in a container)."""
    with contextlib.suppress(UserError, RunError):
        return ask("squeue", "-a", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()
    return ""


def _chunks(items: Sequence[str], size: int = 200) -> Iterator[Sequence[str]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _words(text: str) -> str:
    """What a program said, in one line, without its name before each."""
    lines = [re.sub(r"^(sbatch|srun|squeue|scancel|sinfo|scontrol): ", "", line) for line in text.strip().splitlines()]
    return "; ".join(re.sub(r"^error: ", "", line) for line in lines if line)[:500] or "without a word"
