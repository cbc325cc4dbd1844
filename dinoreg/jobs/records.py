"""The files of a launch in `RUN/launch/`: the submitted jobs, and the events that each of them recorded.

    jobs.jsonl                      one line a job, written when it was submitted
    JOB_RANK_events.jsonl           start, requeue, end, failure: written by the job's processes, each into its own file
    JOB_cancel                      the job was asked to end; it does not come back
    JOB_RANK_log.out, …_log.err     what the processes printed; JOB_submission.sh and pickles are submitit's
    code/…                          the copies of the package that jobs run

Incomplete or foreign lines are skipped when these files are read.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dinoreg.runtime.json_files import is_number, read_json_lines

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class Record:
    """A job as it was submitted.

    job        the scheduler's id: 12, 12_3 for element 3 of an array, local1.0 on this machine
    launch     number of the launch in this folder, from 1
    group      name of its group within the launch
    cluster    "slurm" | "local"
    command    arguments of dinoreg
    nodes      number of machines
    tasks      number of processes on each machine
    run        run folder of a training; "" for other commands
    after      jobs that it depends on
    runner     [process id, start time] of the local runner; [] on Slurm
    time       of submission, seconds since 1970
    """

    job: str
    launch: int
    group: str
    cluster: str
    command: list[str]
    nodes: int
    tasks: int
    run: str
    after: list[str]
    runner: list[int]
    time: float

    @property
    def title(self) -> str:
        """A short title of the job: "pretrain", "evaluate pets", "sweep lr=0.1"."""
        if self.group == "evaluate" and len(self.command) > 1:
            return f"{self.group} {self.command[1]}"
        if self.group == "sweep" and self.run:
            return f"{self.group} {Path(self.run).name}"
        return self.group


def launch_folder(folder: str | Path) -> Path:
    """The folder with the records, logs and code of the launches for a run folder."""
    return Path(folder) / "launch"


def add_records(launch: Path, records: Iterable[Record]) -> None:
    """Append the records of submitted jobs to `jobs.jsonl`; OSError when that fails."""
    append(launch / JOBS, *(asdict(record) for record in records))


def read_records(folder: str | Path) -> list[Record]:
    """The jobs launched for a folder, in the order of submission; [] without any."""
    hints = get_type_hints(Record)
    lines = read_json_lines(launch_folder(folder) / JOBS)
    whole = [line for line in lines if all(_is(line.get(name), hint) for name, hint in hints.items())]
    return [Record(**{name: line[name] for name in hints}) for line in whole]


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of the type of a field of `Record`."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is(each, *get_args(hint)) for each in value)
    return is_number(value) if hint is float else type(value) is hint


def next_launch(launch: Path) -> int:
    """The number of the next launch in this folder, from 1."""
    numbers = (line.get("launch") for line in read_json_lines(launch / JOBS))
    return 1 + max((number for number in numbers if type(number) is int), default=0)


# ------------------------------------------------------------------------------------------------------------
# What jobs write about themselves


def add_event(launch: Path, job: str, rank: int, event: str, **facts: Any) -> None:
    """Append an event with its time (seconds since 1970) to the file of one process; OSError when that fails."""
    append(launch / f"{job}_{rank}_events.jsonl", {"event": event, "time": time.time(), **facts})


def read_events(launch: Path, job: str, rank: int | None = None) -> list[dict[str, Any]]:
    """Events of a job's process `rank` (None: of all), ordered by time; the key "rank" is added to each."""
    events = []
    for path in launch.glob(f"{job}_{'*' if rank is None else rank}_events.jsonl"):
        writer = path.name.removeprefix(f"{job}_").removesuffix("_events.jsonl")
        if writer.isdigit():
            lines = [
                line for line in read_json_lines(path) if _is(line.get("event"), str) and is_number(line.get("time"))
            ]
            events += [{**line, "rank": int(writer)} for line in lines]
    return sorted(events, key=lambda line: line["time"])


def cancel_file(launch: Path, job: str) -> Path:
    """The file whose existence means that a job was asked to end."""
    return launch / f"{job}_cancel"


def log_files(launch: Path, job: str, task: int = 0) -> tuple[Path, Path]:
    """The paths of the logs of process `task` of a job: (stderr, stdout)."""
    return launch / f"{job}_{task}_log.err", launch / f"{job}_{task}_log.out"


# ------------------------------------------------------------------------------------------------------------
# Files


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text in one rename; OSError when that fails."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text)
    os.replace(aside, path)


def append(path: Path, *lines: dict[str, Any]) -> None:
    """Append JSON lines in one write, so that those of two writers do not mix, and flush them; OSError on failure."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())
        os.fsync(file.fileno())


def last_lines(path: Path, count: int, size: int = 1 << 18) -> list[str]:
    """The last `count` lines within the last `size` bytes of a file; [] where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
