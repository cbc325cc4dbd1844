"""The resources and settings of a job: the keys of `dinoreg launch` that are not keys of the command it runs.

There are no defaults for a site: an option that is not given is not requested, and the scheduler decides. But cores
are, where there are GPUs: a process with one core starves its GPU.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from dinoreg.config.option import Options, check, keys_of, option, read, split_texts
from dinoreg.runtime.errors import UserError

CLUSTERS = ("slurm", "local")
CODES = ("copy", "shared")
SIGNAL_DELAY = 120  # seconds
GPU_CORES = 4  # for its kernels, their backward pass, and decoding; most sites give one where none are asked for
NO_TIMEOUT = 60 * 24 * 365  # minutes; what submitit counts with where there is no limit
PLACEMENT = ("partition", "account", "qos", "constraint", "exclude", "reservation")  # where jobs run, and who pays


@dataclass(frozen=True)
class LaunchOptions(Options):
    """The keys of `dinoreg launch` about the job."""

    cluster: str | None = option(None, "none: slurm where sbatch is on the PATH, else local", choices=CLUSTERS)
    name: str | None = option(None, "the job's, in squeue; none: the kind of job and the folder")
    nodes: int = option(1, "machines", low=1, high=100_000)
    gpus_per_node: int | None = option(None, "none: not asked for; local: those that the job sees", low=0, high=1_000)
    tasks_per_node: int | None = option(
        None, "processes on a machine; none: one for each GPU, at least one", low=1, high=10_000
    )
    cpus_per_task: int | None = option(None, f"cores of a process; none: {GPU_CORES} with a GPU", low=1, high=100_000)
    mem: str | None = option(
        None,
        "memory of a machine; none: not asked for",
        pattern=r"\d+[KMGT]?B?",
        expected="a number with its unit, as 64G",
    )
    time: str | None = option(None, "limit: minutes, 8:00:00 or 2-00:00:00; none: the partition's")
    signal_delay: int | None = option(
        None, "seconds before the limit to save at; none: 120 or less", low=1, high=1_000_000
    )
    partition: str | None = option(None, "several with commas")
    account: str | None = option(None, "who pays")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that the machines must have")
    exclude: str | None = option(None, "machines not to use")
    reservation: str | None = option(None, "machines set aside under this name")
    setup: str | list[str] | None = option(None, "shell lines before the job, as [module load cuda]")
    container: str | None = option(None, "an image for pyxis, or a .sif file for apptainer")
    container_mounts: list[str] | None = option(None, "further folders that it sees, as /data:/data")
    python: str | None = option(None, "interpreter of the job; none: this one, python3 in a container")
    max_parallel: int | None = option(None, "tasks at a time; none: all, or as GPUs allow", low=1, high=1_000_000)
    requeues: int = option(100, "restarts after limits, preemptions, lost nodes", low=0, high=1_000_000)
    code: str = option("copy", "copy: jobs run a copy of the package; shared: what is there then", choices=CODES)
    slurm_args: str | list[str] | None = option(None, "of sbatch besides, as [mail-type=END,exclusive]")
    dry_run: bool = option(False, "show the commands and the files of the jobs, and do nothing")
    wait: bool = option(False, "follow the jobs to their end; exit code 1 when one fails")

    def __post_init__(self) -> None:
        super().__post_init__()
        minutes = self.minutes
        if minutes is not None and self.signal_delay is not None:
            limit = f"less than time={self.time}, which is {60 * minutes} s"
            check(self.signal_delay < 60 * minutes, "signal_delay", self.signal_delay, limit)
        for key, value in vars(self).items():
            for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
                # Quotes of a shell keep newlines, and lines of #SBATCH end at them.
                check(key == "setup" or text.isprintable(), key, text, "no control characters")
        for item in self.extra_args:
            check(re.match(r"[a-z][a-z-]*(=|$)", item) is not None, "slurm_args", item, "KEY=VALUE, as mail-type=END")

    @property
    def on_slurm(self) -> bool:
        """Whether the jobs go to Slurm; otherwise they run on this machine.

        A dry run with options that only Slurm has describes its jobs wherever it is asked for.
        """
        if self.cluster is not None:
            return self.cluster == "slurm"
        described = self.dry_run and any(getattr(self, key) is not None for key in PLACEMENT)
        return described or shutil.which("sbatch") is not None

    @property
    def tasks(self) -> int:
        """Number of processes on each machine."""
        return self.tasks_per_node or max(1, self.gpus_per_node or 1)

    @property
    def cores(self) -> int | None:
        """Cores of a process; None: not asked for."""
        return self.cpus_per_task or (GPU_CORES if self.gpus_per_node else None)

    @property
    def world_size(self) -> int:
        """Processes of a job, on all its machines."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int | None:
        """The time limit in minutes, rounded up, as Slurm counts; None without one."""
        return None if self.time is None else read_time(self.time)

    @property
    def signal_seconds(self) -> int:
        """Seconds before the time limit at which the signal to save is sent."""
        if self.signal_delay is not None:
            return self.signal_delay
        return SIGNAL_DELAY if self.minutes is None else min(SIGNAL_DELAY, 30 * self.minutes)

    @property
    def setup_lines(self) -> list[str]:
        """The shell lines to run before the job."""
        return _listed(self.setup)

    @property
    def extra_args(self) -> list[str]:
        """The user's further options of sbatch, without leading dashes."""
        return [item.removeprefix("--") for item in _listed(self.slurm_args)]


OPTION_NAMES = tuple(keys_of(LaunchOptions))


def split_options(arguments: Iterable[str]) -> tuple[LaunchOptions, list[str], dict[str, str]]:
    """Split `key=value` arguments: (the job's options, the command's arguments, {name: text} of the options given).

    raises UserError for a value of the wrong type or out of range
    """
    given, rest = split_texts(LaunchOptions, arguments)
    options, _ = read(LaunchOptions, given)
    return options, rest, {text.partition("=")[0]: text for text in given}


def read_time(text: str) -> int:
    """A duration in one of Slurm's notations, in minutes, rounded up.

    text    MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or
            DAYS-HOURS:MINUTES:SECONDS
    raises  UserError for anything else and for 0
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is not None:
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] is not None or match[4] is not None:  # begins with days or hours
            seconds = ((days * 24 + first) * 60 + second) * 60 + third
        else:
            seconds = first * 60 + second
        if seconds > 0:
            return -(-seconds // 60)
    raise UserError(f"time={text}: expected minutes, hours:minutes:seconds or days-hours, as 90, 8:00:00 or 2-00")


def _listed(value: str | list[str] | None) -> list[str]:
    items = [] if value is None else [value] if isinstance(value, str) else value
    return [item.strip() for item in items if item.strip()]
