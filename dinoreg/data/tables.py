"""Lists and tables of images as files: text with a path a line, CSV, TSV and parquet; and which paths they may name.

A table's columns are found by their names. Those of paths, labels and splits may be called as people usually call
them; others are named, as `columns=path:FILE,label:BREED`. A table without a first line of names is one whose first
line names a picture. Several columns of paths, `columns=path:RED,path:GREEN,path:NIR`, are files of one channel each.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from dinoreg.config.option import nearest
from dinoreg.data.folder_index import EXTENSIONS
from dinoreg.data.split_names import split_of
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.places import is_url, joined, opened
from dinoreg.runtime.printable import listed, shortened

TABLES = (".csv", ".tsv", ".parquet")
LISTS = (".txt", ".lst")
SEVERAL = "|"  # between the labels of one image

Columns = Mapping[str, Sequence[str]]  # {"path", "label", "split" or "weight": names of columns}
_ROLES = ("path", "label", "split", "weight")
_PICTURE = "(img|image|pic|picture|photo)"
_USUAL = {
    "path": re.compile(
        rf"{_PICTURE}(path|file|filename|name)?s?|(rel|relative|abs|full)?(path|file|filename|filepath)s?"
    ),
    "label": re.compile(r"(class|category|target|label|cls)(es|s|name|label|id|idx|index)?|categories|y"),
    "split": re.compile(r"(data)?(set|split|subset|partition|phase|usage|fold|mode)(name)?"),
}
INDEX = frozenset(("", "index", "unnamed: 0"))  # what pandas calls a column of row numbers
_UNUSUAL = re.compile(r"[\\\0]|//|(?:^|/)\.{0,2}(?:/|$)")  # in a path: what may lead elsewhere, or be written otherwise
_OF_A_URL = re.compile(r"[?#]|::")  # what begins something else there
_MOST_OF_CELLS = 1 << 24  # bytes of the cells that are read together
_DELIMITERS = ",;\t"
_NAMES = {"\t": "a tab", ";": "';'", ",": "','"}
_LABELLED_LINE = re.compile(rf"(.*\.(?:{'|'.join(ending[1:] for ending in EXTENSIONS)}))[\s,;]+(\S+)", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A list or table whose columns are known; its rows are read when they are asked for.

    title      what messages call it
    names      of the columns; without a first line of names "path", and as far as they can be told "label", "split"
    unit       what a row's number counts: "line" of a text, "row" or "image"
    delimiter  between cells; "": a list, which has a path a line and perhaps a label behind it
    first      lines before the first row of cells
    notes      what was not as usual, for the user
    files      of one table of parquet, where it is in several
    classes    {column of parquet: names of the classes that its numbers stand for}
    known      its rows, where they are in no file: {column: cell}
    """

    file: str
    title: str
    names: tuple[str, ...]
    unit: str = "line"
    delimiter: str = ""
    first: int = 0
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    known: Sequence[Mapping[str, str]] = ()

    def column(self, role: str, columns: Columns) -> tuple[str, list[str]] | None:
        """The column of "path", "label" or "split" and notes on how it was found; None where there is none.

        columns  those that were named by the user
        raises   UserError where a named one is missing, and where several could be meant
        """
        if role in columns:
            return self.named(columns[role][0]), []
        plain = {name: re.sub(r"[^a-z]", "", name.lower()) for name in self.names}
        exact = [name for name in self.names if name == role] or [name for name in self.names if plain[name] == role]
        if len(exact) == 1:
            return exact[0], []
        usual = exact or [name for name in self.names if _USUAL[role].fullmatch(plain[name])]
        if role == "split":
            usual = [name for name in usual if all(split_of(cell) for _, (cell,) in self.cells(name))]
        elif role == "path":
            usual = [name for name in usual or self.names if _names_picture(self._first_cell(name))] or usual
        if len(usual) > 1:
            several = " and ".join(map(repr, usual[:3]))
            each = f", or one for each channel as {','.join(f'path:{name}' for name in usual[:3])}" * (role == "path")
            raise UserError(f"{self.title} has {several}, which both may be the {role}; say columns={role}:NAME{each}")
        return (usual[0], [f"the column {usual[0]!r} is taken as the {role}"]) if usual else None

    def further(self, columns: Columns) -> list[str]:
        """The columns of the channels behind the first, where each channel is a file; UserError for a missing one."""
        return [self.named(name) for name in columns.get("path", ())[1:]]

    def named(self, name: str) -> str:
        """The name of a column, whatever its case; UserError, with all columns, for one that is not there."""
        found = [each for each in self.names if each == name] or [
            each for each in self.names if each.strip().lower() == name.strip().lower()
        ]
        if len(found) != 1:
            hint = nearest(name, self.names)
            raise UserError(f"{self.title} has no column {shortened(name)!r}{hint}; its columns: {listed(self.names)}")
        return found[0]

    def cells(self, *names: str) -> Iterator[tuple[int, list[str]]]:
        """(number, cells of these columns) of every row; cells have no space around them.

        raises  UserError, in one line, for a file that cannot be read and for a row of another length
        """
        places = [self.names.index(name) for name in names]
        for number, row in self._rows(names):
            yield number, [row[place] for place in places]

    def _first_cell(self, name: str) -> str:
        return next((cell for _, (cell,) in self.cells(name)), "")

    def _rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        if self.unit != "line":
            told = ([row.get(name, "") for name in self.names] for row in self.known)
            yield from enumerate(told if self.known else self._parquet_rows(names), 1)
            return
        for number, row in _lines(self.file, self.title, self.delimiter):
            if number <= self.first:
                continue
            if not self.delimiter and len(self.names) == 2:
                row = _path_and_label(row[0], f"{self.title} line {number}")
            while len(row) > len(self.names) and not row[-1]:
                row = row[:-1]
            if len(row) != len(self.names):
                raise UserError(f"{self.title} line {number}: {len(row)} fields, expected {len(self.names)}")
            yield number, row

    def _parquet_rows(self, names: Sequence[str]) -> Iterator[list[str]]:
        for file in self.files or (self.file,):
            with open_parquet(file, self.title) as table:
                # Few at once: a page of a kilobyte may say a cell of a megabyte a thousand times.
                for batch in table.iter_batches(64, columns=list(dict.fromkeys(names))):
                    if batch.nbytes > _MOST_OF_CELLS:
                        raise UserError(f"{file}: cells of {batch.nbytes // batch.num_rows:,} bytes, expected words")
                    cells = {name: batch.column(name).to_pylist() for name in names}
                    for row in range(batch.num_rows):
                        yield [self._cell(name, cells[name][row]) if name in cells else "" for name in self.names]

    def _cell(self, name: str, value: object) -> str:
        classes = self.classes.get(name)
        if classes is None or not isinstance(value, int):
            return text_of(value)
        return classes[value] if 0 <= value < len(classes) else ""


