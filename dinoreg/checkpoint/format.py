"""Training states on disk (torch.distributed.checkpoint) and the plain teacher file.

A checkpoint is written into a folder of another name, its files' digests into a manifest, everything is flushed to
the disk, and only then the folder is renamed to its final name, which thus never names an incomplete checkpoint.
Reading verifies the manifest first and never runs code (see metadata.py).

Many processes write one checkpoint together, each its share of the files, and any number of processes can read it. An
error on one process is raised on all, with the same message.
"""

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dinoreg.checkpoint.atomic import reason, replacing, share, sync, write_atomic
from dinoreg.checkpoint.metadata import MAX_BYTES, METADATA, Reader, TensorPlanner
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.runtime import json_files
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.json_files import STEP_NAME, read_pointer
from dinoreg.runtime.regular_files import read_regular

VERSION = 1
MANIFEST = "manifest.json"
NUMBERS = "state.json"
_UNFINISHED = ".unfinished-"

T = TypeVar("T")


def step_name(step: int) -> str:
    """The name of a step's checkpoint and teacher file, such as step_0001250."""
    return f"step_{step:07d}"


# --------------------------------------------------------------------------------------------------------------
# Pointers: `last` and `best` hold the name of a step


def write_pointer(folder: Path, name: str, step: int, token: str = "") -> None:
    """Make the file `folder`/`name`, `last` or `best`, name the checkpoint of a step; OSError when that fails."""
    write_atomic(folder / name, step_name(step) + "\n", token)


# --------------------------------------------------------------------------------------------------------------
# Training states: writing


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Any],
    numbers: dict[str, Any],
    keep: int,
    best: bool = False,
    *,
    keep_hours: float | None = None,
    ranks: Ranks = ALONE,
    token: str = "",
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write `folder/step_…`, point `last` (and `best`) to it, and remove old checkpoints and their teacher files.

    tensors           nested, by name. DTensors are written by the processes that hold them; of plain tensors, which are
                      equal everywhere, each process may pass all or only its share
    numbers           JSON values; those of process 0 are written
    keep, keep_hours  as for `retire`
    ranks             the processes that write this checkpoint together, each calling this; nothing else uses their
                      control group meanwhile
    token             part of the unfinished folder's name, where another start of the run may be writing
    finish            called by process 0 with the complete, still unpublished folder; an error prevents publishing
    returns           the checkpoint's folder
    raises            RunError on all processes when the checkpoint cannot be written; the previous one is unchanged
    """
    final = folder / step_name(step)
    aside = folder / f"{_UNFINISHED}{step_name(step)}{token and '.'}{token}"

    def publish() -> None:
        _complete(aside, final, numbers, parts)
        if finish is not None:
            finish(aside)
        if final.exists():  # one that was passed over as damaged, or of before a roll-back
            _discard(final)
        os.rename(aside, final)
        sync(folder)
        for name in ("last", "best") if best else ("last",):
            write_pointer(folder, name, step, token)

    try:
        on_main(ranks, lambda: _begin(aside))
        _ignore_expected_warnings()
        writer = dcp.FileSystemWriter(aside, per_thread_copy_ahead=0)
        alone = ranks.world_size == 1
        state = flatten(tensors)
        dcp.save(state, checkpoint_id=aside, storage_writer=writer, process_group=ranks.control, no_dist=alone)
        parts = on_all_ranks(ranks, lambda: _own_files(aside, ranks.rank))
        on_main(ranks, publish)
    except (OSError, RunError, CheckpointException) as error:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, RunError):
            raise
        raise RunError(f"checkpoint {final} could not be written: {reason(error)}") from error
    if ranks.is_main:
        for remove in (lambda: retire(folder, keep, keep_hours), lambda: retire_teachers(folder.parent)):
            with suppress(OSError):  # what stays too long takes room, no more
                remove()
    return final


def _begin(aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def _complete(aside: Path, final: Path, numbers: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Add the numbers and the manifest to the files of all processes, and flush what is in the folder to the disk.

    parts  of each process: the manifest's entries of its files
    """
    (aside / NUMBERS).write_text(json.dumps({"version": VERSION, "time": time.time(), **numbers}))
    manifest = {name: entry for part in parts for name, entry in part.items()}
    manifest[NUMBERS] = _entry(aside / NUMBERS)
    for name, entry in manifest.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != entry["size"]:
            what = f"process 0 does not see {name} as another process wrote it"
            where = "the run folder has to be on a file system that all machines share"
            raise RunError(f"checkpoint {final}: {what}; {where}")
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (aside / NUMBERS, aside / MANIFEST, aside):
        sync(path)


