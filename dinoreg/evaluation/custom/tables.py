"""Own data as a table: a CSV, TSV or parquet file with a column `path` and one or several columns of labels.

- `label`: a class's name or number; `cat|outdoors` in any row makes it several labels an image.
- several columns of labels (all but `path` and `split`, or those that own.labels names): one class each, 1 present,
  0 absent, -1 or empty not to be counted.
- `split` (optional): train, val or test.

A `classes.txt` beside the table fixes the classes and their order, a name a line.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoreg.config.option import nearest
from dinoreg.data.tables import inside, parquet_table, rows_of
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, Listing
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

    def column(self, name: str) -> list[tuple[str, str]]:
        """(place, cell) of every row; nothing where there is no such column."""
        if name not in self.columns:
            return []
        number = self.columns.index(name)
        return [(place, row[number].strip()) for place, row in zip(self.places, self.cells, strict=True)]


def read_table(file: Path, root: Path | None = None, columns: Sequence[str] = ()) -> Table:
    """Read a table; UserError, in one line, for whatever is wrong with it.

    root     where relative paths begin and what no path may leave; by default the table's folder
    columns  those that hold labels; by default see above
    """
    rows = _read_rows(file)
    if "path" not in rows.columns:
        raise UserError(f"{file}: has no column path, expected path, label and, if wanted, split in its first line")
    if not rows.cells:
        raise UserError(f"{file}: lists no images")
    root = Path(os.path.abspath(file.parent if root is None else root))
    first_places: dict[str, str] = {}
    for place, entry in rows.column("path"):
        if not entry:
            raise UserError(f"{file} {place}: the path is empty")
        path = inside(str(root), entry, f"{file} {place}", "own.root")
        if path in first_places:
            raise UserError(f"{file} {place}: {path} is listed before, in {first_places[path]}")
        first_places[path] = place
    words = [_split_of(word, f"{file} {place}") for place, word in rows.column("split")]
    labels, names = _labels(rows, columns)
    Listing(root).require(first_places, file)
    return Table(root, list(first_places), labels, names, words or None)


def _split_of(word: str, where: str) -> str:
    if word.lower() not in SPLIT_WORDS:
        raise UserError(f"{where}: split {word!r}{nearest(word, SPLIT_WORDS)}; expected train, val, test")
    return SPLIT_WORDS[word.lower()]


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
    given = read_classes(rows.file.parent / "classes.txt")
    cells = rows.column(columns[0])
    if any(SEPARATOR in cell for _, cell in cells):
        sets = [[part.strip() for part in cell.split(SEPARATOR) if part.strip()] for _, cell in cells]
        number, names = _numbering({part for parts in sets for part in parts}, given)
        labels = np.zeros((len(sets), len(names)), dtype=np.int8)
        for row, ((place, _), parts) in enumerate(zip(cells, sets, strict=True)):
            labels[row, [number(part, f"{rows.file} {place}") for part in parts]] = 1
        return labels, names
    for place, cell in cells:
        if not cell:
            raise UserError(f"{rows.file} {place}: the label is empty")
    number, names = _numbering({cell for _, cell in cells}, given)
    if len(names) < 2:
        raise UserError(f"{rows.file}: every image has the label {names[0]!r}, expected at least two classes")
    return np.array([number(cell, f"{rows.file} {place}") for place, cell in cells], dtype=np.int64), names


def _indicators(rows: _Rows, columns: Sequence[str]) -> np.ndarray:
    labels = np.zeros((len(rows.cells), len(columns)), dtype=np.int8)
    for number, name in enumerate(columns):
        for row, (place, cell) in enumerate(rows.column(name)):
            if cell.lower() not in INDICATORS:
                raise UserError(f"{rows.file} {place}: {name} is {cell!r}, expected 1, 0 or -1")
            labels[row, number] = INDICATORS[cell.lower()]
    return labels


def _numbering(cells: set[str], given: list[str] | None) -> tuple[Callable[[str, str], int], list[str]]:
    """A cell's class number, and the names of the classes; whole numbers are ordered as such."""
    whole = {cell: int(cell) for cell in cells if cell.removeprefix("-").isdecimal()}
    numeric = len(whole) == len(cells)
    names = given or [str(cell) for cell in sorted(cells, key=lambda cell: (whole.get(cell, 0), cell))]
    by_name = {name: index for index, name in enumerate(names)}
    count = len(names)

    def number(cell: str, where: str) -> int:
        if numeric and (int(cell) < 0 or (given is not None and cell not in by_name and int(cell) >= count)):
            expected = f"0..{count - 1} by classes.txt" if given is not None else "0 or more"
            raise UserError(f"{where}: label {cell} is out of range, expected {expected}")
        if cell in by_name:
            return by_name[cell]
        if numeric:
            return int(cell)
        raise UserError(f"{where}: label {cell!r} is not in classes.txt{nearest(cell, names)}")

    return number, names


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


def _read_rows(file: Path) -> _Rows:
    if file.suffix.lower() == ".parquet":
        table = parquet_table(file, f"{file}:")
        names = list(table.column_names)
        cells = [list(row) for row in zip(*([_text(cell) for cell in column.to_pylist()] for column in table.columns))]
        rows = _Rows(file, names, [f"row {number}" for number in range(1, len(cells) + 1)], cells)
    else:
        lines = list(rows_of(file, f"{file}:"))
        names = [name.strip() for name in lines[0][1]] if lines else []
        for line, row in lines[1:]:
            if len(row) != len(names):
                raise UserError(f"{file} line {line}: {len(row)} fields, expected {len(names)}")
        rows = _Rows(file, names, [f"line {line}" for line, _ in lines[1:]], [row for _, row in lines[1:]])
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise UserError(f"{file}: has two columns {repeated[0]!r}")
    return rows


def _text(value: object) -> str:
    """A value of a parquet file as the text that a CSV would hold."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list):
        return SEPARATOR.join(_text(item) for item in value) + SEPARATOR
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
