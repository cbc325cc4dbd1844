"""Running one of dinoreg's commands inside a job, and handling the scheduler's interruptions.

submitit unpickles a `Command` in every process of a job and calls it. A training that was asked to stop has saved when
its Interrupted arrives here (all processes agree on the step); rank 0 then lets submitit requeue the job, unless it was
cancelled, restarted too often, or restarted repeatedly without a new checkpoint.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import submitit
from submitit.core.utils import DelayedSubmission

from dinoreg.jobs import entry, slurm
from dinoreg.jobs.job_type import Arguments
from dinoreg.jobs.options import NO_TIMEOUT
from dinoreg.jobs.records import add_event, cancel_file, read_events
from dinoreg.runtime.errors import Interrupted, RunError, one_line
from dinoreg.runtime.json_files import pointed_step
from dinoreg.runtime.printable import print_status

STUCK = 3  # restarts in a row without a new checkpoint that end a training
FIRST_PORT, NUM_PORTS = 12_000, 20_000  # below those that systems hand out by themselves
SUBMISSION_SECONDS, SUBMISSION_SECONDS_INTERRUPTED = 120, 10
PENDING_STATES = ("PENDING", "REQUEUED", "COMPLETING", "PREEMPTED")


@dataclass(frozen=True)
class Command:
    """One command of a job, as submitit pickles it. Calling it runs the command.

    run_verb   (verb, its arguments, **hooks) -> None: runs one of dinoreg's verbs; pickled by its name
    arguments  of `dinoreg`
    launch     folder of the job's logs and events
    run        run folder of a training; "" for other commands
    evaluate   arguments of `dinoreg launch evaluate`, which is started at each checkpoint
    removes    files to delete after success
    requeues   largest number of restarts
    """

    run_verb: Callable[..., None]
    arguments: Arguments
    launch: str
    run: str = ""
    evaluate: Arguments = ()
    removes: tuple[str, ...] = ()
    requeues: int = 100

    def __call__(self) -> str:
        """Run the command in this process of the job, as submitit asks; returns how it ended."""
        return Attempt(self).run()

    def checkpoint(self) -> DelayedSubmission:
        """The command for the next start, which submitit pickles; RunError after `requeues` restarts."""
        attempt = Attempt(self)
        if attempt.restarts >= self.requeues:
            raise RunError(f"restarted {attempt.restarts} times, as requeues={self.requeues} allows; {attempt.advice}")
        attempt.note("requeue", step=attempt.step)
        return DelayedSubmission(self)


class Attempt:
    """One start of a job, in one of its processes."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.launch = Path(command.launch)
        self.environment = submitit.JobEnvironment()
        self.job = self.environment.job_id
        self.rank = self.environment.global_rank
        self.on_slurm = self.environment.cluster == "slurm"
        name = "SLURM_RESTART_COUNT" if self.on_slurm else "DINOREG_RESTARTS"
        self.restarts = int(os.environ.get(name) or 0)
        self.user_signal = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        self._submitit_handler: Any = None  # checkpoints and requeues
        self._submissions: list[subprocess.Popen[bytes]] = []  # of evaluations

    @property
    def step(self) -> int | None:
        """The step of the run's last checkpoint; None without one and for commands that do not train."""
        return pointed_step(self.command.run, "last") if self.command.run else None

    @property
    def advice(self) -> str:
        """How the user can continue after this job, as a clause for messages."""
        if not self.command.run:
            return "launch it again to go on"
        return f"go on with: dinoreg launch pretrain {self.command.run} resume=true"

    def note(self, event: str, **facts: Any) -> None:
        """Append an event of this process to its events file; a failed write is printed and ignored."""
        try:
            add_event(self.launch, self.job, self.rank, event, restarts=self.restarts, **facts)
        except OSError as error:  # a full disk is no reason to end what trains
            print_status(f"dinoreg: {self.launch} cannot be written ({error.strerror})")

    def run(self) -> str:
        """Run the command; returns "done" or "stopped", or does not return when the job is requeued.

        raises  the command's error, after noting it for `dinoreg launch status`; RunError for too many restarts
        """
        self._delete_leftovers()
        self._export_ranks()
        try:
            if self.rank == 0:
                self._begin()
            self._take_signals()
            verb, *rest = self.command.arguments
            hooks: dict[str, Any] = {}
            if self.command.evaluate and self.rank == 0:
                hooks["on_checkpoint"] = self.evaluate
            self.command.run_verb(verb, rest, **hooks)
            self.finish_submissions(SUBMISSION_SECONDS)
            signal.signal(self.user_signal, signal.SIG_IGN)  # it comes too late: the command has finished
        except Interrupted as stop:
            self.finish_submissions(SUBMISSION_SECONDS_INTERRUPTED)
            return self._leave(stop.signal_number, str(stop))
        except Exception as error:
            line = one_line(error)
            kind = "" if type(error).__module__.startswith("dinoreg") else f"{type(error).__name__}: "
            self.note("failed", error=kind + line, reported=_is_reported(error))
            print_status(f"dinoreg: {line}")
            raise
        if self.rank == 0:
            for path in self.command.removes:
                Path(path).unlink(missing_ok=True)
            self.note("end")
        return "done"

    # --------------------------------------------------------------------------------------------------------
    # Before the command

    def _delete_leftovers(self) -> None:
        """Delete an earlier start's result, which would count as this one's, and files that would stop submitit."""
        paths = self.environment.paths
        leftovers = [paths.result_pickle] if self.restarts else []
        leftovers.append(_aside(paths.result_pickle))
        if self.rank == 0:
            leftovers.append(_aside(paths.submitted_pickle))
        for path in leftovers:
            path.unlink(missing_ok=True)

    def _export_ranks(self) -> None:
        """Set torchrun's environment variables for this process."""
        job, size = self.environment, self.environment.num_tasks
        ranks = {"RANK": self.rank, "LOCAL_RANK": job.local_rank}
        ranks |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size // job.num_nodes}
        os.environ.update({name: str(number) for name, number in ranks.items()})
        if self.on_slurm:  # the local runner has chosen a free port
            port = FIRST_PORT + int(job.raw_job_id) % NUM_PORTS  # every process knows it, each job has another
            os.environ.update(MASTER_ADDR=job.hostnames[0], MASTER_PORT=str(port))

    def _take_signals(self) -> None:
        """Set rank 0's handler outside the training loop: a request to save requeues at once, there is nothing to save.

        Other ranks keep submitit's handler, which only prints; if they left first, rank 0 would count them as lost.
        """
        self._submitit_handler = signal.getsignal(self.user_signal)
        delayed = getattr(getattr(self._submitit_handler, "__self__", None), "_delayed", None)
        if delayed is not None and delayed._timeout_min is None:  # a job without a time limit
            delayed.set_timeout(NO_TIMEOUT, delayed._timeout_countdown)
        if self.rank == 0 and callable(self._submitit_handler):
            signal.signal(self.user_signal, self._requeue_at_once)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.user_signal})

    def _requeue_at_once(self, number: int, frame: Any) -> NoReturn:
        self._leave(number, f"stopped by {signal.Signals(number).name} before it trained")
        sys.exit(0)

    def _begin(self) -> None:
        """Note the start; RunError for a cancelled job, too many restarts, or `STUCK` of them without a checkpoint."""
        self.note("start", step=self.step, nodes=list(self.environment.hostnames))
        if self._is_cancelled():
            raise RunError("cancelled before it began again")
        if self.restarts > self.command.requeues:
            raise RunError(f"restarted more than {self.command.requeues} times (requeues=); {self.advice}")
        if self.command.run:
            starts = [line for line in read_events(self.launch, self.job, 0) if line["event"] == "start"]
            steps = [line.get("step") for line in starts[-STUCK - 1 :]]
            if len(steps) > STUCK and len(set(steps)) == 1:
                where = "before its first checkpoint" if steps[0] is None else f"at step {steps[0]}"
                raise RunError(
                    f"restarted {STUCK} times without a new checkpoint, still {where}: "
                    "save more often (checkpoint.every=) or ask for more time (time=)"
                )

    # --------------------------------------------------------------------------------------------------------
    # After an interruption

    def _leave(self, number: int, message: str) -> str:
        """After signal `number`, requeue the job (does not return), or end it: returns "stopped"."""
        if self.rank != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # rank 0 reports and requeues; waiting here would end in being killed
        if self._is_requeued_after(number):
            self._requeue()
        why = "as asked" if self._is_cancelled() else f"by {signal.Signals(number).name}"
        if self.command.run:
            why += ", nothing was saved" if self.step is None else f", saved at step {self.step}"
        self.note("stopped", why=why)
        print_status(f"dinoreg: {message}")
        return "stopped"

    def _is_cancelled(self) -> bool:
        return cancel_file(self.launch, self.job).exists()

    def _is_requeued_after(self, number: int) -> bool:
        if self._is_cancelled():
            return False
        if number in (signal.SIGUSR1, signal.SIGUSR2, self.user_signal):
            return True
        if number != signal.SIGTERM or not self.on_slurm:
            return False
        # SIGTERM is preemption's, while the job still counts as running, or scancel's, when it does not any more.
        return slurm.own_state(self.environment.raw_job_id) in ("RUNNING", "")

    def _requeue(self) -> NoReturn:
        if self.on_slurm and shutil.which("scontrol") is None:  # in a container: the batch script does it
            self.command.checkpoint()
            (self.launch / f"{self.job}_requeue").touch()
            sys.exit(0)
        try:
            self._submitit_handler(self.user_signal, None)
        except (subprocess.SubprocessError, OSError) as error:
            # Slurm may have been quicker: then this start just ends, and an error file would outlive it.
            if slurm.own_state(self.environment.raw_job_id) in PENDING_STATES:
                sys.exit(0)
            raise RunError(f"could not be requeued ({error}); {self.advice}") from error
        sys.exit(0)

    # --------------------------------------------------------------------------------------------------------
    # Evaluations beside a training, by jobs of their own

    def evaluate(self, step: int, teacher: Path) -> None:
        """Start `dinoreg launch evaluate …` for the teacher file of a step, without waiting; never raises."""
        try:
            command_line = [sys.executable, str(Path(entry.__file__).resolve()), "-u", "-m", "dinoreg", "launch"]
            command_line += [*self.command.evaluate, f"weights={teacher}", f"out={self.command.run}"]
            with open(self.launch / f"{self.job}_evaluate.log", "ab") as output, slurm.outside_job():
                process = subprocess.Popen(command_line, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            self._submissions.append(process)
        except Exception as error:
            print_status(f"dinoreg: step {step} is not evaluated ({one_line(error)})")

    def finish_submissions(self, seconds: float) -> None:
        """Wait, up to `seconds` each, for submissions in progress, which would be killed with the job."""
        for process in self._submissions:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def _aside(path: Path) -> Path:
    """The temporary path under which submitit writes a file."""
    return path.with_suffix(f"{path.suffix}.save_tmp")


def _is_reported(error: BaseException | None) -> bool:
    """Whether another process of the job reports the cause of this failure."""
    while error is not None and not getattr(error, "reported", False):
        error = error.__cause__
    return error is not None
