"""Slurm: the site's properties, submission through submitit, and the states of jobs in Slurm's terms."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from dinoreg.config.option import nearest
from dinoreg.jobs import entry
from dinoreg.jobs.options import PLACEMENT, LaunchOptions
from dinoreg.runtime.errors import RunError, UserError

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
DEFAULT_ARRAY_SIZE = 1001
ANSWER_SECONDS = 60


@dataclass(frozen=True)
class JobState:
    """The state of a job as the scheduler reports it.

    state    PENDING, RUNNING, COMPLETED, FAILED, …
    reason   why it is pending or has ended
    nodes    the machines it runs on, in Slurm's notation
    elapsed  running time of this start, as 3:20 or 1-02:03:04
    begins   expected start of a pending job, "" where Slurm does not know
    """

    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    begins: str = ""


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs, whatever its exit code.

    raises  UserError when it is not installed, RunError when it takes more than `ANSWER_SECONDS`
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        where = "use a machine of the cluster, or cluster=local"
        raise UserError(f"cluster=slurm: there is no {command[0]} on the PATH; {where}") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]} did not answer within {ANSWER_SECONDS} s") from None


def require(options: LaunchOptions) -> None:
    """UserError where Slurm's programs are missing or the partition does not exist; nothing for a dry run elsewhere."""
    if options.dry_run and (shutil.which("sinfo") is None or ask("sinfo", "-h").returncode):
        return
    ask("sbatch", "--version")
    answer = ask("sinfo", "-a", "-h", "-o", "%R")
    if answer.returncode:
        raise UserError(f"cluster=slurm: sinfo failed: {_one_line(answer.stderr)}")
    known = sorted(set(answer.stdout.split()))
    for name in (options.partition or "").split(","):
        if name and name not in known:
            raise UserError(f"partition={name}: unknown here{nearest(name, known)}; known: {', '.join(known)}")


def max_array_size() -> int:
    """The largest number of jobs in one array at this site."""
    config = ask("scontrol", "show", "config").stdout if shutil.which("scontrol") else ""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", config)
    return max(1, int(match[1])) if match else DEFAULT_ARRAY_SIZE


# ------------------------------------------------------------------------------------------------------------
# Submission


class Executor(submitit.SlurmExecutor):
    """submitit's, which describes jobs on a machine without Slurm, too; see `require`."""

    @classmethod
    def affinity(cls) -> int:
        """That of a machine with Slurm."""
        return 2


def make_executor(
    launch: Path, options: LaunchOptions, code: Path, after: Sequence[str] = (), size: int = 1
) -> submitit.SlurmExecutor:
    """submitit's executor for one job, or for an array of `size`, with the resources in `options`.

    launch  folder of the job's files
    code    folder with the package that it runs
    after   jobs that must have ended before
    """
    python = interpreter(options, launch, code)
    executor = Executor(launch, max_num_timeout=options.requeues, python=python)
    srun_args = ["--kill-on-bad-exit=1"]
    if options.cores:  # srun does not take it over from sbatch
        srun_args.append(f"--cpus-per-task={options.cores}")
    if options.container and not _is_apptainer(options.container):
        mounts = _mounts(options, launch, code)
        srun_args += [f"--container-image={options.container}", f"--container-mounts={mounts}"]
        srun_args.append(f"--container-workdir={Path.cwd()}")
    extra = {key: value for key in ("mem", *PLACEMENT) if (value := getattr(options, key)) is not None}
    extra["requeue"] = True
    for item in options.extra_args:
        key, separator, value = item.partition("=")
        extra[key] = value if separator else True
    executor.update_parameters(
        nodes=options.nodes,
        cpus_per_task=options.cores,
        job_name=options.name,
        ntasks_per_node=options.tasks,
        gpus_per_node=options.gpus_per_node or None,
        time=options.minutes,
        signal_delay_s=options.signal_seconds,
        dependency=f"afterany:{':'.join(after)}" if after else None,
        array_parallelism=options.max_parallel or size,
        setup=options.setup_lines or None,
        teardown=_requeue_from_outside(launch) if options.container else None,
        srun_args=srun_args,
        wckey=None,  # submitit's default is a key that a site need not know
        additional_parameters=extra,
    )
    return executor


