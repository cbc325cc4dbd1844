"""The index of a folder of images: which files it holds, found once and cached, in one deterministic order.

Names are kept as one block of bytes, so that a million files cost tens of megabytes and no Python object
each. Files are not examined one by one: on a network file system that would take minutes. A kept index is
trusted while every folder's modification time is the one that was seen when it was built.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dinoreg.runtime.errors import UserError, readable
from dinoreg.runtime.places import ending_of, is_url, names_below
from dinoreg.runtime.regular_files import open_regular

_FORMATS = "jpg jpeg jpe jfif mpo png webp tif tiff bmp gif ppm pgm pbm pnm dcm dicom"
EXTENSIONS = frozenset(f".{name}" for name in _FORMATS.split())
# What unpacking on other systems and storage servers put beside pictures: copies of names, and thumbnails.
_LITTER = frozenset(("__MACOSX", "@eaDir"))
SETTLED_NS = 1_000_000_000
_VERSION = 4


class PathBlock:
    """An immutable sequence of paths, stored as NUL-terminated names in one block of bytes.

    passed_over  how many other files were found beside them, by ending (".heic", "" for none)
    """

    def __init__(self, block: bytes, passed_over: Mapping[str, int] | None = None) -> None:
        self.block, self.passed_over = block, dict(passed_over or {})
        self._ends = np.flatnonzero(self.as_array() == 0)

    @classmethod
    def of(cls, paths: Iterable[str], passed_over: Mapping[str, int] | None = None) -> PathBlock:
        """The block of these paths; names that are no text keep their bytes."""
        return cls(b"".join(os.fsencode(path) + b"\0" for path in paths), passed_over)

    def as_array(self) -> np.ndarray:
        """(n,) uint8, to be stored in a file of arrays."""
        return np.frombuffer(self.block, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self.block[start : int(self._ends[index])])


def index_folder(root: str | os.PathLike[str], index_dir: str | os.PathLike[str] | None = None) -> PathBlock:
    """The image files below a folder or its URL, as paths relative to it: by extension in any case, no hidden ones.

    index_dir  where the index is kept; by default the user's cache folder. One that cannot be written is
               done without.

    Folders are entered in the order of their names, a folder's own files first. Linked folders are followed, but
    not into a folder that they lie in; a link that leads nowhere counts as an unreadable image if it is called like
    one. Raises UserError for a folder that is missing, cannot be read or holds no image.
    """
    if is_url(root):
        return _scan_url(str(root))
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        what = "is a file, expected a folder" if os.path.exists(root) else "does not exist"
        raise UserError(f"data: {root} {what}")
    file = index_file(os.fsencode(root), index_dir)
    evidence = f"{_VERSION} {root}"
    kept = load_index(file, evidence)
    if kept is not None and _unchanged(root, PathBlock(kept["folders"].tobytes()), kept["times"]):
        endings = PathBlock(kept["endings"].tobytes())
        return PathBlock(kept["paths"].tobytes(), dict(zip(endings, kept["counts"].tolist())))
    started = time.time_ns()
    paths, folders, times = _scan(root)
    if not len(paths):
        known = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise UserError(f"data: no image files below {root} (looked for {known})")
    arrays = {
        "folders": PathBlock.of(folders).as_array(),
        "times": np.array(times),
        "paths": paths.as_array(),
        "endings": PathBlock.of(list(paths.passed_over)).as_array(),
        "counts": np.array(list(paths.passed_over.values()), dtype=np.int64),
    }
    save_index(file, evidence, arrays, started, newest=max(times))
    return paths


def cache_folder() -> Path:
    """Where this user's caches live: $XDG_CACHE_HOME/dinoreg, or ~/.cache/dinoreg."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dinoreg"


def index_file(key: bytes, index_dir: str | os.PathLike[str] | None) -> Path:
    """Where the index of what `key` names is kept; without `index_dir` in the user's cache folder."""
    digest = hashlib.sha256(key).hexdigest()[:32]
    return Path(index_dir or cache_folder() / "index") / f"{digest}.npz"


