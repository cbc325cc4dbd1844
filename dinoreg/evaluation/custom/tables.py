"""Own data as a table: a CSV, TSV or parquet file with a column `path` and one or several columns of labels.

- `label`: a class's name or number; `cat|outdoors` in any row makes it several labels an image.
- several columns of labels (all but `path` and `split`, or those that own.labels names): one class each, 1 present,
  0 absent, -1 or empty not to be counted.
- `split` (optional): train, val or test.

A `classes.txt` beside the table fixes the classes and their order, a name a line.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoreg.config.option import nearest
from dinoreg.data.tables import inside, parquet_table, rows_of
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, require_files
from dinoreg.evaluation.readers.files import lines
from dinoreg.runtime.errors import UserError

SUFFIXES = (".csv", ".tsv", ".parquet")
SEPARATOR = "|"
INDICATORS = {"1": 1, "0": 0, "-1": -1, "": -1, "1.0": 1, "0.0": 0, "-1.0": -1, "true": 1, "false": 0}


@dataclass(frozen=True)
class Table:
    """The content of a table, row by row.

    paths   relative to `root`
    labels  (n,) int64 classes, or (n, K) int8 as in MultiLabelled
    words   the split of each row, or None without that column
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    class_names: list[str]
    words: list[str] | None


Column = list[tuple[str, str]]  # (where it stands, cell) of every row


def read_table(file: Path, root: Path, columns: Sequence[str]) -> Table:
    """Read a table; UserError, in one line, for whatever is wrong with it.

    root     where relative paths begin and which no path may leave
    columns  those that hold labels; if empty `label`, or all but `path` and `split`
    """
    cells = _read_columns(file)
    if "path" not in cells:
        raise UserError(f"{file}: has no column path, expected path, label and, if wanted, split in its first line")
    if not cells["path"]:
        raise UserError(f"{file}: lists no images")
    root = Path(os.path.abspath(root))
    first_places: dict[str, str] = {}
    for place, entry in cells.pop("path"):
        if not entry:
            raise UserError(f"{file} {place}: the path is empty")
        path = inside(str(root), entry, f"{file} {place}", "own.root")
        if path in first_places:
            raise UserError(f"{file} {place}: {path} is listed before, in {first_places[path]}")
        first_places[path] = place
    words = [_split_of(word, f"{file} {place}") for place, word in cells.pop("split", [])]
    labels, names = _labels(file, cells, columns)
    require_files(root, first_places, file)
    return Table(root, list(first_places), labels, names, words or None)


def _split_of(word: str, where: str) -> str:
    if word.lower() not in SPLIT_WORDS:
        raise UserError(f"{where}: split {word!r}{nearest(word, SPLIT_WORDS)}; expected train, val, test")
    return SPLIT_WORDS[word.lower()]


def _labels(file: Path, cells: Mapping[str, Column], chosen: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Labels of the whole table, and the names of their classes.

    cells   the columns besides path and split
    chosen  those that were named as holding labels
    """
    for name in chosen:
        if name not in cells:
            raise UserError(f"own.labels: {file} has no column {name!r}{nearest(name, cells)}")
    others = [name for name in cells if name != "label"]
    if not chosen and "label" in cells and others:
        raise UserError(
            f"{file}: unknown column {others[0]!r} beside path, label and split; "
            f"own.labels=label leaves it out, own.labels=COLUMN,COLUMN takes other columns as labels"
        )
    columns = list(chosen or cells)
    if not columns:
        raise UserError(f"{file}: has no column label")
    if len(columns) > 1:
        return np.array([_indicators(file, name, cells[name]) for name in columns], dtype=np.int8).T, columns
    column, given = cells[columns[0]], read_classes(file.parent / "classes.txt")
    several = any(SEPARATOR in cell for _, cell in column)
    sets = {place: [part.strip() for part in cell.split(SEPARATOR) if part.strip()] for place, cell in column}
    if not several and (empty := [place for place, parts in sets.items() if not parts]):
        raise UserError(f"{file} {empty[0]}: the label is empty")
    number, names = _numbering({part for parts in sets.values() for part in parts}, given)
    if not several and len(names) < 2:
        raise UserError(f"{file}: every image has the label {names[0]!r}, expected at least two classes")
    numbers = [[number(part, f"{file} {place}") for part in parts] for place, parts in sets.items()]
    if not several:
        return np.array(numbers, dtype=np.int64)[:, 0], names
    labels = np.zeros((len(numbers), len(names)), dtype=np.int8)
    for row, present in zip(labels, numbers, strict=True):
        row[present] = 1
    return labels, names


def _indicators(file: Path, name: str, column: Column) -> list[int]:
    for place, cell in column:
        if cell.lower() not in INDICATORS:
            raise UserError(f"{file} {place}: {name} is {cell!r}, expected 1, 0 or -1")
    return [INDICATORS[cell.lower()] for _, cell in column]


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
    """The names in a classes.txt, one a line, None without such a file; UserError for fewer than two or repeats."""
    if not path.is_file():
        return None
    names = lines(path, "own", "")
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError(f"{path}: expected two or more different names, one a line")
    return names


def _read_columns(file: Path) -> dict[str, Column]:
    """The columns of a table by their names, as text."""
    if file.suffix.lower() == ".parquet":
        table = parquet_table(file, f"{file}:")
        columns = ([_text(cell) for cell in column.to_pylist()] for column in table.columns)
        rows, unit = list(enumerate([table.column_names, *map(list, zip(*columns))])), "row"
    else:
        rows, unit = list(rows_of(file, f"{file}:")), "line"
    names = [name.strip() for name in rows[0][1]] if rows else []
    for number, row in rows[1:]:
        if len(row) != len(names):
            raise UserError(f"{file} {unit} {number}: {len(row)} fields, expected {len(names)}")
    if repeated := [name for index, name in enumerate(names) if name in names[:index]]:
        raise UserError(f"{file}: has two columns {repeated[0]!r}")
    return {
        name: [(f"{unit} {number}", row[place].strip()) for number, row in rows[1:]] for place, name in enumerate(names)
    }


def _text(value: object) -> str:
    """A value of a parquet file as the text that a CSV would hold."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list):
        return SEPARATOR.join(_text(item) for item in value) + SEPARATOR
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
