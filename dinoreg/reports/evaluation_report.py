"""The report of an evaluation: one table for the terminal, HTML, Markdown and CSV, and a section for every dataset.

It reads the records in `eval/<step>/` and nothing else, so that it can be written again at any time and anywhere. What
a record's rows know of single classes (recall and precision, AP, IoU, confusions) becomes tables of text.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.run_folder import read_probe
from dinoreg.reports import html
from dinoreg.reports.verdict import DASH, MAJORITY, PAIRED, balanced, differences, in_cell, judge, paired_rows
from dinoreg.runtime.durations import duration
from dinoreg.runtime.json_files import is_number, number, read_json
from dinoreg.runtime.printable import in_markup
from dinoreg.runtime.templates import render, score

FORMAT = "dinoreg-evaluation"
ROLES = ("random init", "raw pixels")
NUMBERS = ("value", "95 % interval", "guessing", *ROLES)
COLUMNS = ("dataset", "protocol", "metric", "value", "95 % interval", "guessing", *ROLES, "verdict", "published")


class Record:
    """One dataset's file: its headline as a probe, and its content.

    weights    of the evaluated model: "name" and "identity"
    rows       of the model, the headline first
    published  the published numbers
    examples   pictures
    """

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        self.content, self.probe = content, read_probe(content, path)
        self.weights = (_dicts([content.get("weights")]) or [{}])[0]
        self.rows = _dicts(content.get("rows"))
        self.published = [each for each in _dicts(content.get("published")) if is_number(each.get("value"))]
        self.examples = sorted((path.parent / "examples" / path.stem).glob("*.png"))

    @property
    def title(self) -> str:
        """The dataset's title, else its name."""
        return str(self.content.get("title") or self.probe.dataset)

    @property
    def split(self) -> str:
        """How the images were split, in words, which stands at the end of every row's variant."""
        return str(self.content.get("split") or "")

    def baseline(self, role: str, row: dict[str, Any]) -> dict[str, Any]:
        """The baseline's row for the same protocol, metric and variant, or {}."""
        rows = self.content.get("baseline_rows")
        candidates = _dicts(rows.get(role)) if isinstance(rows, dict) else []
        same = ("protocol", "metric", "variant")
        return next((each for each in candidates if all(each.get(key) == row.get(key) for key in same)), {})


class Line(NamedTuple):
    """A row of a record, its cells under COLUMNS, and whether it is the first of its protocol.

    Only the first has a verdict and published numbers in its cells.
    """

    row: dict[str, Any]
    cells: list[str]
    is_headline: bool


def read_records(folder: Path) -> list[Record]:
    """The records of an `eval/<step>/` folder, by dataset; files of other kinds are skipped."""
    found = ((read_json(path), path) for path in sorted(folder.glob("*.json")))
    records = [Record(*each) for each in found if each[0].get("format") == FORMAT and is_number(each[0].get("value"))]
    if len({record.weights.get("identity") for record in records}) > 1:
        for record in records:
            record.content["title"] = f"{record.title}, {record.weights.get('name')}"
    return records


