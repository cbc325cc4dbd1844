"""Where images come from: a folder, several, a list of paths, or the embedded scenes, all with one face.

A source hands out undecoded images by index. It knows nothing of order, crops or batches.
"""

from __future__ import annotations

import csv
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dinoreg.data import scenes
from dinoreg.data.decode import BadImage
from dinoreg.data.index import EXTENSIONS, PathBlock, index_folder
from dinoreg.data.named import open_named
from dinoreg.errors import UserError

KINDS = (
    "a folder, a list of paths (.txt .csv .tsv .parquet), scenes[:count=,size=,seed=], "
    "a dataset by name (imagenet22k:root=FOLDER)"
)
_LISTS = (".txt", ".lst", ".csv", ".tsv", ".parquet")
STAMPED_FILES = 50_000  # whose sizes and times are looked at when features are cached
SCENES_CACHE_BYTES = 1 << 30  # rendered scenes kept in memory at most


class Group(NamedTuple):
    """A run of consecutive indices that is shuffled on its own and drawn with a share of `weight`."""

    start: int
    length: int
    weight: float


class Source(ABC):
    """Images by index, undecoded. Safe to read from many threads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """A file's bytes, or pixels (H, W, C) uint8. Raises BadImage when the file cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person calls this image: its path, or "scenes:17"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images or their order do."""

    def stamp(self) -> str:
        """As `fingerprint`, and it also changes when images are replaced under their old names."""
        return self.fingerprint()

    def groups(self) -> list[Group]:
        """How the indices are drawn; one group unless the source is a weighted mixture."""
        return [Group(0, len(self), 1.0)]


class PathSource(Source):
    """Files below one root folder."""

    def __init__(self, root: str, paths: PathBlock) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.paths.block).hexdigest()[:16]

    def stamp(self) -> str:
        """By sizes and times of change; of more than STAMPED_FILES files, of that many at equal distances."""
        digest = hashlib.sha256(self.paths.block)
        count = min(len(self), STAMPED_FILES)
        for index in np.linspace(0, len(self) - 1, count).astype(np.int64):
            try:
                found = os.stat(self.name(int(index)))
                digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
            except OSError:
                digest.update(b"missing ")
        return digest.hexdigest()[:16]


