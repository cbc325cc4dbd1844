"""From `data=` to a source: a folder, shards, several, a list, a declared dataset, the scenes; as paths or as URLs."""

import os
import re
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from dinoreg.config.option import Options, build, dotted, option, typed
from dinoreg.data.declared import KINDS, find_named, open_named
from dinoreg.data.folder_index import PathBlock, index_folder, kept_index
from dinoreg.data.labelled import LabelledImages
from dinoreg.data.labelled_folder import read_labelled_folder
from dinoreg.data.labelled_table import read_labelled_shards, read_labelled_table
from dinoreg.data.parquet_source import ParquetSource, holds_pictures, index_parquet, table_of
from dinoreg.data.shards import SHARDS, Shards, find_shards, has_pattern, is_folder, is_place, states_of
from dinoreg.data.source import ChosenSource, JoinedSource, PathSource, ScenesSource, Source, WeightedSource
from dinoreg.data.tables import LISTS, TABLES, Columns, Table, column_names, inside, open_table
from dinoreg.data.tar_index import TarSource, index_tars, sidecars
from dinoreg.data.value_range import ValueRange
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.places import ending_of, filesystem, is_url
from dinoreg.runtime.printable import listed

WEIGHT = "sampling_weight"  # the column of a table by which images are drawn
_VERSION = 2
_MEMBER = re.compile(r"(.+?(\.tar|\.parquet)):(.+)", re.DOTALL)


