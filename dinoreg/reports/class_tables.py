"""What a result's rows know of single classes, as tables of text: recall and precision, AP, IoU, confusions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dinoreg.runtime.json_files import is_number
from dinoreg.runtime.templates import score

DASH = "\u2013"
IN_FULL, LISTED = 12, 30  # classes of a matrix that is shown whole; rows of a list
SINGLE = {"AP": "AP", "iou": "IoU"}  # details of one number a class, and their names


class Table(NamedTuple):
    """A title, column headings and rows of text; columns from the second on are numbers where `numeric`."""

    title: str
    head: list[str]
    rows: list[list[str]]
    numeric: bool = True


def class_tables(row: Mapping[str, Any]) -> list[Table]:
    """The tables of one row of a record; [] where its details have nothing on classes, or are broken."""
    details = row.get("details")
    if not isinstance(details, dict):
        return []
    classes, found = _classes(details.get("classes")), []
    if classes:
        shown, title = _most_wrong(classes, "recall")
        rows = [
            [str(each["class"]), f"{each['n']:,}", _share(each, "recall"), _share(each, "precision")] for each in shown
        ]
        found.append(Table(title, ["class", "test images", "recall", "precision"], rows))
        found += _confusions([str(each["class"]) for each in classes], details)
    for key, name in SINGLE.items():
        if isinstance(values := details.get(key), dict) and values:
            shown, title = _most_wrong([{"class": each, name: value} for each, value in values.items()], name)
            found.append(Table(title, ["class", name], [[str(each["class"]), _share(each, name)] for each in shown]))
    return found


def _classes(value: Any) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else []
    return [each for each in items if isinstance(each, dict) and "class" in each and is_number(each.get("n"))]


def _most_wrong(classes: list[dict[str, Any]], key: str) -> tuple[list[dict[str, Any]], str]:
    """All of a few classes, of many those with the lowest values of a key; and the table's title."""
    if len(classes) <= LISTED:
        return classes, "Classes"
    known = sorted((each for each in classes if is_number(each.get(key))), key=lambda each: each[key])
    return known[:LISTED], f"The {LISTED} of {len(classes):,} classes with the lowest {key}"


def _confusions(names: list[str], details: Mapping[str, Any]) -> list[Table]:
    """The matrix of a few classes, of more the largest confusions."""
    matrix, listed = details.get("confusion"), details.get("confusions")
    if not isinstance(listed, list) and not _is_matrix(matrix, len(names)):
        return []
    if not isinstance(listed, list):
        assert isinstance(matrix, list)
        if len(names) <= IN_FULL:
            rows = [[name, *map(str, counts)] for name, counts in zip(names, matrix)]
            return [Table("Confusion: rows are the true classes, columns what was said", ["", *names], rows)]
        pairs = ((i, j) for i in range(len(names)) for j in range(len(names)) if i != j and matrix[i][j])
        listed = sorted(([names[i], names[j], matrix[i][j]] for i, j in pairs), key=lambda each: -each[2])
    rows = [list(map(str, each)) for each in listed[:LISTED] if isinstance(each, list) and len(each) == 3]
    return [Table("Largest confusions", ["true class", "said to be", "images"], rows, numeric=False)] if rows else []


def _is_matrix(value: Any, size: int) -> bool:
    def whole(each: Any, check: Any) -> bool:
        return isinstance(each, list) and len(each) == size and all(map(check, each))

    return whole(value, lambda row: whole(row, is_number))


def _share(values: Mapping[str, Any], key: str) -> str:
    return score(values[key]) if is_number(values.get(key)) else DASH