def open_table(file: str | os.PathLike[str], title: str, root: str) -> Table:
    """Look at the beginning of a list or table.

    title  what messages call it
    root   the folder that its paths begin at
    raises UserError, in one line, for a file that cannot be read, is empty or has two columns of one name
    """
    file = os.fspath(file)
    suffix = os.path.splitext(file.partition("?")[0] if is_url(file) else file)[1].lower()
    if suffix == ".parquet":
        return Table(file, title, _distinct(_parquet_names(file, title), title), "row")
    if suffix in LISTS:
        first = next((row[0] for _, row in _lines(file, title, "")), "")
        labelled = _LABELLED_LINE.fullmatch(first) and not os.path.exists(os.path.join(root, first))
        return Table(file, title, ("path", "label") if labelled else ("path",))
    usual = "\t" if suffix == ".tsv" else ","
    delimiter = _delimiter(file, title, usual)
    notes = [] if delimiter == usual else [f"cells are parted by {_NAMES[delimiter]}"]
    number, names = next(_lines(file, title, delimiter), (0, []))
    if not names:
        raise UserError(f"{title} lists no images")
    pictures = [place for place, cell in enumerate(names) if _names_picture(cell) or _is_file(root, cell)]
    if not pictures:
        return Table(file, title, _distinct(names, title), "line", delimiter, number, tuple(notes))
    roles = _without_names(names, pictures[0])
    notes.append(f"its first line names a picture, so that its columns are taken as {', '.join(roles)}")
    return Table(file, title, roles, "line", delimiter, notes=tuple(notes))


def may_tell(name: str, columns: Columns) -> bool:
    """Whether a column may be one of labels or splits: by its name among `columns`, or else a usual one."""
    name = name.strip().lower()
    return any(
        name in [each.strip().lower() for each in columns[role]]
        if role in columns
        else _USUAL[role].fullmatch(re.sub(r"[^a-z]", "", name))
        for role in ("label", "split")
    )


def column_names(text: str, key: str) -> dict[str, list[str]]:
    """The columns that an option names: "path:a,label:b,label:c" is {"path": ["a"], "label": ["b", "c"]}.

    key     of the option, for messages
    raises  UserError for another form, and for several columns of splits
    """
    found: dict[str, list[str]] = {}
    for part in next(csv.reader([text], skipinitialspace=True), []):
        role, colon, name = (piece.strip() for piece in part.partition(":"))
        if role not in _ROLES or not colon or not name or (role not in ("path", "label") and role in found):
            form = "columns as path:NAME,label:NAME,split:NAME; path and label more than once where there are several"
            raise UserError(f"{key}={text}: {part!r}, expected {form}")
        found.setdefault(role, []).append(name)
    return found