def open_source(
    spec: str | os.PathLike[str] | Sequence[str],
    weights: Sequence[float] | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    value_range: Sequence[float] | None = None,
    columns: str = "",
) -> Source:
    """Open what `data=` names.

    spec       a folder; tar archives or parquet files with pictures inside, by a folder, a name or a pattern; a list of
               paths; a URL of one of these; the drawn "scenes:" or "scenes:count=20000,size=64,seed=0"; a dataset that
               is declared in `eval/`, as "imagenet22k:root=/datasets"; or a sequence of these
    weights    for a sequence: each source's share of the draws (any positive numbers); by default by their
               sizes
    index_dir  where folder indexes are kept; by default the user's cache folder
    root       the folder that the paths of a list must stay in; by default the list's own
    value_range  LOW,HIGH of the whole data set, or of each channel; by default each file's type says it
    columns    of tables, "path:NAME,weight:NAME"; by default the column `path` or one that is called as paths usually
               are, and `sampling_weight`. "path:RED,path:NIR" where each channel is a file of its own

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
        if weights is not None and not all(map(_is_weight, weights)):
            raise UserError(f"data.weights={list(weights)}: expected positive numbers, from 1e-30 to 1e30")
        parts = [_open(part, None, index_dir, root, columns) for part in spec]
        return parts[0] if len(parts) == 1 else JoinedSource(parts, weights)
    if weights is not None and len(weights) != 1:
        raise UserError(f"data.weights has {len(weights)} numbers for one source ({spec})")
    is_text, spec = isinstance(spec, str), os.path.expanduser(os.fspath(spec))
    name, _, options = spec.partition(":")
    if is_text and is_scenes(spec):
        return _open_scenes(options)
    if not is_place(spec):
        check_source(spec)
        return open_named(name, options, None if index_dir is None else os.fspath(index_dir))
    found = _open_files(spec, columns, index_dir)
    if isinstance(found, ParquetSource):
        return _by_weights(found, f"data: {spec}", columns)
    return _open_list(spec, root, columns, index_dir) if found is None else found


def _by_weights(source: ParquetSource, title: str, columns: Columns) -> Source:
    """Pictures in parquet files as the column of weights beside them says, where there is one."""
    table = table_of(source, title)
    if not (column := _column_of_weights(table, columns)):
        return source
    weights = [_weight(cell, f"{title} row {number}") for number, (cell,) in table.cells(*column)]
    if len(weights) != len(source):
        raise UserError(f"{title}: {len(weights):,} weights for {len(source):,} pictures")
    return WeightedSource(source, np.array(weights))


def _open_files(spec: str, columns: Columns, index_dir: str | os.PathLike[str] | None) -> Source | None:
    """The pictures of a folder or of shards; None for a list."""
    if is_folder(spec):
        try:
            paths = index_folder(spec, index_dir)
        except UserError:
            if find_shards(spec) is None:
                raise
        else:
            # A few pictures beside many shards illustrate the page on which these were published.
            if sum(paths.passed_over.get(ending, 0) for ending in SHARDS) <= len(paths):
                return PathSource(absolute(spec), paths)
    shards = find_shards(spec)
    if shards is None or (shards.ending == ".parquet" and not is_folder(spec) and not holds_pictures(shards, columns)):
        return None
    return _open_shards(shards, columns, index_dir)


def _open_shards(shards: Shards, columns: Columns, index_dir: str | os.PathLike[str] | None) -> Source:
    if shards.ending == ".tar":
        return index_tars(shards, index_dir)
    if shards.ending == ".parquet":
        return index_parquet(shards, columns, index_dir)
    return PathSource(shards.root, PathBlock.of(shards.names))


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
        if is_url(path):
            filesystem(path)
        elif has_pattern(path):
            find_shards(path)
        elif not colon or len(name) == 1 or not name.isidentifier():  # C:\ is a path
            raise UserError(f"{key}: {part} does not exist, expected {KINDS}")
        else:
            find_named(name)


def read_labelled(
    path: str | os.PathLike[str],
    index_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    columns: str = "",
    columns_key: str = "columns",
    root_key: str = "own.root",
) -> LabelledImages:
    """Labelled images of one's own: a folder with a subfolder for each class or split, shards, or a table.

    index_dir, root, columns  as for `open_source`; columns also of labels and splits, "path:NAME,label:NAME,split:NAME"
    columns_key, root_key     names of the options, for messages

    Raises UserError, in one line, for what is missing and as `read_labelled_folder` and `read_labelled_table` do.
    """
    path, named = find_labelled(path), column_names(columns, columns_key)
    found = _open_files(path, named, index_dir)
    if isinstance(found, ParquetSource):
        return read_labelled_shards(found, table_of(found, f"{path}:"), named)
    if isinstance(found, TarSource):
        return read_labelled_shards(found, sidecars(found, f"{path}:", named), named)
    if is_url(path):
        raise UserError(f"{path}: at a URL labels are read of shards alone, .tar or .parquet with pictures inside")
    if found is not None:
        return read_labelled_folder(path, index_dir)
    base = None if root is None else os.path.expanduser(os.fspath(root))
    if base is not None and not os.path.isdir(base):
        raise UserError(f"{root_key}={root}: is not a folder")
    return read_labelled_table(path, base, named, root_key)


def find_labelled(path: str | os.PathLike[str]) -> str:
    """The absolute path, the pattern or the URL of a folder, a table or shards; UserError for anything else."""
    path = absolute(path)
    expected = f"a folder or a {', '.join((*TABLES, '.tar'))} file"
    if not is_place(path):
        raise UserError(f"{path}: does not exist, expected {expected}")
    if not is_folder(path) and not has_pattern(path) and ending_of(path) not in (*TABLES, *LISTS, *SHARDS):
        raise UserError(f"{path}: is a file, expected {expected}")
    return path


def is_scenes(spec: str) -> bool:
    """Whether `spec` means the drawn scenes; UserError where it may as well mean a folder or file of that name."""
    if spec.partition(":")[0] != "scenes":
        return False
    if os.path.exists(spec):
        raise UserError(f"{spec}: there is a path of this name; say ./{spec} for it, or scenes: for the drawn pictures")
    return True


@dataclass(frozen=True)
class _Scenes(Options, section="scenes"):
    """What is behind "scenes:"."""

    count: int = option(20_000, "drawn pictures", low=1, high=10**9)
    size: int = option(64, "pixels a side", low=16, high=4096)
    seed: int = option(0, "of the drawing", low=0, high=2**63 - 1)
    first: int = option(0, "number of the first one", low=0, high=2**62)


def _open_scenes(options: str) -> ScenesSource:
    given = typed(dotted(filter(None, options.split(","))), _Scenes, f"data=scenes:{options}")
    return ScenesSource(**vars(build(_Scenes, given)))


def _open_list(
    spec: str, root: str | os.PathLike[str] | None, columns: Columns, index_dir: str | os.PathLike[str] | None
) -> Source:
    """The images that a list or the column of paths of a table names, whether they exist or not; with their weights."""
    if ending_of(spec) not in (*LISTS, *TABLES):
        raise UserError(f"data: {spec} is a file, expected {KINDS}")
    folder = absolute(root) if root else spec.rpartition("/")[0] if is_url(spec) else os.path.dirname(absolute(spec))
    if is_url(folder):
        filesystem(folder)  # so that one that is refused is so before it stands in a config
    table = open_table(spec, f"data: the list {spec}", folder)
    found = table.column("path", columns)
    if found is None:
        raise UserError(f"{table.title} has no column path; say columns=path:NAME; its columns: {listed(table.names)}")
    paths, where = [found[0], *table.further(columns)], f"data: {spec} {table.unit}"
    wanted = [*paths, *_column_of_weights(table, columns)]

    def find() -> dict[str, np.ndarray]:
        block, weights = bytearray(), array("d")
        for number, cells in table.cells(*wanted):
            entries, weight = cells[: len(paths)], cells[len(paths) :]
            if any(entries):  # names one after the other, as millions of strings would take gigabytes
                for entry in entries:
                    block += os.fsencode(inside(folder, entry, f"{where} {number}", "data.root")) + b"\0"
                weights.extend(_weight(cell, f"{where} {number}") for cell in weight)
        if not block:
            raise UserError(f"data: the list {spec} names no files")
        return {"names": np.frombuffer(block, np.uint8), "weights": np.array(weights)}

    evidence = _VERSION, states_of([absolute(spec)])
    kept = kept_index("\0".join((f"list {len(paths)}", absolute(spec), folder, *wanted)), evidence, index_dir, find)
    source = _in_shards(PathSource(folder, PathBlock(kept["names"].tobytes()), len(paths)), columns, index_dir)
    return WeightedSource(source, kept["weights"]) if len(kept["weights"]) else source


def open_names(names: Sequence[str], asked: str | None = None) -> tuple[Source | None, str, list[str]]:
    """The images that sources call so, files or what lies in shards; the folder that all lie below; their names there.

    asked   a folder or URL that they lie below; without it images at a URL are not opened (None), as the names may come
            from a stranger
    raises  UserError for what has no place, as scenes, and for what lies in no one folder or store
    """
    if odd := [name for name in names if not (is_url(name) or os.path.isabs(name))]:
        raise UserError(f"{odd[0]}: is no file, and cannot be listed")
    folders = {os.path.dirname(found[1] if (found := _MEMBER.fullmatch(name)) else name) for name in names}
    try:
        (start,) = {name.partition("://")[0] + "://" if is_url(name) else "" for name in names}
        root = start + os.path.commonpath({folder[len(start) :] for folder in folders})
    except ValueError:
        start, root = "", "://"
    if root.endswith("://"):
        raise UserError(f"{names[0]} and others lie in no one folder or store, and cannot be listed together")
    if asked and not f"{root}/".startswith(f"{absolute(asked).rstrip('/')}/"):
        raise UserError(f"root={asked}: the images lie below {root}")
    entries = [name[len(root) :].lstrip("/") for name in names]
    return _in_shards(PathSource(root, PathBlock.of(entries)), {}, None) if asked or not start else None, root, entries


def _in_shards(entries: PathSource, columns: Columns, index_dir: str | os.PathLike[str] | None) -> Source:
    """The images of shards that names mean, ARCHIVE.tar:MEMBER or FILE.parquet:ROW; files as they are."""
    if entries.bands > 1 or not any(f"{ending}:".encode() in entries.paths.block for ending in SHARDS):
        return entries
    files: dict[str, dict[str, None]] = {}
    for entry in entries.paths:
        found = _MEMBER.fullmatch(entry)
        files.setdefault(found[2] if found else "", {})[found[1] if found else entry] = None
    parts = [_open_shards(Shards(entries.root, [*each], kind), columns, index_dir) for kind, each in files.items()]
    source = parts[0] if len(parts) == 1 else JoinedSource(parts)
    # By hashes, as a table of millions of names would take gigabytes.
    known, wanted = (np.fromiter(map(hash, map(each.name, range(len(each)))), np.int64) for each in (source, entries))
    order = np.argsort(known, kind="stable")
    places = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    if len(missing := np.flatnonzero(known[places] != wanted)):
        raise UserError(f"data: {entries.name(int(missing[0]))} is listed, and not there")
    return ChosenSource(source, places)


def _column_of_weights(table: Table, columns: Columns) -> list[str]:
    """The column by which images are drawn, as the user or a table itself calls it; [] where there is none."""
    named = columns.get("weight", [WEIGHT] if WEIGHT in table.names else [])
    return [table.named(name) for name in named]


def _is_weight(number: float) -> bool:
    """Whether a weight is one whose sums and products are numbers."""
    return 1e-30 <= number <= 1e30


def _weight(cell: str, where: str) -> float:
    with suppress(ValueError):
        if (weight := float(cell)) == 0 or _is_weight(weight):
            return weight
    raise UserError(f"{where}: the weight is {cell!r}, expected 0 or a number from 1e-30 to 1e30")


def absolute(place: str | os.PathLike[str]) -> str:
    """A path from the root, `~` as the user's home; a URL as it is."""
    return str(place) if is_url(str(place)) else os.path.abspath(os.path.expanduser(os.fspath(place)))
