"""From `data=` to a source: a folder, several, a list of paths, a declared dataset, or the embedded scenes."""

import math
import os
from collections.abc import Sequence

from dinoreg.data.declared import KINDS, find_named, open_named
from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.labelled import LabelledImages
from dinoreg.data.labelled_folder import read_labelled_folder
from dinoreg.data.labelled_table import read_labelled_table
from dinoreg.data.source import JoinedSource, PathSource, ScenesSource, Source
from dinoreg.data.tables import LISTS, TABLES, Columns, column_names, inside, open_table
from dinoreg.data.value_range import ValueRange
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import listed


def open_source(
    spec: str | os.PathLike[str] | Sequence[str],
    weights: Sequence[float] | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    value_range: Sequence[float] | None = None,
    columns: str = "",
) -> Source:
    """Open what `data=` names.

    spec       a folder; a list of paths; the drawn "scenes:" or "scenes:count=20000,size=64,seed=0"; a dataset that is
               declared in `eval/`, as "imagenet22k:root=/datasets"; or a sequence of these
    weights    for a sequence: each source's share of the draws (any positive numbers); by default by their
               sizes
    index_dir  where folder indexes are kept; by default the user's cache folder
    root       the folder that the paths of a list must stay in; by default the list's own
    value_range  LOW,HIGH of the whole data set, or of each channel; by default each file's type says it
    columns    of tables, "path:NAME"; by default the column `path` or one that is called as paths usually are.
               "path:RED,path:NIR" where each channel is a file of its own

    Raises UserError, in one line, for what is missing, empty, unreadable or of an unknown kind.
    """
    source = _open(spec, weights, index_dir, root, column_names(columns, "columns"))
    source.value_range = ValueRange.of(value_range)
    return source


def _open(
    spec: str | os.PathLike[str] | Sequence[str],
    weights: Sequence[float] | None,
    index_dir: str | os.PathLike[str] | None,
    root: str | os.PathLike[str] | None,
    columns: Columns,
) -> Source:
    if not isinstance(spec, (str, os.PathLike)):
        if not spec:
            raise UserError(f"data is an empty list, expected {KINDS}")
        if weights is not None and len(weights) != len(spec):
            raise UserError(f"data.weights has {len(weights)} numbers for {len(spec)} sources")
        if weights is not None and not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"data.weights={list(weights)}: expected positive numbers")
        parts = [_open(part, None, index_dir, root, columns) for part in spec]
        return parts[0] if len(parts) == 1 else JoinedSource(parts, weights)
    if weights is not None and len(weights) != 1:
        raise UserError(f"data.weights has {len(weights)} numbers for one source ({spec})")
    is_text, spec = isinstance(spec, str), os.path.expanduser(os.fspath(spec))
    name, _, options = spec.partition(":")
    if is_text and is_scenes(spec):
        return _open_scenes(options)
    if os.path.isdir(spec):
        return PathSource(os.path.abspath(spec), index_folder(spec, index_dir))
    if os.path.isfile(spec):
        return _open_list(spec, root, columns)
    check_source(spec)
    return open_named(name, options, None if index_dir is None else os.fspath(index_dir))


def check_source(spec: str | os.PathLike[str] | Sequence[str], key: str = "data") -> None:
    """UserError for a path that does not exist and names no kind of source; nothing is read.

    key  the option that names it
    """
    for part in [spec] if isinstance(spec, (str, os.PathLike)) else spec:
        path = os.path.expanduser(os.fspath(part))
        name, colon, _ = path.partition(":")
        if not path:
            raise UserError(f"{key} is empty, expected {KINDS}")
        if os.path.exists(path) or is_scenes(path):
            continue
        if not colon or len(name) == 1 or not name.isidentifier():  # C:\ is a path
            raise UserError(f"{key}: {part} does not exist, expected {KINDS}")
        find_named(name)


def read_labelled(
    path: str | os.PathLike[str],
    index_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    columns: str = "",
    columns_key: str = "columns",
    root_key: str = "own.root",
) -> LabelledImages:
    """Labelled images of one's own: a folder with a subfolder for each class or split, or a table.

    index_dir, root, columns  as for `open_source`; columns also of labels and splits, "path:NAME,label:NAME,split:NAME"
    columns_key, root_key     names of the options, for messages

    Raises UserError, in one line, for what is missing and as `read_labelled_folder` and `read_labelled_table` do.
    """
    path = find_labelled(path)
    if os.path.isdir(path):
        return read_labelled_folder(path, index_dir)
    base = None if root is None else os.path.expanduser(os.fspath(root))
    if base is not None and not os.path.isdir(base):
        raise UserError(f"{root_key}={root}: is not a folder")
    return read_labelled_table(path, base, column_names(columns, columns_key), root_key)


def find_labelled(path: str | os.PathLike[str]) -> str:
    """The absolute path of a folder or a table; UserError for anything else."""
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.exists(path):
        raise UserError(f"{path}: does not exist, expected a folder or a {', '.join(TABLES)} file")
    if not os.path.isdir(path) and os.path.splitext(path)[1].lower() not in (*TABLES, *LISTS):
        raise UserError(f"{path}: is a file, expected a folder or a {', '.join(TABLES)} file")
    return path


def is_scenes(spec: str) -> bool:
    """Whether `spec` means the drawn scenes; UserError where it may as well mean a folder or file of that name."""
    if spec.partition(":")[0] != "scenes":
        return False
    if os.path.exists(spec):
        raise UserError(f"{spec}: there is a path of this name; say ./{spec} for it, or scenes: for the drawn pictures")
    return True


def _open_scenes(options: str) -> ScenesSource:
    values = {"count": 20_000, "size": 64, "seed": 0, "first": 0}
    bounds = {"count": (1, 10**9), "size": (16, 4096), "seed": (0, 2**63 - 1), "first": (0, 2**62)}
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        if key not in values:
            raise UserError(f"data: scenes has no option {key!r}, expected {', '.join(values)}")
        try:
            values[key] = int(text)
        except ValueError:
            raise UserError(f"data: scenes:{key}={text!r} is not a whole number") from None
        low, high = bounds[key]
        if not low <= values[key] <= high:
            raise UserError(f"data: scenes:{key}={text}, expected {low} to {high}")
    return ScenesSource(**values)


def _open_list(spec: str, root: str | os.PathLike[str] | None, columns: Columns) -> PathSource:
    """The files that a list or the column of paths of a table names, whether they exist or not."""
    if os.path.splitext(spec)[1].lower() not in (*LISTS, *TABLES):
        raise UserError(f"data: {spec} is a file, expected {KINDS}")
    folder = os.path.abspath(os.path.expanduser(os.fspath(root)) if root else os.path.dirname(spec) or ".")
    table = open_table(spec, f"data: the list {spec}", folder)
    found = table.column("path", columns)
    if found is None:
        raise UserError(f"{table.title} has no column path; say columns=path:NAME; its columns: {listed(table.names)}")
    where, paths = f"data: {spec} {table.unit}", [found[0], *table.further(columns)]
    entries = []
    for number, cells in table.cells(*paths):
        entries += [inside(folder, cell, f"{where} {number}", "data.root") for cell in cells if any(cells)]
    if not entries:
        raise UserError(f"data: the list {spec} names no files")
    return PathSource(folder, PathBlock.of(entries), len(paths))
