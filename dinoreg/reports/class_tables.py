"""What a result's rows know of single classes, as tables of text: recall and precision, AP, IoU, confusions."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dinoreg.reports.verdict import DASH
from dinoreg.runtime.json_files import is_number, number
from dinoreg.runtime.templates import score

IN_FULL, LISTED = 12, 30  # classes of a matrix that is shown whole; rows of a list
SINGLE = {"AP": "AP", "iou": "IoU"}  # details of one number a class, and their names


class Table(NamedTuple):
    """A title, column headings and rows of text; columns from the second on are numbers where `numeric`."""

    title: str
    head: list[str]
    rows: list[list[str]]
    numeric: bool = True


def class_tables(row: Mapping[str, Any]) -> list[Table]:
    """The tables of one row of a record; [] where its details have nothing on classes, or not what was written."""
    try:
        return list(_tables(row["details"]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return []


def _tables(details: Mapping[str, Any]) -> Iterator[Table]:
    classes = [(each["class"], each["n"], each["recall"], each["precision"]) for each in details.get("classes", ())]
    if classes:
        rows = [([name, f"{n:,}", _share(recall), _share(precision)], recall) for name, n, recall, precision in classes]
        yield _lowest("recall", ["class", "test images", "recall", "precision"], rows)
        names, matrix = [name for name, *_ in classes], details.get("confusion", ())
        wrong = [[names[i], names[j], n] for i, line in enumerate(matrix) for j, n in enumerate(line) if n and i != j]
        listed = details.get("confusions") or sorted(wrong, key=lambda each: -each[2])
        if matrix and len(names) <= IN_FULL:
            rows_of_text = [[name, *map(str, line)] for name, line in zip(names, matrix)]
            yield Table("Confusion: rows are the true classes, columns what was said", ["", *names], rows_of_text)
        elif listed:
            rows_of_text = [list(map(str, each)) for each in listed[:LISTED]]
            yield Table("Largest confusions", ["true class", "said to be", "images"], rows_of_text, numeric=False)
    for key, name in SINGLE.items():
        if values := details.get(key):
            yield _lowest(name, ["class", name], [([each, _share(value)], value) for each, value in values.items()])


def _lowest(key: str, head: list[str], rows: list[tuple[list[str], Any]]) -> Table:
    """The rows, each with the value of `key`; of many classes those with the lowest."""
    if len(rows) <= LISTED:
        return Table("Classes", head, [text for text, _ in rows])
    known = sorted((row for row in rows if is_number(row[1])), key=lambda row: number(row[1]))
    title = f"The {LISTED} of {len(rows):,} classes with the lowest {key}"
    return Table(title, head, [text for text, _ in known[:LISTED]])


def _share(value: Any) -> str:
    return score(value) if is_number(value) else DASH
