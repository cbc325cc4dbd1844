"""From `data=` to a source: a folder, several, a list of paths, a declared dataset, or the embedded scenes."""

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from dinoreg.data.declared import KINDS, open_named
from dinoreg.data.folder_index import EXTENSIONS, PathBlock, index_folder
from dinoreg.data.source import JoinedSource, PathSource, ScenesSource, Source
from dinoreg.data.tables import inside, parquet_table, rows_of
from dinoreg.data.value_range import ValueRange
from dinoreg.runtime.errors import UserError

LISTS = (".txt", ".lst", ".csv", ".tsv", ".parquet")


def open_source(
    spec: str | os.PathLike[str] | Sequence[str],
    weights: Sequence[float] | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    value_range: Sequence[float] | None = None,
) -> Source:
    """Open what `data=` names.

    spec       a folder; a list of paths; "scenes" or "scenes:count=20000,size=64,seed=0"; a dataset that is
               declared in `eval/`, as "imagenet22k:root=/datasets"; or a sequence of these
    weights    for a sequence: each source's share of the draws (any positive numbers); by default by their
               sizes
    index_dir  where folder indexes are kept; by default the user's cache folder
    root       the folder that the paths of a list must stay in; by default the list's own
    value_range  LOW,HIGH of the whole data set, or of each channel; by default each file's type says it

    Raises UserError, in one line, for what is missing, empty, unreadable or of an unknown kind.
    """
    source = _open(spec, weights, index_dir, root)
    source.value_range = ValueRange.of(value_range)
    return source


def _open(
    spec: str | os.PathLike[str] | Sequence[str],
    weights: Sequence[float] | None,
    index_dir: str | os.PathLike[str] | None,
    root: str | os.PathLike[str] | None,
) -> Source:
    if not isinstance(spec, (str, os.PathLike)):
        if not spec:
            raise UserError(f"data is an empty list, expected {KINDS}")
        if weights is not None and len(weights) != len(spec):
            raise UserError(f"data.weights has {len(weights)} numbers for {len(spec)} sources")
        if weights is not None and not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"data.weights={list(weights)}: expected positive numbers")
        parts = [_open(part, None, index_dir, root) for part in spec]
        return parts[0] if len(parts) == 1 else JoinedSource(parts, weights)
    if weights is not None and len(weights) != 1:
        raise UserError(f"data.weights has {len(weights)} numbers for one source ({spec})")
    spec = os.path.expanduser(os.fspath(spec))
    if not spec:
        raise UserError(f"data is empty, expected {KINDS}")
    name, colon, options = spec.partition(":")
    if name == "scenes" and not os.path.exists(spec):
        return _open_scenes(options)
    if os.path.isdir(spec):
        return PathSource(os.path.abspath(spec), index_folder(spec, index_dir))
    if os.path.isfile(spec):
        return _open_list(spec, root)
    if colon and name.isidentifier():
        return open_named(name, options, None if index_dir is None else os.fspath(index_dir))
    raise UserError(f"data: {spec} does not exist, expected {KINDS}")


def labelled_folder(
    path: str | os.PathLike[str],
    index_dir: str | os.PathLike[str] | None = None,
    value_range: Sequence[float] | None = None,
) -> tuple[PathSource, np.ndarray, list[str]]:
    """A folder with one subfolder per class, for probes.

    Returns the source, its labels (n,) int64 and the class names in order. Files beside the subfolders are
    left out. Raises UserError when there are fewer than two classes.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    paths = [path for path in index_folder(root, index_dir) if os.sep in path]
    folders = [name.split(os.sep, 1)[0] for name in paths]
    names = sorted(set(folders))
    if len(names) < 2:
        raise UserError(f"{root} has {len(names)} subfolder(s) with images, expected one per class, at least two")
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[folder] for folder in folders], dtype=np.int64)
    source = PathSource(root, PathBlock.of(paths))
    source.value_range = ValueRange.of(value_range)
    return source, labels, names


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
    if suffix not in LISTS:
        raise UserError(f"data: {spec} is a file, expected {KINDS}")
    folder = os.path.abspath(os.path.expanduser(os.fspath(root)) if root else os.path.dirname(spec) or ".")
    entries = _parquet_paths(spec) if suffix == ".parquet" else _text_paths(spec, suffix in (".csv", ".tsv"))
    block = PathBlock.of([inside(folder, entry, f"data: {spec} line {line}", "data.root") for line, entry in entries])
    if not len(block):
        raise UserError(f"data: the list {spec} names no files")
    return PathSource(folder, block)


def _text_paths(spec: str, tabular: bool) -> Iterator[tuple[int, str]]:
    """(line number, path) of a list; of a table the column `path`, or the first."""
    column = 0
    for number, (line, cells) in enumerate(rows_of(spec, f"data: the list {spec}")):
        if tabular and number == 0 and "path" in cells:
            column = cells.index("path")
        elif tabular and number == 0 and os.path.splitext(cells[0])[1].lower() not in EXTENSIONS:
            continue  # the names of the columns
        elif len(cells) > column and cells[column]:
            yield line, cells[column]


def _parquet_paths(spec: str) -> Iterator[tuple[int, str]]:
    table = parquet_table(spec, f"data: the list {spec}", "path")
    values = table.column(0).to_pylist()
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"data: the column {table.column_names[0]!r} of {spec} does not hold paths")
    yield from enumerate(values, 1)
