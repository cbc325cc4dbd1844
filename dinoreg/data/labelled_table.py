"""Tables of labelled images: a CSV, TSV, parquet file or list with a column of paths and one or several of labels; and
shards, whose pictures lie beside their labels.

- `label`: a class's name or number; `cat|outdoors` in any row makes it several labels an image.
- several columns of labels (all but `path` and `split`, or those that are named): one class each, 1 present,
  0 absent, -1 or empty not to be counted.
- `split` (optional): train, val or test, or another usual name of them.

A `classes.txt` beside the table fixes the classes and their order, a name a line.
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from dinoreg.config.option import nearest
from dinoreg.data.folder_index import EXTENSIONS, PathBlock
from dinoreg.data.labelled import LabelledImages, alike, read_classes
from dinoreg.data.shards import split_of_shard
from dinoreg.data.source import PathSource, Source
from dinoreg.data.split_names import split_of
from dinoreg.data.tables import INDEX, SEVERAL, Columns, Table, inside, open_table
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import listed

INDICATORS = {"1": 1, "0": 0, "-1": -1, "": -1, "1.0": 1, "0.0": 0, "-1.0": -1, "true": 1, "false": 0}
_MISSING = frozenset(("", "nan", "<na>", "nat"))  # what tables hold where there is no value
_DOUBTFUL = frozenset(("none", "null", "na", "n/a", "#n/a", "?", "-"))  # or here

Cells = list[tuple[str, str]]  # (where it stands, cell) of every row


def read_labelled_table(
    file: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    columns: Columns | None = None,
    root_option: str = "own.root",
) -> LabelledImages:
    """Read a table of labelled images.

    root         where relative paths begin and which no path may leave; by default the table's folder
    columns      the names of its columns of paths, labels and splits, where they are not usual ones
    root_option  names `root` in messages
    raises       UserError, in one line, for whatever is wrong with the table, and for images that do not exist
    """
    path = Path(os.path.abspath(file))
    base, columns = os.path.abspath(root or path.parent), columns or {}
    table = open_table(path, f"{path}:", base)
    found = table.column("path", columns)
    if found is None:
        expected = "say columns=path:NAME,label:NAME; its columns"
        raise UserError(f"{path}: has no column path; {expected}: {listed(table.names)}")
    columns_of_paths = [found[0], *table.further(columns)]
    entries = {
        column: [(place, inside(base, entry, f"{path} {place}", root_option)) for place, entry in cells]
        for column, cells in _cells(table, columns_of_paths).items()
    }
    first_places: dict[str, str] = {}
    for place, entry in entries[found[0]]:
        if entry in first_places:
            raise UserError(f"{path} {place}: {entry} is listed before, in {first_places[entry]}")
        first_places[entry] = place
    if not first_places:
        raise UserError(f"{path}: lists no images")
    told = _told(str(path), table, columns, columns_of_paths, found[1], read_classes(path.parent))
    bands = [found_files(base, (entry for _, entry in entries[column]), path) for column in columns_of_paths]
    if repeated := [name for name, count in Counter(bands[0]).items() if count > 1]:
        raise UserError(f"{path}: {repeated[0]} is listed twice, once without its ending")
    files = PathBlock.of(file for row in zip(*bands, strict=True) for file in row)
    return LabelledImages(PathSource(base, files, len(bands)), *told)


def read_labelled_shards(source: Source, table: Table, columns: Columns) -> LabelledImages:
    """The images of shards with the labels of a table that has a row for each, in their order.

    columns  the names of its columns of labels and splits, where they are not usual ones; without one of splits the
             shards' names may tell them
    raises   UserError, in one line, for whatever is wrong with the table
    """
    found = LabelledImages(source, *_told(table.title, table, columns, [], [], None))
    splits = [(split_of_shard(name), count) for name, count in source.shards()]
    if found.words is not None or not all(word for word, _ in splits):
        return found
    return replace(found, words=[str(word) for word, count in splits for _ in range(count)])


def _told(
    where: str, table: Table, columns: Columns, paths: list[str], notes: list[str], given: list[str] | None
) -> tuple[np.ndarray, list[str], list[str] | None, list[str]]:
    """What a table tells of its images: labels, names of the classes, splits if there are any, and warnings.

    where  begins messages
    paths  the columns of these, and notes on how they were found
    given  the names of the classes
    """
    split = table.column("split", columns)
    splits, of_split = ([split[0]], split[1]) if split else ([], [])
    labels, left = _label_columns(table, columns, [*paths, *splits])
    cells = _cells(table, [*labels, *splits])
    words = [_split_of(cell, f"{where} {place}") for place, cell in cells[splits[0]]] if splits else None
    warnings = [*table.notes, *notes, *of_split, *left]
    numbers, names = _labels(where, {name: cells[name] for name in labels}, given, warnings)
    return numbers, names, words, warnings


def found_files(root: str | os.PathLike[str], paths: Iterable[str], where: Path) -> list[str]:
    """The paths below the root, those of identifiers without an ending completed by that of the one picture so called.

    Raises UserError, beginning with `where`, naming the first path that does not exist and counting the others.
    """

    @cache
    def pictures(folder: str) -> dict[str, list[str]]:
        """Names by themselves and without their ending; every folder is listed once, quicker than file by file."""
        found: dict[str, list[str]] = defaultdict(list)
        with suppress(OSError):
            for name in os.listdir(os.path.join(root, folder)):
                found[name].insert(0, name)
                stem, ending = os.path.splitext(name)
                if ending.lower() in EXTENSIONS:
                    found[stem].append(name)
        return found

    found = []
    absent = []
    for path in paths:
        folder, name = os.path.split(path)
        named = pictures(folder).get(name, [])
        if len(named) == 1 or name in named[:1]:
            found.append(os.path.join(folder, named[0]))
        else:
            absent.append(path)
    if absent:
        more = f", and so are {len(absent) - 1:,} others" if len(absent) > 1 else ""
        raise UserError(f"{where}: {os.path.join(root, absent[0])} is missing{more}")
    return found


def _cells(table: Table, names: list[str]) -> dict[str, Cells]:
    found: dict[str, Cells] = {name: [] for name in names}
    for number, row in table.cells(*found):
        for name, cell in zip(found, row, strict=True):
            found[name].append((f"{table.unit} {number}", cell))
    return found


def _split_of(word: str, where: str) -> str:
    split = split_of(word)
    if split is None:
        raise UserError(f"{where}: split {word!r}{nearest(word, ('train', 'val', 'test'))}; expected train, val, test")
    return split


def _label_columns(table: Table, columns: Columns, taken: list[str]) -> tuple[list[str], list[str]]:
    """The columns of labels, and notes on how they were chosen.

    taken   the columns of paths and splits
    raises  UserError where there are none, and for columns that are neither
    """
    if "label" in columns:
        return [table.named(name) for name in columns["label"]], []
    others = [name for name in table.names if name not in taken and name.strip().lower() not in INDEX]
    left = [f"the column {name!r} is left out" for name in table.names if name not in (*others, *taken)]
    label = table.column("label", columns)
    if label is not None:
        others.remove(label[0])
    if label is not None and others and not table.files:
        known = f"path:{taken[0]},label:{label[0]}"
        raise UserError(
            f"{table.title} unknown column {others[0]!r} beside path, label and split; columns={known} leaves it out, "
            f"columns=label:COLUMN,label:COLUMN takes other columns as labels"
        )
    if label is not None:
        return [label[0]], [*label[1], *left]
    if not others or (table.files and len(others) > 1):
        raise UserError(
            f"{table.title} has no column label; say columns=label:NAME; its columns: {listed(table.names)}"
        )
    taken_as = [f"the column {others[0]!r} is taken as the label"] if len(others) == 1 else []
    return others, [*taken_as, *left]


def _labels(
    file: str, cells: Mapping[str, Cells], given: list[str] | None, warnings: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Labels of the whole table, and the names of their classes, which may be given."""
    if len(cells) > 1:
        return np.array([_indicators(file, *each) for each in cells.items()], dtype=np.int8).T, list(cells)
    (column,) = cells.values()
    several = any(SEVERAL in cell for _, cell in column)
    sets = {place: [part.strip() for part in cell.split(SEVERAL) if part.strip()] for place, cell in column}
    for place, parts in sets.items():
        if (not parts and not several) or any(part.lower() in _MISSING for part in parts):
            raise UserError(f"{file} {place}: the label is {'empty' if not parts else f'missing ({parts[0]})'}")
    sets = _one_spelling(sets, given, warnings)
    number, names = _numbering({part for parts in sets.values() for part in parts}, given)
    if not several and len({parts[0] for parts in sets.values()}) < 2:
        raise UserError(f"{file}: every image has the label {column[0][1]!r}, expected at least two classes")
    numbers = [[number(part, f"{file} {place}") for part in parts] for place, parts in sets.items()]
    present = {each for row in numbers for each in row}
    if given is not None and (absent := [name for index, name in enumerate(names) if index not in present]):
        warnings.append(f"classes of classes.txt without an image: {listed(absent)}")
    if not several:
        return np.array(numbers, dtype=np.int64)[:, 0], names
    labels = np.zeros((len(numbers), len(names)), dtype=np.int8)
    for row, found in zip(labels, numbers, strict=True):
        row[found] = 1
    return labels, names


