"""The report of an evaluation: one table for the terminal, HTML, Markdown and CSV, and a section for every dataset.

It reads the records in `eval/<step>/` and nothing else, so that it can be written again at any time and anywhere. What
a record's rows know of single classes (recall and precision, AP, IoU, confusions) becomes tables of text.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.run_folder import Probe, read_probe
from dinoreg.reports import html
from dinoreg.reports.verdict import MAJORITY, PAIRED, balanced, differences, in_cell, judge, paired_rows
from dinoreg.runtime.durations import duration
from dinoreg.runtime.json_files import is_number, number, read_json
from dinoreg.runtime.printable import in_markup
from dinoreg.runtime.templates import DASH, render, score

FORMAT = "dinoreg-evaluation"
ROLES = ("random init", "raw pixels")
NUMBERS = ("value", "95 % interval", "guessing", *ROLES)
COLUMNS = ("dataset", "protocol", "metric", "value", "95 % interval", "guessing", *ROLES, "verdict", "published")


class Record:
    """One dataset's file: its content, and its headline as a probe.

    title      the dataset's, else its name; with the name of the weights where records of others stand beside it
    split      how the images were split, in words, which stands at the end of every row's variant
    weights    of the evaluated model: "name" and "identity"
    rows       of the model as probes beside the baselines of the same protocol, metric and variant; the headline first
    published  the published numbers
    examples   pictures
    """

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        self.content, self.probe = content, read_probe(content, path)
        self.title = str(content.get("title") or self.probe.dataset)
        self.split = str(content.get("split") or "")
        self.weights = (_dicts([content.get("weights")]) or [{}])[0]
        baselines = content.get("baseline_rows")
        known = {role: _dicts(baselines.get(role)) for role in ROLES} if isinstance(baselines, dict) else {}
        self.rows = []
        for row in _dicts(content.get("rows")):
            beside = {role: each for role, rows in known.items() for each in rows if _key(each) == _key(row)}
            about = {"dataset": self.probe.dataset, "baselines": beside}
            self.rows.append(read_probe(row | about, Path("0/row.json")))
        self.published = [each for each in _dicts(content.get("published")) if is_number(each.get("value"))]
        self.examples = sorted((path.parent / "examples" / path.stem).glob("*.png"))


def read_records(folder: Path) -> list[Record]:
    """The records of an `eval/<step>/` folder, by dataset; files of other kinds are skipped."""
    found = ((read_json(path), path) for path in sorted(folder.glob("*.json")))
    records = [Record(*each) for each in found if each[0].get("format") == FORMAT and is_number(each[0].get("value"))]
    if len({record.weights.get("identity") for record in records}) > 1:
        for record in records:
            record.title += f", {record.weights.get('name')}"
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
    table = render("reports/templates/evaluation.md.j2", records=lines, columns=COLUMNS, **values)
    write_atomic(folder / "table.md", table)
    write_atomic(folder / "table.csv", comma_separated(records))
    values["headlines"] = _filled([line for each in lines for line in each if line["verdict"]])
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
            if line["verdict"]:
                figure, *more = line["value"].split("\n")
                figures = "\n".join((figure, line["95 % interval"], *more))
                others = (line[name] for name in ("guessing", *ROLES))
                table.add_row(*map(in_markup, (f"{line['protocol']}\n{line['metric']}", figures, *others)))
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
            against = differences(row.details)
            values = {role: value for role, (value, *_) in row.baselines.items()} | about
            values |= {name: against.get(other, {}).get(key) for name, (other, key) in told.items()}
            writer.writerow(row.details | values)
    return text.getvalue()


def _filled(rows: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]], list[int]]:
    """The columns of a table that have anything in them: names, rows and which hold numbers, of rows by COLUMNS."""
    names = [name for name in COLUMNS if any(row[name] not in ("", DASH) for row in rows)]
    numeric = [place for place, name in enumerate(names) if name in NUMBERS]
    return names, [[row[name] for name in names] for row in rows], numeric


def _section(record: Record, lines: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What the page shows of one dataset."""
    probe, rows, warnings = record.probe, record.rows, record.content.get("warnings")
    words, first = judge(probe), rows[0].details if rows else {}
    seconds = number(record.content.get("seconds"))
    notes = [f"Hyper-parameters were chosen on {first['chosen_on']}."] if first.get("chosen_on") else []
    notes += dict.fromkeys(str(row.details.get("note") or "") for row in rows)
    notes += [f"{line}." for line in (warnings if isinstance(warnings, list) else [])]
    return {
        "record": record,
        "words": words,
        "notes": [*words.sentences, *notes],
        "first": first,
        "time": duration(seconds) if not math.isnan(seconds) else "",
        "square": isinstance(first.get("settings"), dict) and "image_size" in first["settings"],
        "scale": html.probe_scale("this model", probe),
        "rows": _filled([line | {"dataset": "", "published": ""} for line in lines]),
        "classes": [(line["protocol"], class_tables(row.details)) for row, line in zip(rows, lines) if line["verdict"]],
        "galleries": [
            (kind, [html.picture(path, path.stem) for path in paths])
            for kind, paths in groupby(record.examples, lambda path: path.stem.rpartition("_")[0])
        ],
        "settings": json.dumps([row.details.get("settings") for row in rows], indent=1),
    }


def record_lines(record: Record) -> list[dict[str, str]]:
    """The rows of a record as cells by COLUMNS; only the first of each protocol has a verdict and published numbers."""
    lines: list[dict[str, str]] = []
    protocols: set[str] = set()  # of the lines so far
    for row in record.rows:
        details, unit = row.details, row.unit
        protocol = str(details.get("protocol", ""))
        variant = str(details.get("variant") or "").removesuffix(record.split).removesuffix(", ")
        low, high = (score(each, unit) for each in (row.low, row.high))
        line = dict.fromkeys(COLUMNS, "") | {
            "dataset": record.title,
            "protocol": f"{protocol} ({variant})" if variant else protocol,
            "metric": row.metric,
            "value": "\nbalanced ".join(filter(None, (score(row.value, unit), balanced(details)))),
            "95 % interval": f"{low.removesuffix(' %').removesuffix(f' {unit}')} to {high}",
            "guessing": _guessing(row),
            **{role: _against(role, row) for role in ROLES},
        }
        if protocol not in protocols:
            line |= {"verdict": judge(row).short, "published": _published(record, details)}
        lines.append(line)
        protocols.add(protocol)
    return lines


def _guessing(row: Probe) -> str:
    """What no look at the images gives: chance, and always naming the largest class."""
    known = {"chance": row.details.get("chance"), "largest": row.details.get("majority")}
    return (
        "\n".join(f"{name} {score(number(value), row.unit)}" for name, value in known.items() if is_number(value))
        or DASH
    )


def _against(role: str, row: Probe) -> str:
    """A baseline's figure, and on the next line how the row differs from it."""
    value, *_ = row.baselines.get(role, (math.nan,))
    found = differences(row.details).get(role)
    said = f"\n{in_cell(found, row.unit, row.details.get('n_test'))}" if found else ""
    return score(value, row.unit) + said


def _published(record: Record, row: Mapping[str, Any]) -> str:
    """A few published numbers for the headline's protocol and variant."""
    numbers = [
        f"{each['value']:g} {each.get('model', '')}"
        for each in record.published
        if all(each.get(key) == row.get(key) for key in ("protocol", "metric"))
        and (each.get("variant") or "") in str(row.get("variant") or "")
    ]
    return "; ".join(numbers[:3]) or DASH


def _key(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(key) for key in ("protocol", "metric", "variant")]


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
    return score(number(value))
