"""The report of an evaluation: one table for the terminal, HTML, Markdown and CSV, and a section for every dataset.

It reads the records in `eval/<step>/` and nothing else, so that it can be written again at any time and anywhere.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.reports import html
from dinoreg.reports.run_folder import Probe, is_number, number, read_probe
from dinoreg.reports.verdict import judge, score

FORMAT = "dinoreg-evaluation"
COLUMNS = (
    "dataset",
    "protocol",
    "metric",
    "value",
    "95 % interval",
    "random init",
    "raw pixels",
    "verdict",
    "published",
)
ROLES = ("random init", "raw pixels")
DASH = "\u2013"


@dataclass(frozen=True)
class Record:
    """One dataset's file: its headline as a probe, everything else as it stands."""

    probe: Probe
    content: dict[str, Any]
    examples: tuple[Path, ...]

    @property
    def title(self) -> str:
        return str(self.content.get("title") or self.probe.dataset)


def read_records(folder: Path) -> list[Record]:
    """The records of an `eval/<step>/` folder, by dataset; files of other kinds are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict) or content.get("format") != FORMAT or not is_number(content.get("value")):
            continue
        examples = tuple(sorted((folder / "examples" / path.stem).glob("*.png")))
        found.append(Record(read_probe(content, path), content, examples))
    return found


def write_evaluation(folder: str | Path, absent: Sequence[str] = ()) -> Path:
    """Write `report.html`, `table.md` and `table.csv` beside the records; returns the path of the page.

    absent  lines on datasets that could not be evaluated
    """
    folder = Path(folder)
    records = read_records(folder)
    write_atomic(folder / "table.md", markdown(records))
    write_atomic(folder / "table.csv", comma_separated(records))
    write_atomic(folder / "report.html", render(records, absent))
    return folder / "report.html"


def console_table(records: Sequence[Record]) -> Table:
    """The headlines for a terminal."""
    table = Table(title=_weights(records))
    for name in ("dataset", "measure", "value", "95 % interval", "random", "pixels", "verdict"):
        table.add_column(name, justify="left" if name in ("dataset", "measure", "verdict") else "right")
    for record in records:
        for row, cells in _headlines(record):
            _, _, metric, value, interval, *beside, _ = cells
            measure = f"{metric}\n{row['protocol']}"
            table.add_row(record.probe.dataset, measure, value, interval.removesuffix(" %"), *beside)
    return table


def markdown(records: Sequence[Record]) -> str:
    """Every row of every dataset as one Markdown table, headlines in bold."""
    lines = [f"# {_weights(records)}", "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for record in records:
        for place, row in enumerate(_rows(record)):
            shown = [cell.replace("|", "\\|") for cell in row]
            lines.append("| " + " | ".join([f"**{shown[0]}**" if place == 0 else shown[0], *shown[1:]]) + " |")
    return "\n".join(lines) + "\n"


def comma_separated(records: Sequence[Record]) -> str:
    """Every row with its numbers unrounded, for a spreadsheet."""
    text = io.StringIO()
    keys = ("protocol", "metric", "variant", "value", "low", "high", "unit", "n_train", "n_test", "chosen_on", "hours")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", *keys, *ROLES, "weights", "precision", "image_size", "seed"])
    for record in records:
        facts = record.content
        tail = [
            facts.get("weights", {}).get("identity"),
            *(facts.get(key) for key in ("precision", "image_size", "seed")),
        ]
        for row in _of(facts, "rows"):
            beside = [_matching(facts, role, row).get("value", "") for role in ROLES]
            writer.writerow([record.probe.dataset, *(row.get(key, "") for key in keys), *beside, *tail])
    return text.getvalue()


def render(records: Sequence[Record], absent: Sequence[str] = ()) -> str:
    """The page."""
    headlines = [cells for record in records for _, cells in _headlines(record)]
    summary = html.table(COLUMNS, headlines, numeric=(3, 4, 5, 6)) if records else "<p>Nothing was measured.</p>"
    sections = [("table", "Results", f'<div class="card">{summary}</div>')]
    sections += [(f"d-{record.probe.dataset}", record.title, _section(record)) for record in records]
    if absent:
        listed = "".join(f"<p>{html.escape(line)}</p>" for line in absent)
        sections.append(("absent", "Not evaluated", f'<div class="card">{listed}</div>'))
    body = [
        "<h1>Evaluation</h1>",
        f'<p class="soft">{html.escape(_weights(records))}</p>',
        html.navigation([(anchor, title) for anchor, title, _ in sections]),
        *(html.section(anchor, title, content) for anchor, title, content in sections),
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} by dinoreg. Intervals are 95 % bootstrap intervals over "
        "the images of the test split. This page needs no network.</footer>",
    ]
    return html.page("Evaluation · dinoreg", body)


def _section(record: Record) -> str:
    facts, probe = record.content, record.probe
    words = judge(probe)
    top = (_of(facts, "rows") or [{}])[0]
    chosen = f"Hyper-parameters were chosen on {top['chosen_on']}." if top.get("chosen_on") else ""
    notes = [*words.sentences, chosen, *dict.fromkeys(str(row.get("note") or "") for row in _of(facts, "rows"))]
    warnings = facts.get("warnings")
    notes += [f"{line}." for line in warnings] if isinstance(warnings, list) else []
    parts = [
        f'<div class="card verdict {words.tone}"><p>{html.escape(words.headline)}</p>'
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes if note)
        + "</div>",
        _tiles(record, top),
        _intervals(record),
        f'<div class="card"><h3>Every row</h3>{html.table(COLUMNS[1:-1], [row[1:-1] for row in _rows(record)])}</div>',
    ]
    published = [
        (
            each.get("model", ""),
            each.get("protocol", ""),
            f"{each.get('metric', '')} {each.get('variant', '')}".strip(),
            f"{each['value']:g}",
            each.get("source", ""),
            each.get("differs") or DASH,
        )
        for each in _of(facts, "published")
        if is_number(each.get("value"))
    ]
    if published:
        head = ("model", "protocol", "metric", "published", "source", "what differs")
        parts.append(f'<div class="card"><h3>Published</h3>{html.table(head, published, numeric=(3,))}</div>')
    pictures = "".join(html.picture(path, f"{record.title}: {path.stem}") for path in record.examples)
    if pictures:
        parts.append(f'<div class="gallery">{pictures}</div>')
    settings = json.dumps([row.get("settings") for row in _of(facts, "rows")], indent=1)
    parts.append(
        f'<details class="card"><summary>settings of every row</summary><pre>{html.escape(settings)}</pre></details>'
    )
    return "\n".join(part for part in parts if part)


def _tiles(record: Record, top: dict[str, Any]) -> str:
    facts, probe = record.content, record.probe
    seconds = facts.get("seconds")
    hours = f"{number(seconds) / 3600:.2f} h" if is_number(seconds) else ""
    weights = facts.get("weights") if isinstance(facts.get("weights"), dict) else {}
    assert isinstance(weights, dict)
    settings = top.get("settings")
    square = isinstance(settings, dict) and "image_size" in settings
    size = f"{facts.get('image_size', '')} px" if square else "the images' own sizes"
    return html.facts(
        [
            ("task", str(facts.get("task", "")), str(top.get("variant", ""))),
            (probe.metric, score(probe.value, _unit(probe)), str(top.get("protocol", ""))),
            ("images", f"{top.get('n_test', 0):,}", f"tested; {top.get('n_train', 0):,} learnt from"),
            ("weights", str(weights.get("name", "")), str(weights.get("identity", ""))),
            ("input", size, str(facts.get("precision", ""))),
            ("time", hours, f"seed {facts.get('seed', '')}, {facts.get('date', '')}"),
        ]
    )


def _intervals(record: Record) -> str:
    """The headline and its baselines on one scale."""
    probe, unit = record.probe, _unit(record.probe)
    rows = [("this model", probe.value, probe.low, probe.high, True)]
    rows += [(name, *numbers, False) for name, numbers in probe.baselines.items()]
    ends = [end for _, _, low, high, _ in rows for end in (low, high)]
    chance = probe.details.get("chance")
    scale = (0.0, 1.0) if unit == "share" else (min(0.0, *ends), max(ends) or 1.0)
    body = html.interval_rows(
        rows, lambda value: score(value, unit), number(chance) if is_number(chance) else None, *scale
    )
    better = "" if probe.details.get("higher_is_better", True) else " Lower is better."
    dotted = f" Dotted: chance, {score(number(chance))}." if is_number(chance) else ""
    return (
        f'<div class="card"><p class="note">{html.escape(probe.metric)} with its interval.{better}{dotted}</p>'
        f'<div class="scroll"><table><tbody>{body}</tbody></table></div></div>'
    )


def _headlines(record: Record) -> list[tuple[dict[str, Any], list[str]]]:
    """The first row of each protocol, and its cells."""
    rows = _of(record.content, "rows")
    first = {str(row.get("protocol")): place for place, row in reversed(list(enumerate(rows)))}
    cells = list(_rows(record))
    return [(rows[place], cells[place]) for place in sorted(first.values())]


def _rows(record: Record) -> Iterable[list[str]]:
    """The cells of every row; the first of each protocol has a verdict and published numbers beside it."""
    facts = record.content
    seen: set[str] = set()
    for row in _of(facts, "rows"):
        unit = str(row.get("unit", "share"))
        title = str(row.get("protocol", ""))
        variant = f" ({row['variant']})" if row.get("variant") else ""
        beside = [_matching(facts, role, row) for role in ROLES]
        leads = title not in seen
        seen.add(title)
        low, high = _shown(row, "low", unit), _shown(row, "high", unit)
        yield [
            record.title,
            f"{title}{variant}",
            str(row.get("metric", "")),
            _shown(row, "value", unit),
            f"{low.removesuffix(' %').removesuffix(f' {unit}')} to {high}",
            *(_shown(each, "value", unit) for each in beside),
            judge(_as_probe(record, row)).short if leads else "",
            _published(facts, row) if leads else "",
        ]


def _as_probe(record: Record, row: dict[str, Any]) -> Probe:
    """A row in the form that verdicts are passed on."""
    baselines = {role: found for role in ROLES if (found := _matching(record.content, role, row))}
    return read_probe({**row, "dataset": record.probe.dataset, "baselines": baselines}, Path("0/row.json"))


def _published(facts: dict[str, Any], row: dict[str, Any]) -> str:
    """A few published numbers for the headline's protocol and variant."""
    fitting = [
        each
        for each in _of(facts, "published")
        if each.get("protocol") == row.get("protocol")
        and is_number(each.get("value"))
        and (each.get("variant") or "") in str(row.get("variant") or "")
    ]
    return "; ".join(f"{each['value']:g} {each.get('model', '')}" for each in fitting[:3]) or DASH


def _matching(facts: dict[str, Any], role: str, row: dict[str, Any]) -> dict[str, Any]:
    """The baseline's row for the same protocol, metric and variant, or {}."""
    rows = facts.get("baseline_rows")
    candidates = rows.get(role, []) if isinstance(rows, dict) else []
    same = ("protocol", "metric", "variant")
    return next((each for each in candidates if all(each.get(key) == row.get(key) for key in same)), {})


def _shown(row: dict[str, Any], key: str, unit: str) -> str:
    value = row.get(key)
    return score(number(value), unit) if is_number(value) else DASH


def _of(facts: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = facts.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _unit(probe: Probe) -> str:
    return str(probe.details.get("unit", "share"))


def _weights(records: Sequence[Record]) -> str:
    names = dict.fromkeys(str(record.content.get("weights", {}).get("name", "")) for record in records)
    return f"Evaluation of {', '.join(filter(None, names)) or 'nothing'}"