class ScenesSource(Source):
    """The embedded procedural pictures first..first+count, rendered when first read, then kept in memory."""

    def __init__(self, count: int = 20_000, size: int = 64, seed: int = 0, first: int = 0) -> None:
        self.count, self.size, self.seed, self.first = count, size, seed, first
        cached = min(count, SCENES_CACHE_BYTES // (size * size * 3))
        # Memory is only taken page by page as scenes are stored.
        self._cache = np.empty((cached, size, size, 3), dtype=np.uint8)
        self._filled = np.zeros(cached, dtype=bool)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        if index < len(self._filled):
            if not self._filled[index]:
                # Two threads may render the same scene; both write the same pixels.
                self._cache[index] = self._render(index)
                self._filled[index] = True
            return self._cache[index]
        return self._render(index)

    def _render(self, index: int) -> np.ndarray:
        return scenes.render_image(self.first + index, self.size, self.seed)

    def name(self, index: int) -> str:
        return f"scenes:{self.first + index}"

    def fingerprint(self) -> str:
        text = f"scenes count={self.count} size={self.size} seed={self.seed} first={self.first}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class JoinedSource(Source):
    """Several sources in a row; with weights, a mixture in which each has its share of the draws."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.parts, self.weights = list(parts), weights
        self._starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def read(self, index: int) -> bytes | np.ndarray:
        part, local = self._locate(index)
        return part.read(local)

    def name(self, index: int) -> str:
        part, local = self._locate(index)
        return part.name(local)

    def fingerprint(self) -> str:
        parts = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr((parts, self.weights)).encode()).hexdigest()[:16]

    def groups(self) -> list[Group]:
        if self.weights is None:
            return super().groups()
        total = sum(self.weights)
        return [
            Group(int(start), len(part), weight / total)
            for start, part, weight in zip(self._starts, self.parts, self.weights)
        ]


class ChosenSource(Source):
    """Some images of another source, in the order of `indices`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        return self._with_indices(self.source.fingerprint())

    def stamp(self) -> str:
        return self._with_indices(self.source.stamp())

    def _with_indices(self, text: str) -> str:
        return hashlib.sha256(text.encode() + self.indices.tobytes()).hexdigest()[:16]


def open_source(
    spec: str | os.PathLike[str] | Sequence[str],
    weights: Sequence[float] | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Source:
    """Open what `data=` names.

    spec       a folder; a list of paths; "scenes" or "scenes:count=20000,size=64,seed=0"; a dataset that is
               declared in `eval/`, as "imagenet22k:root=/datasets"; or a sequence of these
    weights    for a sequence: each source's share of the draws (any positive numbers); by default by their
               sizes
    index_dir  where folder indexes are kept; by default the user's cache folder
    root       the folder that the paths of a list must stay in; by default the list's own

    Raises UserError, in one line, for what is missing, empty, unreadable or of an unknown kind.
    """
    if not isinstance(spec, (str, os.PathLike)):
        return _open_several(list(spec), weights, index_dir, root)
    if weights is not None and len(weights) != 1:
        raise UserError(f"data.weights has {len(weights)} numbers for one source ({spec})")
    spec = os.path.expanduser(os.fspath(spec))
    if not spec:
        raise UserError(f"data is empty, expected {KINDS}")
    name, colon, options = spec.partition(":")
    if name == "scenes" and not os.path.exists(spec):
        return _open_scenes(options)
    if os.path.isdir(spec):
        absolute = os.path.abspath(spec)
        return PathSource(absolute, index_folder(absolute, index_dir))
    if os.path.isfile(spec):
        return _open_list(spec, root)
    if colon and name.isidentifier():
        return open_named(name, options, None if index_dir is None else os.fspath(index_dir), KINDS)
    raise UserError(f"data: {spec} does not exist, expected {KINDS}")


def labelled_folder(
    path: str | os.PathLike[str], index_dir: str | os.PathLike[str] | None = None
) -> tuple[PathSource, np.ndarray, list[str]]:
    """A folder with one subfolder per class, for probes.

    Returns the source, its labels (n,) int64 and the class names in order. Files beside the subfolders are
    left out. Raises UserError when there are fewer than two classes.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    found = index_folder(root, index_dir)
    inside = [name for name in (found[i] for i in range(len(found))) if os.sep in name]
    folders = [name.split(os.sep, 1)[0] for name in inside]
    names = sorted(set(folders))
    if len(names) < 2:
        raise UserError(f"{root} has {len(names)} subfolder(s) with images, expected one per class, at least two")
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[folder] for folder in folders], dtype=np.int64)
    return PathSource(root, PathBlock.of(inside)), labels, names


def _open_several(
    specs: list[str],
    weights: Sequence[float] | None,
    index_dir: str | os.PathLike[str] | None,
    root: str | os.PathLike[str] | None,
) -> Source:
    if not specs:
        raise UserError(f"data is an empty list, expected {KINDS}")
    if weights is not None:
        if len(weights) != len(specs):
            raise UserError(f"data.weights has {len(weights)} numbers for {len(specs)} sources")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"data.weights={list(weights)}: expected positive numbers")
    parts = [open_source(spec, None, index_dir, root) for spec in specs]
    return parts[0] if len(parts) == 1 else JoinedSource(parts, weights)


def _open_scenes(options: str) -> ScenesSource:
    values = {"count": 20_000, "size": 64, "seed": 0, "first": 0}
    least = {"count": 1, "size": 16, "seed": 0, "first": 0}
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        if key not in values:
            raise UserError(f"data: scenes has no option {key!r}, expected {', '.join(values)}")
        try:
            values[key] = int(text)
        except ValueError:
            raise UserError(f"data: scenes:{key}={text!r} is not a whole number") from None
        if values[key] < least[key]:
            raise UserError(f"data: scenes:{key}={values[key]} is below {least[key]}")
    return ScenesSource(**values)


def _open_list(spec: str, root: str | os.PathLike[str] | None) -> PathSource:
    suffix = os.path.splitext(spec)[1].lower()
    if suffix not in _LISTS:
        raise UserError(f"data: {spec} is a file, expected {KINDS}")
    folder = os.path.abspath(os.path.expanduser(os.fspath(root)) if root else os.path.dirname(spec) or ".")
    try:
        entries = _read_parquet(spec) if suffix == ".parquet" else _read_text(spec, suffix)
    except OSError as error:
        raise UserError(f"data: cannot read the list {spec}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"data: the list {spec} is not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"data: the list {spec} is not valid CSV: {error}") from None
    block = PathBlock.of([_inside(folder, entry, spec, line) for line, entry in entries])
    if not len(block):
        raise UserError(f"data: the list {spec} names no files")
    return PathSource(folder, block)


def _inside(folder: str, entry: str, spec: str, line: int) -> str:
    """`entry` relative to `folder`; UserError when it would leave it."""
    path = os.path.normpath(os.path.join(folder, entry))
    if "\0" in entry or (path != folder and not path.startswith(os.path.join(folder, ""))):
        raise UserError(f"data: {spec} line {line}: {entry!r} leaves {folder}; allow it with data.root=FOLDER")
    return os.path.relpath(path, folder)


def _read_text(spec: str, suffix: str) -> list[tuple[int, str]]:
    """(line number, path) of a list; of a CSV the column `path`, or the first."""
    with open(spec, encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as file:
        if suffix not in (".csv", ".tsv"):
            lines: Iterable[tuple[int, str]] = enumerate((line.rstrip("\r\n") for line in file), 1)
            return [(number, line) for number, line in lines if line.strip()]
        rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        column, entries = 0, []
        for number, row in enumerate(rows, 1):
            if number == 1 and "path" in row:
                column = row.index("path")
            elif number == 1 and row and os.path.splitext(row[0])[1].lower() not in EXTENSIONS:
                continue  # the names of the columns
            elif len(row) > column and row[column]:
                entries.append((rows.line_num, row[column]))
        return entries


def _read_parquet(spec: str) -> list[tuple[int, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"data: reading {spec} needs pyarrow: pip install 'dinoreg[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(spec)
        names = file.schema_arrow.names
        column = "path" if "path" in names else names[0]
        values = file.read(columns=[column]).column(0).to_pylist()
    except (pyarrow.ArrowException, IndexError) as error:
        raise UserError(f"data: {spec} is not a readable parquet file: {str(error).splitlines()[0]}") from None
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"data: the column {column!r} of {spec} does not hold paths")
    return list(enumerate(values, 1))
