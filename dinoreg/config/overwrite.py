"""A run folder as a place to write to: what `out=` may name, and what `overwrite=true` may delete there."""

import math
import os
import shutil
import socket
import time
from fnmatch import fnmatch
from pathlib import Path

from dinoreg.config.load import Config, load_config, to_yaml
from dinoreg.runtime.environment import is_alive
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import number, read_json

OWNER = "owner.json"
_TAKEOVER = "; takeover=true goes on although"
SILENT_SECONDS = 120.0  # without a line of metrics.jsonl: then a run of another machine no longer counts as alive

# Everything that a run, and the commands that work on it, leave in its folder.
_WRITTEN_BY_RUNS = (
    *("config.yaml", OWNER, "environment.json", "status.json", "init.safetensors", "init.json"),
    *("checkpoints", "teacher", "train.log", "metrics.jsonl", "probe.jsonl", "probe.json", "skipped.jsonl", "health"),
    *("events.out.tfevents.*", "trackers.json", "report.html", "eval", "view", "verdict", "launch"),
    *(".overwritten-*", "*.part"),
)
# In the folders of these, but for `launch`, whose jobs may write what they like.
_WRITTEN_BELOW = (
    *("last", "best", ".metadata", "*.distcp", "*.part", "*.safetensors", "*.json", "*.jsonl", "*.npy"),
    *("*.tmp", "*.pt", "*.png", "*.html", "*.csv", "*.md"),
)
# Deleted last, so that a deletion that was interrupted can be done again.
_MARKS = (OWNER, "config.yaml")
# There before the first start of a run, or left by a kill in its very first write.
_BEFORE_A_RUN = ("launch", ".overwritten-*", "*.part")


def check_folder(folder: Path, name: str) -> None:
    """UserError, its message beginning with `name`, where `folder` is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name} is a file, expected a folder")


def check_out(config: Config, out: Path) -> None:
    """UserError, in one line, when `config` must not write a run to `out`; nothing is written or deleted."""
    check_folder(out, f"out={out}:")
    if config.overwrite:
        run_entries(out)
    elif not out.is_dir() or all(_matches(path, _BEFORE_A_RUN) for path in out.iterdir()):
        return
    elif not config.resume:
        refuse_live(out, config.takeover)  # before advice that deletes or goes on
        raise UserError(f"out={out}: not empty; use resume=true to go on, overwrite=true to start anew")
    elif not (out / "config.yaml").is_file():
        raise UserError(f"out={out}: holds no run to resume (no config.yaml)")
    else:
        for name in ("checkpoints", "teacher"):
            home = Path(os.path.realpath(out / name)).parent
            if home != out.resolve() and (home / OWNER).exists():  # what this run replaces and retires is that one's
                raise UserError(f"out={out}: {name} is a link into the run {home}; resume that, or copy the folder")


def refuse_live(out: Path, takeover: bool = False) -> None:
    """UserError where another start of the run in `out` is at work, since two would spoil what the other writes.

    On this machine by its process; on another by its lines in metrics.jsonl, unless Slurm started this same job again.
    With `takeover` nothing is refused.
    """
    owner, status = read_json(out / OWNER), read_json(out / "status.json")
    pid, host = owner.get("pid"), owner.get("host")
    is_over = status.get("phase") in ("finished", "stopped", "failed")
    if takeover or (is_over and number(status.get("time")) >= number(owner.get("time"))):
        return
    if host == socket.gethostname():
        if pid != os.getpid() and owner.get("started") is not None and is_alive(pid, owner["started"]):
            raise UserError(f"out={out}: its run is at work (process {pid}); end it, as kill {pid} does{_TAKEOVER}")
    elif owner.get("job") is None or owner["job"] != os.environ.get("SLURM_JOB_ID"):
        lines = out / "metrics.jsonl"
        silent = time.time() - lines.stat().st_mtime if lines.is_file() else math.inf
        if owner and silent < SILENT_SECONDS:
            known = f"its run is at work on {host} (process {pid}, a line {max(0, silent):.0f} s ago)"
            wait = f"end it there, or wait until it has been silent for {SILENT_SECONDS:.0f} s{_TAKEOVER}"
            raise UserError(f"out={out}: {known}; {wait}")


def run_entries(out: Path) -> list[Path]:
    """The files and folders of the run in `out`, in the order in which to delete them; [] where no run has started.

    raises UserError when `out` holds something other than a run of dinoreg, or other files beside one
    """
    if not out.is_dir():
        return []
    entries = sorted(out.iterdir(), key=lambda path: (path.name in _MARKS, path.name))
    if all(_matches(path, _BEFORE_A_RUN) for path in entries):
        return []
    config = out / "config.yaml"
    is_claimed = {"token", "host", "pid"} <= read_json(out / OWNER).keys()  # by a start of a run, see `Lease`
    if not (is_claimed or _is_resolved_config(config)):
        why = "its config.yaml is not one that a run wrote" if config.exists() else "no config.yaml"
        raise UserError(f"out={out}: holds something other than a run ({why}); it is not overwritten")
    foreign = [path.name for path in entries if not _matches(path, _WRITTEN_BY_RUNS)]
    for entry in () if foreign else entries:
        if not (entry.is_symlink() or _matches(entry, _BEFORE_A_RUN)):
            below = (path for path in entry.rglob("*") if path.is_file() and not path.is_symlink())
            foreign += [str(path.relative_to(out)) for path in below if not _matches(path, _WRITTEN_BELOW)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"out={out}: holds {foreign[0]}{more}, which no run writes; it is not overwritten")
    return entries


def delete_run(out: Path, takeover: bool = False) -> None:
    """Delete the run in `out`, but not the folder itself or the link to it.

    raises UserError as `run_entries` and `refuse_live`, OSError when something cannot be deleted
    """
    refuse_live(out, takeover)
    for path in run_entries(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_aside(out: Path) -> Path:
    """Move the run in `out` into a new folder inside `out`; returns that, for `put_back` or for deletion.

    raises UserError as `run_entries`, OSError when something cannot be moved
    """
    entries = run_entries(out)
    aside = out / f".overwritten-{os.getpid()}"
    aside.mkdir()
    try:
        for path in entries:
            os.rename(path, aside / path.name)
    except OSError:
        put_back(aside)
        raise
    return aside


def put_back(aside: Path) -> None:
    """Undo `set_aside`, whose result is `aside`; OSError when something cannot be moved."""
    for path in aside.iterdir():
        os.rename(path, aside.parent / path.name)
    aside.rmdir()


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _is_resolved_config(path: Path) -> bool:
    """Whether this is a config with every key written out, as a run writes first; a user's config has only some."""
    try:
        return path.is_file() and path.read_text() == to_yaml(load_config(path))
    except (OSError, UserError, ValueError, RecursionError):
        return False
