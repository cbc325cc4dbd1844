"""cluster=local: the same jobs as processes of this machine, through submitit's own entry and records.

submitit's local executor has no arrays, no dependencies and at most six restarts, and its jobs end with the terminal.
Here one detached runner per launch starts each job when its dependencies have ended and a slot is free, restarts it on
submitit's exit code for that, sends the signal to save before the time limit, and ends all processes of a job when one
fails. A job's state is in `JOB_local.json`.
"""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from dinoreg.jobs.options import LaunchOptions
from dinoreg.jobs.records import cancel_file, log_files, replace_text
from dinoreg.runtime.environment import start_time, usable_cores
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import read_json, read_text

POLL_SECONDS = 0.2
TRAINING_GRACE, GRACE = 30.0, 3.0  # seconds from SIGTERM to SIGKILL: what trains saves first
PENDING, SAVE = "PENDING", "SAVE"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@dataclass(frozen=True)
class LocalJob:
    """A job as the plan file has it.

    after           jobs that must have ended before
    tasks, gpus     numbers of processes and of GPUs
    seconds         time limit; 0: none
    signal_seconds  how long before the limit the signal to save is sent
    setup           shell lines to run before
    python          shell words that start Python, up to the module to run
    trains          whether it is a training, which gets more time to end
    """

    job: str
    after: list[str]
    tasks: int
    gpus: int
    seconds: int
    signal_seconds: int
    setup: list[str]
    python: str
    trains: bool


def check(options: LaunchOptions) -> None:
    """UserError for options that this machine cannot satisfy."""
    if options.nodes > 1:
        raise UserError(f"nodes={options.nodes}: cluster=local is this machine alone; expected nodes=1")
    if (options.gpus_per_node or 0) > len(devices()):
        raise UserError(f"gpus_per_node={options.gpus_per_node}: this machine has {len(devices())}")
    if options.container is not None:
        raise UserError("container: jobs of cluster=local run in this environment; use it with cluster=slurm")