def on_all_ranks(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Every process's result of `work`, in rank order; an error on one process is raised on all.

    raises  OSError and RunError as they are, any other exception as a RunError
    """
    if ranks.world_size == 1:
        return [work()]
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = (work(), None)
    except (OSError, RunError) as error:
        outcome = (None, error)
    except Exception as error:
        outcome = (None, RunError(f"process {ranks.rank}: {type(error).__name__}: {error}"))
    outcomes = ranks.gather_objects(outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


def on_main(ranks: Ranks, work: Callable[[], None]) -> None:
    """Run `work` on process 0 only; its error is raised on all, as by `on_all_ranks`."""
    on_all_ranks(ranks, lambda: work() if ranks.is_main else None)


def _own_files(aside: Path, rank: int) -> dict[str, dict[str, Any]]:
    """The manifest's entries of the files that this process wrote."""
    paths = sorted(aside.glob(f"__{rank}_*"))
    if rank == 0:
        paths.append(aside / METADATA)
    return {path.name: _entry(path) for path in paths}


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": digest(path)}


def _ignore_expected_warnings() -> None:
    """Silence DCP's warnings of a single process, which is the normal case here, and of its own use of storages."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished folders of killed writers."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _of_steps(names: Iterable[str]) -> list[str]:
    """Those that are a checkpoint's, in order; what somebody has named otherwise, to keep it, is none."""
    return sorted(filter(STEP_NAME.fullmatch, names), key=lambda name: (len(name), name))


def _discard(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a kill never leaves a part of it under its name."""
    aside = path.with_name(f"{_UNFINISHED}{path.name}.{os.getpid()}.discarded")
    try:
        os.rename(path, aside)
    except OSError:
        aside = path
    shutil.rmtree(aside, ignore_errors=True)


def retire(folder: Path, keep: int, keep_hours: float | None = None) -> None:
    """Remove checkpoints except the newest `keep` (> 0), the best, and one per `keep_hours` hours (None: no more)."""
    paths = [folder / name for name in _of_steps(os.listdir(folder))]
    spared = {path.name for path in paths[-keep:]} | {read_pointer(folder, "best")}
    if keep_hours is not None:
        last: float | None = None
        for path in paths:
            written = json_files.number(json_files.read_json(path / NUMBERS).get("time"))
            # Counted from the last checkpoint kept, so that the choice never changes; abs() is for a clock set back.
            if math.isfinite(written) and (last is None or abs(written - last) >= keep_hours * 3600):
                spared.add(path.name)
                last = written
    for path in paths:
        if path.name not in spared:
            _discard(path)


# --------------------------------------------------------------------------------------------------------------
# Training states: reading


def verify(path: Path, ranks: Ranks = ALONE, digests: bool = True) -> dict[str, Any]:
    """Check a checkpoint against its manifest; returns its numbers.

    Called by all `ranks`, which get the same result; each computes the digests of its share of the files.

    digests  compute SHA-256 digests, too, not only sizes
    raises   RunError on all ranks, naming the file and the problem
    """
    with ranks.collective_errors():
        try:
            manifest = json.loads(read_regular(path / MANIFEST, MAX_BYTES))
            for number, (name, expected) in enumerate(manifest.items()):
                file = path / name
                if file.parent != path:
                    raise RunError(f"checkpoint {path}: its manifest names {name}, outside the checkpoint")
                if not file.is_file():
                    raise RunError(f"checkpoint {path}: {name} is missing")
                if (size := file.stat().st_size) != expected["size"]:
                    raise RunError(f"checkpoint {path}: {name} has {size} of {expected['size']} bytes")
                if digests and number % ranks.world_size == ranks.rank and digest(file) != expected["sha256"]:
                    raise RunError(f"checkpoint {path}: {name} is not what was written (its digest differs)")
            for name in sorted({METADATA, NUMBERS, *Reader(path).data_files()} - manifest.keys()):
                raise RunError(f"checkpoint {path}: its manifest does not name {name}")
            numbers: dict[str, Any] = json.loads(read_regular(path / NUMBERS, MAX_BYTES))
            version = numbers.get("version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"checkpoint {path}: unreadable ({reason(error)})") from None
        if version != VERSION:
            raise RunError(f"checkpoint {path}: format version {version}, expected {VERSION}")
    return numbers


def newest(folder: Path, ranks: Ranks = ALONE) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that passes `verify` (None: none), and a line per newer one that does not.

    Called by all processes, which get the same result.

    raises  RunError when the folder exists and cannot be listed
    """
    damaged = []
    with ranks.collective_errors():
        try:
            names = _of_steps(os.listdir(folder))[::-1]
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise RunError(f"checkpoints in {folder}: unreadable ({reason(error)})") from None
    for name in ranks.from_main(names):
        try:
            verify(folder / name, ranks)
        except RunError as error:
            damaged.append(f"{error}; passed over")
        else:
            return folder / name, damaged
    return None, damaged


def load(
    path: Path,
    tensors: dict[str, Any],
    numbers: dict[str, Any] | None = None,
    *,
    verified: bool = False,
    ranks: Ranks = ALONE,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Fill `tensors` (nested, as given to `save`; plain or DTensor) in place; returns the numbers.

    Called by all processes, of which there may be more or fewer than wrote it; each reads its own part.

    numbers   by name, values of the types that those in the checkpoint must have
    verified  `newest` has just checked the files: digests are not computed again
    optional  names that are taken out of `tensors` where the checkpoint has nothing of theirs
    raises    RunError when a file is damaged, UserError when the checkpoint is of another architecture
    """
    loaded = verify(path, ranks, digests=not verified)
    with ranks.collective_errors():
        for name, value in (numbers or {}).items():
            if type(loaded.get(name)) is not type(value):
                raise RunError(f"checkpoint {path}: unreadable ({NUMBERS} has no {type(value).__name__} {name})")
        reader = Reader(path)
        stored = reader.stored()
        for name in optional:
            if not any(key.startswith(f"{name}.") for key in stored):
                tensors.pop(name, None)
        for name, tensor in flatten(tensors).items():
            if name not in stored:
                raise UserError(f"checkpoint {path}: has no {name}; it belongs to another architecture")
            size, own = tuple(stored[name].size), tuple(tensor.shape)
            if size != own:
                what = f"{name} is {size}, this model has {own}"
                raise UserError(f"checkpoint {path}: {what}; it belongs to another architecture")
        _read(reader, tensors)
    return loaded


def read_plain(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, unsharded and on the CPU, by the rest of their names.

    path    a checkpoint's folder
    raises  RunError when the checkpoint cannot be read
    """
    reader = Reader(path)
    stored = {name: entry for name, entry in reader.stored().items() if name.startswith(prefix)}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    _read(reader, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read(reader: Reader, tensors: dict[str, Any]) -> None:
    """Fill `tensors` in place. Every process reads on its own: no communication is needed, whatever the sharding."""
    _ignore_expected_warnings()
    try:
        dcp.load(tensors, storage_reader=reader, planner=TensorPlanner(), no_dist=True)
    except (OSError, CheckpointException) as error:
        raise RunError(f"checkpoint {reader.path}: unreadable ({reason(error)})") from error


def flatten(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Nested tensors by dotted name, as in a checkpoint; values that are not tensors are left out."""
    return {name: value for name, value in json_files.flatten(tensors).items() if isinstance(value, Tensor)}


# --------------------------------------------------------------------------------------------------------------
# The plain teacher file


def write_teacher(run: Path, step: int, teacher: dict[str, Tensor], about: dict[str, Any], token: str = "") -> Path:
    """Write `teacher/step_….safetensors` (float32) and its `.json` into the run folder, each in one rename.

    teacher      by name: `backbone.*`, `dino_head.*` and, untied, `ibot_head.*`
    about        architecture, preprocessing and config_hash; step, format and digest are added
    token        as for `replacing`
    returns      the safetensors file
    raises       RunError when it cannot be written
    """
    folder = run / "teacher"
    path = folder / f"{step_name(step)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(path, teacher, {"step": step, **about}, token)
    except OSError as error:
        raise RunError(f"teacher file {path} could not be written: {reason(error)}") from error
    return path


def write_weights(path: Path, tensors: dict[str, Tensor], description: dict[str, Any], token: str = "") -> None:
    """Write tensors as float32 to a safetensors file, and `description` with the file's digest to the JSON beside it.

    raises  OSError
    """
    with replacing(path, token) as aside:
        save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, aside)
        share(aside)
        content = {"format": "dinoreg-teacher", "version": VERSION, **description, "sha256": digest(aside)}
        # First, so that the file never exists without its digest.
        write_atomic(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n", token)


def retire_teachers(run: Path) -> None:
    """Remove the teacher files whose checkpoints have been removed, except that of the best."""
    steps = {path.name for path in (run / "checkpoints").glob("step_*")} | {read_pointer(run / "checkpoints", "best")}
    for path in (run / "teacher").glob("step_*"):
        if path.suffix in (".safetensors", ".json") and STEP_NAME.fullmatch(path.stem) and path.stem not in steps:
            path.unlink(missing_ok=True)
