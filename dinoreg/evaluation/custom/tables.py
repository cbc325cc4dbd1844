"""Own data as a table: a CSV, TSV or parquet file with a column `path` and one or several columns of labels.

- `label`: a class's name or number; `cat|outdoors` in any row makes it several labels an image.
- several columns of labels (all but `path` and `split`, or those that own.labels names): one class each, 1 present,
  0 absent, -1 or empty not to be counted.
- `split` (optional): train, val or test.

A `classes.txt` beside the table fixes the classes and their order, a name a line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoreg.config.keys import nearest
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, Listing, inside
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError

SUFFIXES = (".csv", ".tsv", ".parquet")
SEPARATOR = "|"
INDICATORS = {"1": 1, "0": 0, "-1": -1, "": -1, "1.0": 1, "0.0": 0, "-1.0": -1, "true": 1, "false": 0}


@dataclass(frozen=True)
class Table:
    """What a table says, row by row.

    paths   relative to `root`
    labels  (n,) int64 classes, or (n, K) int8 as in MultiLabelled
    words   the split of each row, or None without that column
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    class_names: list[str]
    words: list[str] | None

    @property
    def several(self) -> bool:
        return self.labels.ndim == 2


@dataclass(frozen=True)
class _Rows:
    """Text of a table: its columns and, for each row, where it stands and its cells."""

    file: Path
    columns: list[str]
    places: list[str]
    cells: list[list[str]]

    def column(self, name: str) -> list[str]:
        number = self.columns.index(name)
        return [row[number].strip() for row in self.cells]


def read_table(file: Path, root: Path | None = None, columns: Sequence[str] = ()) -> Table:
    """Read a table; UserError, in one line, for whatever is wrong with it.

    root     where relative paths begin and what no path may leave; by default the table's folder
    columns  those that hold labels; by default see above
    """
    rows = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_text(file)
    if "path" not in rows.columns:
        raise UserError(f"{file}: has no column path, expected path, label and, if wanted, split in its first line")
    if not rows.cells:
        raise UserError(f"{file}: lists no images")
    root = file.parent if root is None else root
    paths: list[str] = []
    seen: dict[str, str] = {}
    for place, entry in zip(rows.places, rows.column("path")):
        if not entry:
            raise UserError(f"{file} {place}: the path is empty")
        path = inside(root, entry, f"{file} {place}")
        if path in seen:
            raise UserError(f"{file} {place}: {path} is listed before, in {seen[path]}")
        seen[path] = place
        paths.append(path)
    words = _words(rows) if "split" in rows.columns else None
    labels, names = _labels(rows, columns)
    Listing(root).require(paths, file)
    return Table(root, paths, labels, names, words)


def _words(rows: _Rows) -> list[str]:
    found = []
    for place, word in zip(rows.places, rows.column("split")):
        if word.lower() not in SPLIT_WORDS:
            raise UserError(
                f"{rows.file} {place}: split {word!r}{nearest(word, SPLIT_WORDS)}; expected train, val, test"
            )
        found.append(SPLIT_WORDS[word.lower()])
    return found