def devices() -> list[str]:
    """The GPUs that jobs may use, as in CUDA_VISIBLE_DEVICES; [] without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return [str(number) for number, line in enumerate(answer.stdout.splitlines()) if line.startswith("GPU ")]


def begin(launch: Path, number: int, jobs: Sequence[LocalJob], max_parallel: int, python: str) -> list[int]:
    """Start the runner of a launch, which outlives this process; returns [process id, its `start_time`].

    launch        folder of the launch's files
    number        of the launch in that folder
    max_parallel  jobs at a time
    python        shell words that start Python
    """
    plan = launch / f"local{number}.json"
    plan.write_text(json.dumps({"max_parallel": max_parallel, "jobs": [asdict(job) for job in jobs]}))
    with open(launch / f"local{number}.log", "ab") as log:
        runner = _detached([*shlex.split(python), "-m", "dinoreg.jobs.local_queue", str(plan)], log, log)
    return [runner.pid, start_time(runner.pid) or 0]


def _detached(
    command: list[str], stdout: BinaryIO, stderr: BinaryIO, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which does not end with the terminal."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=env, stdin=quiet, stdout=stdout, stderr=stderr, start_new_session=True)


def read_state(launch: Path, job: str) -> dict[str, Any]:
    """{"state", "restarts", "begun"} of a local job, the last in seconds since 1970; PENDING without a file."""
    return {"state": PENDING, "restarts": 0, "begun": None, **read_json(_state_file(launch, job))}


def _state_file(launch: Path, job: str) -> Path:
    return launch / f"{job}_local.json"


# ------------------------------------------------------------------------------------------------------------
# The runner


class Runner:
    """Runs the jobs of one launch, at most `max_parallel` at a time, until all have ended."""

    def __init__(self, launch: Path, jobs: Sequence[LocalJob], max_parallel: int) -> None:
        self.launch, self.jobs, self.places = launch, jobs, max_parallel
        self.gpus = devices()  # that no job uses
        self.ended: set[str] = set()
        self.stopping = False

    async def run(self) -> None:
        """Run until every job has ended; SIGTERM, SIGINT and SIGHUP cancel those that have not."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        await asyncio.gather(*map(self._attend, self.jobs))

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _is_cancelled(self, job: LocalJob) -> bool:
        return self.stopping or cancel_file(self.launch, job.job).exists()

    def _is_ready(self, job: LocalJob) -> bool:
        return set(job.after) <= self.ended and self.places > 0 and len(self.gpus) >= job.gpus

    def _write(self, job: LocalJob, **state: Any) -> None:
        replace_text(_state_file(self.launch, job.job), json.dumps(state))

    async def _attend(self, job: LocalJob) -> None:
        """Start a job once its dependencies have ended and a slot and its GPUs are free; again when it asks for it."""
        state, restarts = PENDING, 0
        while not (self._is_cancelled(job) or self._is_ready(job)):
            await asyncio.sleep(POLL_SECONDS)
        gpus, self.gpus = self.gpus[: job.gpus], self.gpus[job.gpus :]
        self.places -= 1
        while state == PENDING:
            if self._is_cancelled(job):
                state = "CANCELLED"
            else:
                state = await self._run(job, gpus, restarts)
                restarts += state == PENDING
        self.places += 1
        self.gpus += gpus
        self.ended.add(job.job)
        self._write(job, state=state, restarts=restarts)

    async def _run(self, job: LocalJob, gpus: list[str], restarts: int) -> str:
        """Run a job's processes to their end; returns the state that it is in, PENDING if it asked to be restarted."""
        processes, begun = self._start(job, gpus, restarts), time.time()
        self._write(job, state="RUNNING", restarts=restarts, begun=begun, processes=[each.pid for each in processes])
        saves, ends_as, kill_at = False, "", 0.0
        while None in (codes := [process.poll() for process in processes]):
            due = self._due(job, codes, time.time() - begun)
            if ends_as:
                if time.monotonic() > kill_at:
                    _send(processes, signal.SIGKILL)
            elif due == SAVE:
                if not saves:
                    _send(processes, signal.SIGUSR2)
                saves = True  # the job then ends by itself, or asks to be started again
            elif due:
                ends_as = due
                kill_at = time.monotonic() + (TRAINING_GRACE if job.trains or due == PENDING else GRACE)
                if due != PENDING:  # then the other processes leave by themselves
                    _send(processes, signal.SIGTERM)
            await asyncio.sleep(POLL_SECONDS)
        return ends_as or _failed(codes) or "COMPLETED"

    def _due(self, job: LocalJob, codes: Sequence[int | None], seconds: float) -> str:
        """The state in which a job is to end that has run for some seconds, `SAVE` if it is to save, else ""."""
        if failed := _failed(codes):
            return failed
        if self._is_cancelled(job):
            return SAVE if not self.stopping and "save" in read_text(cancel_file(self.launch, job.job)) else "CANCELLED"
        if job.seconds and seconds > job.seconds:
            return "TIMEOUT"
        return SAVE if job.seconds and seconds > job.seconds - job.signal_seconds else ""

    def _start(self, job: LocalJob, gpus: list[str], restarts: int) -> list[subprocess.Popen[bytes]]:
        """Start the processes of a job, each with logs of its own."""
        with socket.socket() as probe:  # a free port, a new one for every start
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = {
            **os.environ,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": job.job,
            "SUBMITIT_LOCAL_NTASKS": str(job.tasks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "DINOREG_RESTARTS": str(restarts),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if job.tasks > 1:  # each takes all cores otherwise
            variables.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // job.tasks)))
        if job.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        command = f"exec {job.python} -u -m submitit.core._submit {shlex.quote(str(self.launch))}"
        shell = ["bash", "-c", " && ".join([*job.setup, command])]
        processes = []
        for task in range(job.tasks):
            rank = dict.fromkeys(("SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_GLOBALID"), str(task))
            errors, output = log_files(self.launch, job.job, task)
            with open(errors, "ab") as stderr, open(output, "ab") as stdout:
                processes.append(_detached(shell, stdout, stderr, {**variables, **rank}))
        return processes


def _failed(codes: Sequence[int | None]) -> str:
    """PENDING where a process asked for another start, FAILED where one has failed, "" otherwise."""
    return PENDING if LOCAL_REQUEUE_RETURN_CODE in codes else "FAILED" if any(codes) else ""


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to every process that lives and to its children."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def main(arguments: Sequence[str]) -> None:
    """Run the plan file that the first argument names."""
    plan = Path(arguments[0])
    content = json.loads(plan.read_text())
    jobs = [LocalJob(**each) for each in content["jobs"]]
    asyncio.run(Runner(plan.parent, jobs, content["max_parallel"]).run())


if __name__ == "__main__":
    main(sys.argv[1:])