def write_evaluation(folder: str | Path, absent: Sequence[str] = (), paired: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write `report.html`, `table.md` and `table.csv` beside the records; returns the path of the page.

    absent  lines on datasets that could not be evaluated
    paired  weights against others on the same images, as `comparison.between` gives them
    """
    folder = Path(folder)
    records = read_records(folder)
    lines = [record_lines(record) for record in records]
    values: dict[str, Any] = {"lead": _lead(records), "paired_columns": PAIRED, "paired": paired_rows(paired)}
    cells = [[line.cells for line in each] for each in lines]
    table = render("reports/templates/evaluation.md.j2", records=cells, columns=COLUMNS, **values)
    write_atomic(folder / "table.md", table)
    write_atomic(folder / "table.csv", comma_separated(records))
    values["headlines"] = _filled([line.cells for each in lines for line in each if line.is_headline])
    values |= {"datasets": list(map(_section, records, lines)), "absent": absent}
    write_atomic(folder / "report.html", html.page("reports/templates/evaluation.html.j2", "Evaluation", **values))
    return folder / "report.html"


def console_table(records: Sequence[Record]) -> Table:
    """The headlines as a table for the terminal, of 80 columns or more."""
    table = Table(title=_lead(records), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("measure", overflow="fold")
    for name, width in (("model", 16), ("guessing", 14), *((role, 14) for role in ROLES)):
        table.add_column(name, justify="right", min_width=width)
    several = len({record.weights.get("identity") for record in records}) > 1
    for record in records:
        name = record.probe.dataset + (f", {record.weights.get('name', '')}" if several else "")
        table.add_row(f"[bold]{in_markup(name)}[/]")
        for line in record_lines(record):
            _, protocol, metric, value, interval, *others, _, _ = line.cells
            if line.is_headline:
                figure, *more = value.split("\n")
                lines = [figure, f"[{re.sub(' [^ 0-9]+$', '', interval)}]", *more]
                table.add_row(*map(in_markup, (f"{protocol}\n{metric}", "\n".join(lines), *others)))
        table.add_section()
    return table


def comma_separated(records: Sequence[Record]) -> str:
    """Every row as CSV with its numbers unrounded, for a spreadsheet."""
    text = io.StringIO()
    keys = ["protocol", "metric", "variant", "value", "low", "high", "unit", "n_train", "n_test", "chosen_on", "hours"]
    keys += ["chance", "majority"]
    facts = ("precision", "image_size", "seed")
    others = (*ROLES, MAJORITY)
    told = {f"{name}, {key}": (name, key) for name in others for key in ("difference", "low", "high", "verdict")}
    columns = ("dataset", *keys, *ROLES, *told, "weights", *facts)
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        about = {"dataset": record.probe.dataset, "weights": record.weights.get("identity")}
        about |= {key: record.content.get(key) for key in facts}
        for row in record.rows:
            against = differences(row)
            values = {role: record.baseline(role, row).get("value") for role in ROLES} | about
            values |= {name: against.get(other, {}).get(key) for name, (other, key) in told.items()}
            writer.writerow(row | values)
    return text.getvalue()


def _filled(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]], list[int]]:
    """The columns of a table that have anything in them: names, rows and which hold numbers, of rows under COLUMNS."""
    kept = [place for place in range(len(COLUMNS)) if any(row[place] not in ("", DASH) for row in rows)]
    names = [COLUMNS[place] for place in kept]
    numeric = [place for place, name in enumerate(names) if name in NUMBERS]
    return names, [[row[place] for place in kept] for row in rows], numeric


def _section(record: Record, lines: Sequence[Line]) -> dict[str, Any]:
    """What the page shows of one dataset."""
    probe, rows, warnings = record.probe, record.rows, record.content.get("warnings")
    words, first = judge(probe), rows[0] if rows else {}
    seconds = number(record.content.get("seconds"))
    notes = [f"Hyper-parameters were chosen on {first['chosen_on']}."] if first.get("chosen_on") else []
    notes += dict.fromkeys(str(row.get("note") or "") for row in rows)
    notes += [f"{line}." for line in (warnings if isinstance(warnings, list) else [])]
    return {
        "record": record,
        "words": words,
        "notes": [*words.sentences, *notes],
        "first": first,
        "time": duration(seconds) if not math.isnan(seconds) else "",
        "square": isinstance(first.get("settings"), dict) and "image_size" in first["settings"],
        "scale": html.probe_scale("this model", probe),
        "rows": _filled([[DASH, *line.cells[1:-1], DASH] for line in lines]),
        "classes": [(line.row.get("protocol"), class_tables(line.row)) for line in lines if line.is_headline],
        "galleries": [
            (kind, [html.picture(path, path.stem) for path in paths])
            for kind, paths in groupby(record.examples, lambda path: path.stem.rpartition("_")[0])
        ],
        "settings": json.dumps([row.get("settings") for row in rows], indent=1),
    }


def record_lines(record: Record) -> list[Line]:
    """The rows of a record as cells of a table."""
    lines: list[Line] = []
    for row in record.rows:
        unit, protocol = str(row.get("unit", "share")), str(row.get("protocol", ""))
        variant = str(row.get("variant") or "").removesuffix(record.split).removesuffix(", ")
        is_headline = all(str(line.row.get("protocol", "")) != protocol for line in lines)
        low, high = _score(row, "low", unit), _score(row, "high", unit)
        baselines = {role: record.baseline(role, row) for role in ROLES}
        cells = [
            record.title,
            f"{protocol} ({variant})" if variant else protocol,
            str(row.get("metric", "")),
            "\nbalanced ".join(filter(None, (_score(row, "value", unit), balanced(row)))),
            f"{low.removesuffix(' %').removesuffix(f' {unit}')} to {high}",
            _guessing(row, unit),
            *(_against(role, baseline, row, unit) for role, baseline in baselines.items()),
            "",
            "",
        ]
        if is_headline:
            probe = read_probe({**row, "dataset": record.probe.dataset, "baselines": baselines}, Path("0/row.json"))
            cells[-2:] = judge(probe).short, _published(record, row)
        lines.append(Line(row, cells, is_headline))
    return lines


def _guessing(row: dict[str, Any], unit: str) -> str:
    """What no look at the images gives: chance, and always naming the largest class."""
    names = {"chance": "chance", "majority": "largest"}
    lines = [f"{name} {_score(row, key, unit)}" for key, name in names.items() if is_number(row.get(key))]
    return "\n".join(lines) or DASH


def _against(role: str, baseline: dict[str, Any], row: dict[str, Any], unit: str) -> str:
    """A baseline's figure, and on the next line how the row differs from it."""
    found = differences(row).get(role)
    return _score(baseline, "value", unit) + (f"\n{in_cell(found, unit, row.get('n_test'))}" if found else "")


def _published(record: Record, row: dict[str, Any]) -> str:
    """A few published numbers for the headline's protocol and variant."""
    numbers = [
        f"{each['value']:g} {each.get('model', '')}"
        for each in record.published
        if all(each.get(key) == row.get(key) for key in ("protocol", "metric"))
        and (each.get("variant") or "") in str(row.get("variant") or "")
    ]
    return "; ".join(numbers[:3]) or DASH


def _score(row: dict[str, Any], key: str, unit: str) -> str:
    return score(row[key], unit) if is_number(row.get(key)) else DASH


def _dicts(value: Any) -> list[dict[str, Any]]:
    """The objects in a list of a record; what is of another kind is passed over."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _lead(records: Sequence[Record]) -> str:
    names = dict.fromkeys(str(record.weights.get("name", "")) for record in records)
    return f"Evaluation of {', '.join(filter(None, names)) or 'nothing'}"


# ------------------------------------------------------------------------------------------------------------
# Single classes


IN_FULL, LISTED = 12, 30  # classes of a matrix that is shown whole; rows of a list
SINGLE = {"AP": "AP", "iou": "IoU"}  # details of one number a class, and their names


class ClassTable(NamedTuple):
    """A title, column headings and rows of text; columns from the second on are numbers where `numeric`."""

    title: str
    head: list[str]
    rows: list[list[str]]
    numeric: bool = True


def class_tables(row: Mapping[str, Any]) -> list[ClassTable]:
    """The tables of one row of a record; [] where its details have nothing on classes, or not what was written."""
    try:
        return list(_tables(row["details"]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return []


def _tables(details: Mapping[str, Any]) -> Iterator[ClassTable]:
    classes = [(each["class"], each["n"], each["recall"], each["precision"]) for each in details.get("classes", ())]
    if classes:
        rows = [([name, f"{n:,}", _share(recall), _share(precision)], recall) for name, n, recall, precision in classes]
        yield _lowest("recall", ["class", "test images", "recall", "precision"], rows)
        names, matrix = [name for name, *_ in classes], details.get("confusion", ())
        wrong = [[names[i], names[j], n] for i, line in enumerate(matrix) for j, n in enumerate(line) if n and i != j]
        listed = details.get("confusions") or sorted(wrong, key=lambda each: -each[2])
        if matrix and len(names) <= IN_FULL:
            rows_of_text = [[name, *map(str, line)] for name, line in zip(names, matrix)]
            yield ClassTable("Confusion: rows are the true classes, columns what was said", ["", *names], rows_of_text)
        elif listed:
            rows_of_text = [list(map(str, each)) for each in listed[:LISTED]]
            yield ClassTable("Largest confusions", ["true class", "said to be", "images"], rows_of_text, numeric=False)
    for key, name in SINGLE.items():
        if values := details.get(key):
            yield _lowest(name, ["class", name], [([each, _share(value)], value) for each, value in values.items()])


def _lowest(key: str, head: list[str], rows: list[tuple[list[str], Any]]) -> ClassTable:
    """The rows, each with the value of `key`; of many classes those with the lowest."""
    if len(rows) <= LISTED:
        return ClassTable("Classes", head, [text for text, _ in rows])
    known = sorted((row for row in rows if is_number(row[1])), key=lambda row: number(row[1]))
    title = f"The {LISTED} of {len(rows):,} classes with the lowest {key}"
    return ClassTable(title, head, [text for text, _ in known[:LISTED]])


def _share(value: Any) -> str:
    return score(value) if is_number(value) else DASH