def _labels(rows: _Rows, columns: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Labels of the whole table, and the names of their classes."""
    others = [name for name in rows.columns if name not in ("path", "split")]
    for name in columns:
        if name not in others:
            raise UserError(f"own.labels: {rows.file} has no column {name!r}{nearest(name, others)}")
    if not columns and "label" in others:
        unknown = [name for name in others if name != "label"]
        if unknown:
            raise UserError(
                f"{rows.file}: unknown column {unknown[0]!r} beside path, label and split; "
                f"own.labels=label leaves it out, own.labels=COLUMN,COLUMN takes other columns as labels"
            )
        columns = ["label"]
    columns = list(columns) or others
    if not columns:
        raise UserError(f"{rows.file}: has no column label")
    if len(columns) > 1:
        return _indicators(rows, columns), list(columns)
    given = _classes_file(rows.file)
    cells = rows.column(columns[0])
    if any(SEPARATOR in cell for cell in cells):
        sets = [[part.strip() for part in cell.split(SEPARATOR) if part.strip()] for cell in cells]
        number, names = _numbering({part for parts in sets for part in parts}, given)
        found = np.zeros((len(sets), len(names)), dtype=np.int8)
        for row, (place, parts) in enumerate(zip(rows.places, sets)):
            found[row, [number(part, place, rows.file) for part in parts]] = 1
        return found, names
    for place, cell in zip(rows.places, cells):
        if not cell:
            raise UserError(f"{rows.file} {place}: the label is empty")
    number, names = _numbering(set(cells), given)
    if len(names) < 2:
        raise UserError(f"{rows.file}: every image has the label {names[0]!r}, expected at least two classes")
    return np.array([number(cell, place, rows.file) for place, cell in zip(rows.places, cells)], dtype=np.int64), names


def _indicators(rows: _Rows, columns: Sequence[str]) -> np.ndarray:
    found = np.zeros((len(rows.cells), len(columns)), dtype=np.int8)
    for number, name in enumerate(columns):
        for row, (place, cell) in enumerate(zip(rows.places, rows.column(name))):
            if cell.lower() not in INDICATORS:
                raise UserError(f"{rows.file} {place}: {name} is {cell!r}, expected 1, 0 or -1")
            found[row, number] = INDICATORS[cell.lower()]
    return found


def _numbering(cells: set[str], given: list[str] | None) -> tuple[Callable[[str, str, Path], int], list[str]]:
    """A cell's class number, and the names of the classes; whole numbers are ordered as such."""
    whole = {cell: int(cell) for cell in cells if cell.removeprefix("-").isdecimal()}
    numeric = len(whole) == len(cells)
    names = given or [str(cell) for cell in sorted(cells, key=lambda cell: (whole.get(cell, 0), cell))]
    by_name = {name: index for index, name in enumerate(names)}
    count = len(names)

    def number(cell: str, place: str, file: Path) -> int:
        if numeric and (int(cell) < 0 or (given is not None and cell not in by_name and int(cell) >= count)):
            expected = f"0..{count - 1} by classes.txt" if given is not None else "0 or more"
            raise UserError(f"{file} {place}: label {cell} is out of range, expected {expected}")
        if cell in by_name:
            return by_name[cell]
        if numeric:
            return int(cell)
        raise UserError(f"{file} {place}: label {cell!r} is not in classes.txt{nearest(cell, names)}")

    return number, names


def _classes_file(file: Path) -> list[str] | None:
    return read_classes(file.parent / "classes.txt")


def read_classes(path: Path) -> list[str] | None:
    """The names in a classes.txt, one a line, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError(f"{path}: expected two or more different names, one a line")
    return names


def _read_text(file: Path) -> _Rows:
    places, cells = [], []
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            rows = csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            columns = [name.strip() for name in next(rows, [])]
            for row in rows:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(columns):
                    raise UserError(f"{file} line {rows.line_num}: {len(row)} fields, expected {len(columns)}")
                places.append(f"line {rows.line_num}")
                cells.append(row)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{file}: is not a valid table ({error})") from None
    return _checked(_Rows(file, columns, places, cells))


def _read_parquet(file: Path) -> _Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs pyarrow: {install('pyarrow')}") from None
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: is not a readable parquet file ({str(error).splitlines()[0]})") from None
    columns = [[_text(value) for value in column.to_pylist()] for column in table.columns]
    cells = [list(row) for row in zip(*columns)]
    return _checked(_Rows(file, list(table.column_names), [f"row {row}" for row in range(1, len(cells) + 1)], cells))


def _text(value: object) -> str:
    """A value of a parquet file as the text that a CSV would hold."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list):
        return SEPARATOR.join(_text(item) for item in value) + SEPARATOR
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _checked(rows: _Rows) -> _Rows:
    twice = [name for index, name in enumerate(rows.columns) if name in rows.columns[:index]]
    if twice:
        raise UserError(f"{rows.file}: has two columns {twice[0]!r}")
    return rows
