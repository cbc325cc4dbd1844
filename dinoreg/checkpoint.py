"""Training states on disk (torch.distributed.checkpoint) and the plain teacher file.

A checkpoint is written into a folder of another name, its files' digests into a manifest, everything is flushed to
the disk, and only then the folder gets its final name: under that name there is a whole checkpoint or none. Reading
verifies the manifest first and never runs code: DCP's metadata goes through a reader that admits its own classes only.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dinoreg.errors import RunError, UserError

VERSION = 1
MANIFEST = "manifest.json"
NUMBERS = "state.json"
_UNFINISHED = ".unfinished-"


def step_name(step: int) -> str:
    return f"step_{step:07d}"


# --------------------------------------------------------------------------------------------------------------
# Files that are there whole or not at all


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` in one rename; a kill leaves the old content or the new."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f"{path.name}.part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    running = hashlib.sha256()
    while block := file.read(1 << 20):
        running.update(block)
    return running.hexdigest()


# --------------------------------------------------------------------------------------------------------------
# Pointers: `last` and `best` hold the name of a step


def write_pointer(folder: Path, name: str, step: int) -> None:
    write_atomic(folder / name, step_name(step) + "\n")


def read_pointer(folder: Path, name: str) -> str | None:
    """The step's name that `last` or `best` points to, or None."""
    try:
        target = (folder / name).read_text().strip()
    except FileNotFoundError:
        return None
    return target if target.startswith("step_") and target[5:].isdigit() else None


# --------------------------------------------------------------------------------------------------------------
# Training states


def save(
    folder: Path, step: int, tensors: dict[str, Any], numbers: dict[str, Any], keep: int, best: bool = False
) -> Path:
    """Write `folder/step_…`, point `last` (and `best`) to it, and remove all but the newest `keep` and the best.

    raises RunError when the disk is full or not writable; the previous checkpoint stays as it was
    """
    final = folder / step_name(step)
    aside = folder / f"{_UNFINISHED}{step_name(step)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        aside.mkdir()
        with _quiet():
            dcp.save(tensors, checkpoint_id=aside, no_dist=not torch.distributed.is_initialized())
        (aside / NUMBERS).write_text(json.dumps({"version": VERSION, **numbers}))
        files = sorted(path for path in aside.iterdir() if path.is_file())
        manifest = {path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files, aside / MANIFEST, aside):
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
        sync(folder)
        write_pointer(folder, "last", step)
        if best:
            write_pointer(folder, "best", step)
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"checkpoint {final} could not be written: {_reason(error)}") from error
    _retire(folder, keep)
    return final


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest; returns its numbers. Raises RunError naming what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            file = path / name
            if file.parent != path:
                raise RunError(f"checkpoint {path}: its manifest names {name}, outside the checkpoint")
            if not file.is_file():
                raise RunError(f"checkpoint {path}: {name} is missing")
            if file.stat().st_size != expected["size"]:
                raise RunError(f"checkpoint {path}: {name} has {file.stat().st_size} of {expected['size']} bytes")
            if digest(file) != expected["sha256"]:
                raise RunError(f"checkpoint {path}: {name} is not what was written (its digest differs)")
        numbers = json.loads((path / NUMBERS).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint {path}: unreadable ({_reason(error)})") from None
    if numbers.get("version") != VERSION:
        raise RunError(f"checkpoint {path}: format version {numbers.get('version')}, expected {VERSION}")
    return numbers


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with those that were passed over."""
    damaged = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            verify(path)
        except RunError as error:
            damaged.append(f"{error}; passed over")
            continue
        return path, damaged
    return None, damaged


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` (nested, as given to `save`) in place; returns the numbers.

    raises RunError when a file is damaged, UserError when the checkpoint is of another architecture
    """
    numbers = verify(path)
    reader = _Reader(path)
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in _flatten(tensors):
        if name not in stored:
            raise UserError(f"checkpoint {path}: has no {name}; it belongs to another architecture")
        size = getattr(stored[name], "size", None)
        if size is not None and tuple(size) != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {path}: {name} is {tuple(size)}, this model has {tuple(tensor.shape)}; "
                "it belongs to another architecture"
            )
    with _quiet():
        dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns whenever it is used by a single process, which here is the plain case."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed writer left behind."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _retire(folder: Path, keep: int) -> None:
    best = read_pointer(folder, "best")
    for path in sorted(folder.glob("step_*"))[:-keep]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)


def _flatten(tensors: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    flat = []
    for name, value in tensors.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's `.metadata`, which is a pickle, admitting only the plain data classes it consists of."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = (
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        ("pathlib", "WindowsPath"),
        ("pathlib", "PurePosixPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in self._MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif (module, name) in self._NAMES:
            return super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.memory_format)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


class _Reader(dcp.FileSystemReader):
    """DCP's reader with the restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError) as error:
            raise RunError(f"checkpoint {path}: unreadable ({_reason(error)})") from None
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.StorageMeta()  # type: ignore[attr-defined]
        metadata.storage_meta.load_id = self.load_id
        return metadata


# --------------------------------------------------------------------------------------------------------------
# The plain teacher file


def write_teacher(run: Path, step: int, teacher: dict[str, Tensor], description: dict[str, Any]) -> Path:
    """`teacher/step_….safetensors` (keys `backbone.*`, `dino_head.*`, float32) and its `.json`, each whole.

    description  architecture, preprocessing and config_hash; the digest of the weights is added here
    """
    folder = run / "teacher"
    weights = folder / f"{step_name(step)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = weights.with_name(f"{weights.name}.part")
        save_file({name: t.detach().float().cpu().contiguous() for name, t in teacher.items()}, aside)
        description = {
            "format": "dinoreg-teacher",
            "version": VERSION,
            "step": step,
            **description,
            "sha256": digest(aside),
        }
        sync(aside)
        write_atomic(weights.with_suffix(".json"), json.dumps(description, indent=1) + "\n")
        os.replace(aside, weights)
        sync(folder)
    except OSError as error:
        raise RunError(f"teacher file {weights} could not be written: {_reason(error)}") from error
    return weights


def retire_teachers(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` teacher files and the best."""
    best = read_pointer(run / "checkpoints", "best")
    for weights in sorted((run / "teacher").glob("step_*.safetensors"))[:-keep]:
        if weights.stem != best:
            weights.unlink(missing_ok=True)
            weights.with_suffix(".json").unlink(missing_ok=True)