def script(executor: submitit.SlurmExecutor, size: int = 1) -> str:
    """The batch script of an executor, for showing it; the executor must not be used afterwards."""
    if size > 1:
        executor.parameters["map_count"] = size
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(executor: submitit.SlurmExecutor, commands: Sequence[Callable[[], Any]]) -> list[str]:
    """Submit one job, or an array, and return the job ids; RunError with sbatch's message when it refuses."""
    try:  # submitit prints sbatch's message, which is in its exception, too
        with outside_job(), contextlib.redirect_stderr(io.StringIO()):
            jobs = executor.submit_array(list(commands))
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"sbatch refused the job: {_one_line(str(error))}") from None
    return [job.job_id for job in jobs]


@contextlib.contextmanager
def outside_job() -> Iterator[None]:
    """A context without the environment variables of the current job, which sbatch would take as options.

    SLURM_CONF, which belongs to the site, stays.
    """
    site = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env(["DINOREG_RESTARTS"]):
        os.environ.update(site)
        yield


def interpreter(options: LaunchOptions, launch: Path, code: Path) -> str:
    """The shell words that start Python in a job, up to the module to run; in a container where there is one."""
    script_path = code / "dinoreg" / "jobs" / Path(entry.__file__).name
    if options.container is None:
        return shlex.join([*_block_signal(), options.python or sys.executable, str(script_path)])
    words = [options.python or "python3", str(script_path)]
    if _is_apptainer(options.container):
        gpus = ["--nv"] if options.gpus_per_node else []
        words = ["apptainer", "exec", *gpus, "--bind", _mounts(options, launch, code), options.container, *words]
    return shlex.join(words)


@lru_cache(maxsize=1)
def _block_signal() -> tuple[str, ...]:
    """Shell words that start a program with SIGUSR2 blocked from the beginning; () where `env` does not support it."""
    program = shutil.which("env")
    if program is None or subprocess.run([program, "--block-signal=USR2", "true"], capture_output=True).returncode:
        return ()
    return ("env", "--block-signal=USR2")


def _is_apptainer(container: str) -> bool:
    return container.endswith(".sif")


def _mounts(options: LaunchOptions, launch: Path, code: Path) -> str:
    own = [f"{folder.resolve()}:{folder.resolve()}" for folder in (Path.cwd(), launch, code)]
    return ",".join(dict.fromkeys([*own, *(options.container_mounts or ())]))


def _requeue_from_outside(launch: Path) -> list[str]:
    """Lines of the batch script that requeue a job in a container, which has no scontrol and leaves a file instead."""
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
# States of submitted jobs


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of these jobs by id; jobs that Slurm no longer knows are left out.

    squeue lists pending and running jobs and those that ended minutes ago; sacct, where the site has it, all.

    raises  RunError when squeue fails, UserError when it is not installed
    """
    asked = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    answer = ask("squeue", "-a", "-h", "-r", "-t", "all", "-j", asked, "-o", "%i|%T|%r|%N|%M|%S")
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise RunError(f"squeue failed: {_one_line(answer.stderr)}")
    known = _parse_states(answer.stdout, columns=6)
    if not known.keys() >= set(jobs) and shutil.which("sacct"):
        answer = ask("sacct", "-X", "-n", "-P", "-j", asked, "-o", "JobID,State,Reason,NodeList,Elapsed")
        known = _parse_states(answer.stdout, columns=5) | known
    return {job: known[job] for job in jobs if job in known}


def _parse_states(table: str, columns: int) -> dict[str, JobState]:
    """{job: its state} of a table of jobs with the fields of `JobState` in order; other lines are skipped."""
    rows = [line.split("|") for line in table.splitlines()]
    cells = [["" if text in ("N/A", "None") else text for text in row] for row in rows if len(row) == columns]
    # sacct adds the user: "CANCELLED by 1000"
    return {job: JobState(state.partition(" ")[0], *rest) for job, state, *rest in cells}


def cancel(jobs: Sequence[str], *options: str) -> None:
    """Cancel jobs: SIGTERM, then SIGKILL after the site's KillWait, unless `options` of scancel say otherwise.

    raises  RunError when scancel fails
    """
    if not jobs:
        return
    answer = ask("scancel", *options, *jobs)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise RunError(f"scancel failed: {_one_line(answer.stderr)}")


def own_state(job: str) -> str:
    """The state of the job that this process runs in; "" where it is unknown (no squeue in a container)."""
    with contextlib.suppress(UserError, RunError):
        return ask("squeue", "-a", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()
    return ""


def _one_line(text: str) -> str:
    """A program's message on one line, without its name."""
    lines = [re.sub(rf"^(({'|'.join(PROGRAMS)}): )?(error: )?", "", line) for line in text.strip().splitlines()]
    return "; ".join(line for line in lines if line)[:500] or "without a word"