def inside(root: str, entry: str, where: str, option: str) -> str:
    """A listed path relative to the absolute folder, or the URL, `root`; UserError, naming the option that allows it.

    Backslashes part folders where there is no file that is called with them.
    """
    if not entry:
        raise UserError(f"{where}: the path is empty")
    below = entry.removeprefix(joined(root, "")) if is_url(root) else entry
    if is_url(root) and _OF_A_URL.search(below):
        raise UserError(f"{where}: {entry!r} has ?, # or ::, expected the path of a file below {root}")
    if _UNUSUAL.search(unquote(below) if is_url(root) else below) is None:
        return below
    if is_url(root) or is_url(entry):
        raise UserError(f"{where}: {entry!r} leaves {root}; allow it with {option}=URL")
    if "\\" in entry and not os.path.lexists(os.path.join(root, entry)):
        entry = entry.replace("\\", "/")
    path = os.path.normpath(os.path.join(root, entry))
    if "\0" in entry or not path.startswith(os.path.join(root, "")):
        raise UserError(f"{where}: {entry!r} leaves {root}; allow it with {option}=FOLDER")
    return os.path.relpath(path, root)


# ------------------------------------------------------------------------------------------------------------
# Text


def _lines(file: str, title: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number, cells without space around them) of every line that is not empty; without a delimiter one cell."""
    invalid = reworded(f"{title} is not a valid table", csv.Error)
    with readable(title), invalid, opened(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        if not delimiter:
            yield from ((number, [line.strip()]) for number, line in enumerate(text, 1) if line.strip())
            return
        rows = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
        for row in rows:
            if any(cells := [cell.strip() for cell in row]):
                yield rows.line_num, cells


def _delimiter(file: str, title: str, usual: str) -> str:
    """What parts the cells, by the first line that is not empty."""
    _, (line,) = next(_lines(file, title, ""), (0, [""]))
    bare = re.sub(r'"[^"]*"', "", line)
    others = sorted((each for each in _DELIMITERS if each in bare), key=bare.count)
    return usual if usual in bare or not others else others[-1]


def _path_and_label(line: str, where: str) -> list[str]:
    matched = _LABELLED_LINE.fullmatch(line)
    if matched is None:
        raise UserError(f"{where}: {line[:120]!r}, expected a path and a label as in the first line")
    return [matched[1], matched[2]]


def _without_names(cells: Sequence[str], path: int) -> tuple[str, ...]:
    """Names for the columns of a table whose first line is one of its rows already."""
    roles = [f"column {place}" for place in range(1, len(cells) + 1)]
    roles[path] = "path"
    others = [place for place in range(len(cells)) if place != path]
    splits = [place for place in others if split_of(cells[place])]
    if len(others) == 2 and len(splits) == 1:
        roles[splits[0]] = "split"
        others.remove(splits[0])
    if len(others) == 1:
        roles[others[0]] = "label"
    return tuple(roles)


def _names_picture(cell: str) -> bool:
    return os.path.splitext(cell)[1].lower() in EXTENSIONS


def _is_file(root: str, cell: str) -> bool:
    return bool(cell) and "\0" not in cell and os.path.isfile(os.path.join(root, cell))


def _distinct(names: Sequence[str], title: str) -> tuple[str, ...]:
    if repeated := [name for index, name in enumerate(names) if name in names[:index]]:
        raise UserError(f"{title} has two columns {repeated[0]!r}")
    return tuple(names)


# ------------------------------------------------------------------------------------------------------------
# Parquet


@contextmanager
def open_parquet(place: str, title: str) -> Iterator[Any]:
    """A context with a `pyarrow.parquet.ParquetFile`; UserError without pyarrow, and for what cannot be read in it."""
    with reworded(f"{title} needs pyarrow: {install('pyarrow')}", ImportError):
        import pyarrow
        import pyarrow.parquet
    with (
        reworded(f"{title} is not a readable parquet file", pyarrow.ArrowException, OSError, ValueError),
        opened(place) as file,
    ):
        yield pyarrow.parquet.ParquetFile(file)


def _parquet_names(file: str, title: str) -> list[str]:
    with open_parquet(file, title) as found:
        names = list(found.schema_arrow.names)
    if not names:
        raise UserError(f"{title} is a parquet file without columns")
    return names


def text_of(value: object) -> str:
    """A value of a parquet file as the text that a CSV would hold."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list):
        return SEVERAL.join(text_of(item) for item in value) + SEVERAL
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
