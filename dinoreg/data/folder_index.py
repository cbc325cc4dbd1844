"""The index of a folder of images: which files it holds, found once and cached, in one deterministic order.

Names are kept as one block of bytes, so that a million files cost tens of megabytes and no Python object
each. Files are not examined one by one: on a network file system that would take minutes. A kept index is
trusted while every folder's modification time is the one that was seen when it was built.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from dinoreg.runtime.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
_VERSION = 1
SETTLED_NS = 1_000_000_000  # a folder changed within a second of the scan may change again unseen


class PathBlock:
    """An immutable sequence of paths, stored as NUL-terminated names in one block of bytes."""

    def __init__(self, block: bytes) -> None:
        self.block = block
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 0)
        self._ends = ends.astype(np.int64)

    @classmethod
    def of(cls, paths: list[str]) -> PathBlock:
        return cls(b"".join(os.fsencode(path) + b"\0" for path in paths))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self.block[start : int(self._ends[index])])


def index_folder(root: str | os.PathLike[str], index_dir: str | os.PathLike[str] | None = None) -> PathBlock:
    """The image files below a folder, as paths relative to it: by extension in any case, no hidden ones.

    index_dir  where the index is kept; by default the user's cache folder. One that cannot be written is
               done without.

    Folders are entered in the order of their names, a folder's own files first. Linked folders are followed,
    each real folder once. Raises UserError for a folder that is missing, cannot be read or holds no image.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        what = "is a file, expected a folder" if os.path.exists(root) else "does not exist"
        raise UserError(f"data: {root} {what}")
    cache = _index_path(root, index_dir)
    paths = _read_index(cache, root) if cache else None
    if paths is None:
        started = time.time_ns()
        paths, folders, times = _scan(root)
        if cache and len(paths):
            _write_index(cache, root, paths, folders, times, started)
    if not len(paths):
        known = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise UserError(f"data: no image files below {root} (looked for {known})")
    return paths


def cache_folder() -> Path:
    """Where this user's caches live: $XDG_CACHE_HOME/dinoreg, or ~/.cache/dinoreg."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dinoreg"


def _index_path(root: str, index_dir: str | os.PathLike[str] | None) -> Path:
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
    return Path(index_dir or cache_folder() / "index") / f"{digest}.npz"


def _scan(root: str) -> tuple[PathBlock, list[str], list[int]]:
    """All image paths, and every folder visited (relative) with its modification time in nanoseconds."""
    pieces: list[bytes] = []
    folders: list[str] = []
    times: list[int] = []
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            names, below = _list_folder(path)
        except OSError as error:
            raise UserError(f"data: cannot read the folder {path}: {error.strerror}") from error
        folders.append(folder)
        times.append(status.st_mtime_ns)
        prefix = os.fsencode(folder) + b"/" if folder else b""
        pieces.extend(prefix + name + b"\0" for name in sorted(names))
        waiting.extend(os.path.join(folder, name) for name in sorted(below, reverse=True))
    return PathBlock(b"".join(pieces)), folders, times


def _list_folder(path: str) -> tuple[list[bytes], list[str]]:
    """The names of a folder's image files, and of its subfolders."""
    names: list[bytes] = []
    below: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            if entry.is_dir():
                below.append(entry.name)
            elif is_image and entry.is_file():
                names.append(os.fsencode(entry.name))
    return names, below


def _read_index(cache: Path, root: str) -> PathBlock | None:
    """The cached index of `root`; None when there is none, it is damaged, or the folder has changed since."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            if int(file["version"]) != _VERSION or file["root"].tobytes() != os.fsencode(root):
                return None
            folders, times = PathBlock(file["folders"].tobytes()), file["times"]
            if len(folders) != len(times) or times.max(initial=0) > int(file["scanned"]) - SETTLED_NS:
                return None
            for index in range(len(folders)):
                if os.stat(os.path.join(root, folders[index])).st_mtime_ns != times[index]:
                    return None
            return PathBlock(file["paths"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_index(cache: Path, root: str, paths: PathBlock, folders: list[str], times: list[int], scanned: int) -> None:
    arrays = {
        "version": np.array(_VERSION),
        "root": np.frombuffer(os.fsencode(root), dtype=np.uint8),
        "scanned": np.array(scanned, dtype=np.int64),
        "folders": np.frombuffer(PathBlock.of(folders).block, dtype=np.uint8),
        "times": np.array(times, dtype=np.int64),
        "paths": np.frombuffer(paths.block, dtype=np.uint8),
    }
    save_arrays(cache, arrays)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an index whole or not at all; a full or read-only cache costs the next start a scan, nothing more."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
