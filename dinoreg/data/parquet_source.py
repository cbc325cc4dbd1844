"""Images inside parquet files, as Hugging Face's datasets come: a column of bytes, or of {bytes, path}, and labels.

A picture is read with its whole row group, which is what parquet can find. As many row groups as HELD_BYTES are kept in
memory, and `groups` tells the sampler to stay among half as many at a time, so that each is read about once an epoch.
What a file says of its sizes is not believed: rows are read a few at a time, and counted as they are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinoreg.data.folder_index import kept_index
from dinoreg.data.shards import Shards, states_of
from dinoreg.data.source import Group, Source, stamp_of_files
from dinoreg.data.tables import Columns, Table, open_parquet
from dinoreg.data.value_range import BadImage
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.places import joined
from dinoreg.runtime.printable import listed

HELD_BYTES = 1 << 30  # of row groups, unpacked
_FEW_ROWS = 8  # read at once: a page of a megabyte may be a dictionary whose one picture many rows have
_VERSION = 1
_THREADS = 8  # files whose ends are read at once


@dataclass(eq=False)
class ParquetSource(Source):
    """The images in some parquet files, numbered from the first row of the first file.

    root    the folder that they lie below: an absolute path, or a URL
    files   (f,) their names below it
    column  the one with the pictures, "image" or "image.bytes"
    file    (g,) int64, the file of each row group
    number  (g,) int64, its number there
    start   (g,) int64, its first row, of all files
    size    (g,) int64, the bytes that its pictures take, as the file says
    rows    of all files
    """

    root: str
    files: Sequence[str]
    column: str
    file: np.ndarray
    number: np.ndarray
    start: np.ndarray
    size: np.ndarray
    rows: int
    _held: OrderedDict[int, Future[Any]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _loading: threading.Lock = field(default_factory=threading.Lock)  # as many threads as read could each load 1 GiB

    def __post_init__(self) -> None:
        self._taken = self.size.copy()  # the bytes of each group in memory, as far as it was read

    def __len__(self) -> int:
        return self.rows

    def read(self, index: int) -> bytes:
        """The bytes of a row's picture; BadImage for a row without any, and for a damaged row group."""
        group = self._group_of(index)
        column, row = self._pictures(group), index - int(self.start[group])
        if row >= len(column) or not column[row].is_valid:  # a damaged file may promise more rows than it has
            raise BadImage("the row holds no picture")
        return bytes(column[row].as_buffer())

    def name(self, index: int) -> str:
        """`FILE:ROW` with the folder; rows of a file count from 0."""
        group = self._group_of(index)
        first = int(self.start[np.searchsorted(self.file, self.file[group])])
        return f"{joined(self.root, self.files[int(self.file[group])])}:{index - first}"

    def fingerprint(self) -> str:
        """Over the files' names and their row groups."""
        text = "\0".join((*self.files, self.column, str(self.rows)))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape") + self.start.tobytes()).hexdigest()[:16]

    def stamp(self) -> str:
        """By sizes and times of change of the files."""
        return stamp_of_files(self.fingerprint().encode(), (joined(self.root, name) for name in self.files))

    def shards(self) -> list[tuple[str, int]]:
        """The files."""
        rows = np.diff(self.start, append=self.rows)
        return list(zip(self.files, np.bincount(self.file, rows, len(self.files)).astype(int).tolist()))

    def groups(self) -> list[Group]:
        """One group, in parts that are the row groups."""
        held = max(1, HELD_BYTES // 2 // max(1, int(self.size.max())))
        return [Group(0, self.rows, 1.0, (self.start, held))]

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.start, index, side="right")) - 1

    def _pictures(self, group: int) -> Any:
        """The pictures of a row group, a `pyarrow.ChunkedArray` of bytes; read by the first thread that asks."""
        with self._lock:
            known = self._held.get(group)
            waited = self._held.setdefault(group, Future())
            self._held.move_to_end(group)
            while len(self._held) > 1 and int(self._taken[[*self._held]].sum()) > HELD_BYTES:
                self._held.popitem(last=False)
        if known is None:
            try:
                with self._loading:
                    waited.set_result(self._load(group))
            except BaseException as error:
                waited.set_exception(error)
                if not isinstance(error, BadImage):
                    with self._lock:
                        self._held.pop(group, None)
        return waited.result()

    def _load(self, group: int) -> Any:
        place, number = joined(self.root, self.files[int(self.file[group])]), int(self.number[group])
        try:
            with open_parquet(place, f"row group {number}") as file:
                return self._pictures_in(file.iter_batches(_FEW_ROWS, [number], [self.column]), group)
        except UserError as error:
            raise BadImage(str(error)) from None

    def _pictures_in(self, batches: Iterable[Any], group: int) -> Any:
        """The pictures of batches of rows as one column; BadImage where they are too large to be held."""
        import pyarrow

        parts, taken = [], 0
        for batch in batches:
            column = batch.column(0)
            parts.append(column.field("bytes") if column.type.num_fields else column)
            taken += parts[-1].nbytes
            if taken > HELD_BYTES:
                raise BadImage(f"its row group unpacks to more than the {HELD_BYTES} bytes that are held")
        self._taken[group] = max(taken, int(self.size[group]))
        return pyarrow.chunked_array(parts, parts[0].type) if parts else parts