def kept_index(
    key: str,
    evidence: tuple[int, Sequence[tuple[str, int, str]]],
    index_dir: str | os.PathLike[str] | None,
    find: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The arrays that `find` returns, or those that it returned for the same evidence before.

    key       names what is indexed
    evidence  a version, and (place, size, what changes with the content) of every file that the arrays depend on
    """
    file, started = index_file(os.fsencode(key), index_dir), time.time_ns()
    told = hashlib.sha256(repr(evidence).encode()).hexdigest()
    arrays = load_index(file, told)
    if arrays is None:
        arrays = find()
        times = (int(change) for _, _, change in evidence[1] if change.isdecimal())
        save_index(file, told, arrays, started, newest=max(times, default=0))
    return arrays


def load_index(file: Path, evidence: str) -> dict[str, np.ndarray] | None:
    """The arrays of an index that was kept for this very evidence; None when there is none or it is damaged."""
    try:
        with open_regular(file) as opened, np.load(opened, allow_pickle=False) as kept:
            arrays = dict(kept)
    except Exception:  # a damaged archive ends in many kinds, all with the same meaning here
        return None
    return arrays if "evidence" in arrays and arrays["evidence"].tobytes() == os.fsencode(evidence) else None


def save_index(file: Path, evidence: str, arrays: dict[str, np.ndarray], started: int, newest: int) -> None:
    """Keep an index, whole or not at all; a full or read-only cache costs the next start a scan, nothing more.

    evidence         what the index depends on, as text
    started, newest  nanoseconds: when the scan began, and when what it found was last changed. A change in the second
                     before the scan may be followed by another one that no time tells: such an index is not kept
    """
    if newest > started - SETTLED_NS:
        return
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as opened:
            temporary = opened.name
            text = np.frombuffer(os.fsencode(evidence), dtype=np.uint8)
            np.savez(opened, allow_pickle=False, evidence=text, **arrays)
        os.replace(temporary, file)
    except OSError:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _unchanged(root: str, folders: PathBlock, times: np.ndarray) -> bool:
    """Whether every folder below `root` still has the modification time that was seen."""
    try:
        return all(os.stat(os.path.join(root, folder)).st_mtime_ns == time for folder, time in zip(folders, times))
    except OSError:
        return False


def _scan(root: str) -> tuple[PathBlock, list[str], list[int]]:
    """All image paths, and every folder visited (relative) with its modification time in nanoseconds."""
    pieces: list[bytes] = []
    folders: list[str] = []
    times: list[int] = []
    passed_over: Counter[str] = Counter()
    inside: dict[str, frozenset[tuple[int, int]]] = {root: frozenset()}  # what each folder lies in

    def refuse(error: OSError) -> None:
        with readable(f"data: the folder {error.filename}"):
            raise error

    for path, below, names in os.walk(root, onerror=refuse, followlinks=True):
        with readable(f"data: the folder {path}"):
            status = os.stat(path)
        above, identity = inside.pop(path), (status.st_dev, status.st_ino)
        below[:] = [] if identity in above else sorted(name for name in below if _is_shown(name))
        if identity in above:
            continue
        inside.update((os.path.join(path, name), above | {identity}) for name in below)
        folder = path[len(root) :].lstrip(os.sep)
        folders.append(folder)
        times.append(status.st_mtime_ns)
        shown = [name for name in names if _is_shown(name)]
        pictures = [name for name in shown if ending_of(name) in EXTENSIONS]
        passed_over.update(ending for name in shown if (ending := ending_of(name)) not in EXTENSIONS)
        pieces.extend(sorted(os.fsencode(os.path.join(folder, name)) + b"\0" for name in pictures))
    return PathBlock(b"".join(pieces), passed_over), folders, times


def _scan_url(url: str) -> PathBlock:
    """The pictures below a folder at a URL, whose listing is not kept, as nothing says when it changes."""
    names = [name for name in names_below(url) if not re.search(r"(?:^|/)\.", name)]
    pictures = [os.fsencode(name) + b"\0" for name in names if ending_of(name) in EXTENSIONS]
    if not pictures:
        raise UserError(f"data: no image files below {url}, and {len(names):,} others")
    return PathBlock(b"".join(pictures), Counter(each for each in map(ending_of, names) if each not in EXTENSIONS))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name not in _LITTER