def _one_spelling(sets: Mapping[str, list[str]], given: list[str] | None, warnings: list[str]) -> dict[str, list[str]]:
    """The labels with one spelling of each number, 1 for 1.0 and 01, where all are numbers; and with composed accents.

    Adds warnings on numbers of several spellings, on classes that differ only in case, and on labels that may say that
    there is none.
    """
    plain = {place: [unicodedata.normalize("NFC", part) for part in parts] for place, parts in sets.items()}
    counts = Counter(part for parts in plain.values() for part in parts)
    if doubtful := [label for label in counts if label.lower() in _DOUBTFUL]:
        warnings += [f"the label {label!r} of {counts[label]:,} rows is taken as a class" for label in doubtful]
    whole = {label: _whole(label) for label in counts if label not in (given or ())}
    spellings = defaultdict(list)
    for label, value in whole.items():
        spellings[value].append(label)
    several = [each for value, each in spellings.items() if value is not None and len(each) > 1]
    one: dict[str, str] = {}
    if None in spellings:  # among names a number may be a name
        warnings += [f"the labels {listed(each)} count as {len(each)} classes" for each in several]
        warnings += alike(counts)
    elif several or any("." in label for label in whole):
        one = {label: str(value) for label, value in whole.items()}
        warnings += [f"the labels {listed(each)} are taken as one class, {one[each[0]]}" for each in several]
    return {place: [one.get(part, part) for part in parts] for place, parts in plain.items()}


def _whole(label: str) -> int | None:
    """The whole number that a label is, in any spelling, 1, 01 or 1.0; None for any other."""
    try:
        value = float(label) if label.strip("+-.0123456789") == "" else None
    except ValueError:
        return None
    return int(value) if value is not None and value.is_integer() else None


def _indicators(file: str, name: str, column: Cells) -> list[int]:
    for place, cell in column:
        if cell.lower() not in INDICATORS:
            raise UserError(f"{file} {place}: {name} is {cell!r}, expected 1, 0 or -1")
    return [INDICATORS[cell.lower()] for _, cell in column]


def _numbering(cells: set[str], given: list[str] | None) -> tuple[Callable[[str, str], int], list[str]]:
    """A cell's class number, and the names of the classes; whole numbers are ordered as such."""
    whole = {cell: int(cell) for cell in cells if cell.removeprefix("-").isdecimal() and len(cell) < 20}
    numeric = len(whole) == len(cells)
    names = given or sorted(cells, key=(lambda cell: (whole[cell], cell)) if numeric else None)
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