def holds_pictures(shards: Shards, columns: Columns) -> bool:
    """Whether parquet files hold pictures, and are not a table of paths: by the types of the first one's columns."""
    return _column_of_pictures(joined(shards.root, shards.names[0]), columns)[0] is not None


def index_parquet(shards: Shards, columns: Columns, index_dir: str | os.PathLike[str] | None = None) -> ParquetSource:
    """The images in parquet files, by the row groups that their ends list.

    columns    "path" names the column of pictures, where there are several
    index_dir  where the index is kept; by default the user's cache folder
    raises     UserError, in one line, for a file that cannot be read or has other columns than the first, for files
               without pictures, and for a row group that does not fit into memory
    """
    places = [joined(shards.root, name) for name in shards.names]
    column, names = _column_of_pictures(places[0], columns)
    if column is None:
        raise UserError(f"data: {places[0]} has no column of pictures' bytes; its columns: {listed(names)}")

    def find() -> dict[str, np.ndarray]:
        found = parallel(lambda number: _row_groups(places[number], column, number), range(len(places)), _THREADS)
        return dict(zip(("part", "number", "rows", "size"), np.ascontiguousarray(np.concatenate([*found]).T)))

    kept = kept_index("\0".join(("parquet", column, *places)), (_VERSION, states_of(places)), index_dir, find)
    total = int(kept["rows"].sum())
    if not total:
        raise UserError(f"data: no rows in {listed(shards.names)} of {shards.root}")
    if (largest := int(kept["size"].max())) > HELD_BYTES:
        where = places[int(kept["part"][kept["size"].argmax()])]
        raise UserError(
            f"data: {where} has a row group of {largest / 2**30:.1f} GiB, more than the {HELD_BYTES >> 30} GiB that "
            "are held; write it with row groups of 100 to 1000 rows"
        )
    start = np.cumsum(kept["rows"]) - kept["rows"]
    return ParquetSource(shards.root, shards.names, column, kept["part"], kept["number"], start, kept["size"], total)


def table_of(source: ParquetSource, title: str) -> Table:
    """The columns beside the pictures, with the names of classes that the first file states."""
    files = tuple(joined(source.root, name) for name in source.files)
    with open_parquet(files[0], title) as file:
        schema = file.schema_arrow
    names = tuple(name for name in schema.names if name != source.column.removesuffix(".bytes"))
    return Table(files[0], title, names, "row", files=files, classes=_classes(schema))


def _column_of_pictures(place: str, columns: Columns) -> tuple[str | None, list[str]]:
    """The column with the bytes of pictures, if there is one, and the names of all."""
    with open_parquet(place, place) as file:
        schema = file.schema_arrow
    found = {each.name: name for each in schema if (name := _bytes_of(each)) is not None}
    if "path" in columns:
        if len(columns["path"]) > 1 and any(name in found for name in columns["path"]):
            raise UserError(f"{place}: columns names {listed(columns['path'])}, expected one column of pictures' bytes")
        return found.get(columns["path"][0]), schema.names
    usual = [name for name in found if name in ("image", "img", "jpg")] or list(found)
    if len(usual) > 1:
        raise UserError(f"data: {place} has several columns of bytes, {listed(found)}; say columns=path:NAME")
    return (found[usual[0]] if usual else None), schema.names


def _bytes_of(column: Any) -> str | None:
    """The name by which parquet reads the bytes of a column, None for one of another kind."""
    from pyarrow import types

    kinds = (types.is_binary, types.is_large_binary)
    if any(kind(column.type) for kind in kinds):
        return str(column.name)
    inner = [each for each in column.type if each.name == "bytes"] if types.is_struct(column.type) else []
    return f"{column.name}.bytes" if inner and any(kind(inner[0].type) for kind in kinds) else None


def _classes(schema: Any) -> dict[str, list[str]]:
    """{column: names of its classes} that Hugging Face's datasets state in a schema."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: list(map(str, about["names"])) for name, about in features.items() if "names" in about}
    return {}


def _row_groups(place: str, column: str, file: int) -> np.ndarray:
    """(g, 4) int64: the number of the file, that of the row group, its rows, and the bytes of its pictures."""
    with open_parquet(place, f"data: {place}") as opened:
        about = opened.metadata
        names = [about.schema.column(each).path for each in range(about.num_columns)]
        if column not in names:
            raise UserError(
                f"data: {place} has no column {column}, as the first file has; its columns: {listed(names)}"
            )
        at, groups = names.index(column), (about.row_group(number) for number in range(about.num_row_groups))
        found = [(file, n, each.num_rows, each.column(at).total_uncompressed_size) for n, each in enumerate(groups)]
    table = np.array(found, dtype=np.int64).reshape(-1, 4)
    return table[table[:, 2] > 0]
