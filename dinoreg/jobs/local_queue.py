"""cluster=local: the same jobs as processes of this machine, through submitit's own entry and records.

submitit's local executor has no arrays, no dependencies and at most six restarts, and its jobs end with the terminal.
Here one detached runner per launch starts each job when its dependencies have ended and a slot is free, restarts it on
submitit's exit code for that, sends the signal to save before the time limit, and ends all processes of a job when one
fails. A job's state is in `JOB_local.json`.
"""

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
from dataclasses import asdict, dataclass, field
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
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@dataclass
class LocalJob:
    """A job as the plan file has it, then its state and the processes that run it.

    after           jobs that must have ended before
    tasks, gpus     numbers of processes and of GPUs
    seconds         time limit; 0: none
    signal_seconds  how long before the limit the signal to save is sent
    setup           shell lines to run before
    python          shell words that start Python, up to the module to run
    trains          whether it is a training, which gets more time to end
    ends_as         the state to end in, once it is being terminated
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
    state: str = "PENDING"
    begun: float | None = None
    ended: float | None = None
    restarts: int = 0
    devices: list[str] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ends_as: str = ""
    kill_at: float = 0.0
    save_requested: bool = False

    def write(self, launch: Path) -> None:
        """Write the job's state to `JOB_local.json`."""
        state = {key: getattr(self, key) for key in ("state", "begun", "ended", "restarts")}
        state["processes"] = [process.pid for process in self.processes]
        replace_text(_state_file(launch, self.job), json.dumps(state))

    def signal(self, number: int) -> None:
        """Send a signal to every process of the job and to their children."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def request_save(self) -> None:
        """Send the signal to save (SIGUSR2), once per start."""
        if not self.save_requested:
            self.save_requested = True
            self.signal(signal.SIGUSR2)

    def end(self, state: str) -> None:
        """Send SIGTERM; the runner kills remaining processes after the grace period. The job then ends as `state`."""
        if not self.ends_as:
            self.ends_as = state
            self.kill_at = time.monotonic() + (TRAINING_GRACE if self.trains else GRACE)
            self.signal(signal.SIGTERM)


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
    """{"state", "begun", "ended", "restarts"} of a local job, times in seconds since 1970; PENDING without a file."""
    return {"state": "PENDING", "begun": None, "ended": None, "restarts": 0, **read_json(_state_file(launch, job))}


def _state_file(launch: Path, job: str) -> Path:
    return launch / f"{job}_local.json"


# ------------------------------------------------------------------------------------------------------------
# The runner


class Runner:
    """Runs the jobs of one launch, at most `max_parallel` at a time, until all have ended."""

    def __init__(self, launch: Path, jobs: Sequence[LocalJob], max_parallel: int) -> None:
        self.launch, self.jobs, self.max_parallel = launch, jobs, max_parallel
        self.free = devices()
        self.stopping = False

    def run(self) -> None:
        """Run until every job has ended; SIGTERM, SIGINT and SIGHUP cancel those that have not."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        while any(job.state not in ENDED for job in self.jobs):
            for job in self.jobs:
                if job.state == "RUNNING":
                    self._poll(job)
            for job in self.jobs:
                if job.state == "PENDING":
                    self._start_if_ready(job)
            time.sleep(POLL_SECONDS)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _is_cancelled(self, job: LocalJob) -> bool:
        return self.stopping or cancel_file(self.launch, job.job).exists()

    def _start_if_ready(self, job: LocalJob) -> None:
        """Start a job whose dependencies have ended, if a slot and its GPUs are free."""
        if self._is_cancelled(job):
            self._close(job, "CANCELLED")
            return
        ended = {each.job for each in self.jobs if each.state in ENDED}
        places = self.max_parallel - sum(each.state == "RUNNING" for each in self.jobs)
        if set(job.after) <= ended and places > 0 and len(self.free) >= job.gpus:
            job.devices, self.free = self.free[: job.gpus], self.free[job.gpus :]
            self._start(job)

    def _start(self, job: LocalJob) -> None:
        with socket.socket() as probe:  # a free port, a new one for every start
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = f"exec {job.python} -u -m submitit.core._submit {shlex.quote(str(self.launch))}"
        job.processes, job.ends_as, job.save_requested, job.begun = [], "", False, time.time()
        for task in range(job.tasks):
            errors, output = log_files(self.launch, job.job, task)
            environment = {**os.environ, **self._environment(job, task, port)}
            with open(errors, "ab") as stderr, open(output, "ab") as stdout:
                shell = ["bash", "-c", " && ".join([*job.setup, command])]
                job.processes.append(_detached(shell, stdout, stderr, environment))
        job.state = "RUNNING"
        job.write(self.launch)

    def _environment(self, job: LocalJob, task: int, port: int) -> dict[str, str]:
        variables = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": job.job,
            "SUBMITIT_LOCAL_NTASKS": str(job.tasks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_LOCALID": str(task),
            "SUBMITIT_LOCAL_GLOBALID": str(task),
            "DINOREG_RESTARTS": str(job.restarts),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if job.tasks > 1:  # each takes all cores otherwise
            threads = max(1, usable_cores() // job.tasks)
            variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        if job.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(job.devices)
        return variables

    def _poll(self, job: LocalJob) -> None:
        """Check a running job: close or restart it if its processes have ended, else send due signals."""
        codes = [process.poll() for process in job.processes]
        if all(code is not None for code in codes):
            requeues = job.ends_as == "REQUEUE" or (not job.ends_as and LOCAL_REQUEUE_RETURN_CODE in codes)
            if requeues and not self.stopping:
                job.restarts += 1
                self._start(job)
            else:
                ended = job.ends_as or ("FAILED" if any(codes) else "COMPLETED")
                self._close(job, "CANCELLED" if requeues else ended)
            return
        running = time.time() - (job.begun or 0.0)
        if LOCAL_REQUEUE_RETURN_CODE in codes and not job.ends_as:
            job.ends_as, job.kill_at = "REQUEUE", time.monotonic() + TRAINING_GRACE  # the others leave by themselves
        elif any(codes):
            job.end("FAILED")
        elif self._is_cancelled(job):
            if not self.stopping and "save" in read_text(cancel_file(self.launch, job.job)):
                job.request_save()  # the job then ends by itself
            else:
                job.end("CANCELLED")
        elif job.seconds and running > job.seconds:
            job.end("TIMEOUT")
        elif job.seconds and running > job.seconds - job.signal_seconds:
            job.request_save()  # the job then asks to be started again
        if job.ends_as and time.monotonic() > job.kill_at:
            job.signal(signal.SIGKILL)

    def _close(self, job: LocalJob, state: str) -> None:
        job.state, job.ended = state, time.time()
        self.free += job.devices
        job.devices = []
        job.write(self.launch)


def main(arguments: Sequence[str]) -> None:
    """Run the plan file that the first argument names."""
    plan = Path(arguments[0])
    content = json.loads(plan.read_text())
    jobs = [LocalJob(**each) for each in content["jobs"]]
    Runner(plan.parent, jobs, content["max_parallel"]).run()


if __name__ == "__main__":
    main(sys.argv[1:])
