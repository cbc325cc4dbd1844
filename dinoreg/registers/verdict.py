"""What the register report says in words, and its table, models in columns; both are templates."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from dinoreg.registers.measure import BESIDE_OUTLIERS
from dinoreg.reports.verdict import DASH, Verdict, in_words
from dinoreg.runtime.printable import in_markup
from dinoreg.runtime.templates import render

TONES = {"none": "good", "tail": "warn", "group": "bad"}
ALIKE = 0.98  # mean cosine of registers that have not come apart


def judge(record: dict[str, Any]) -> Verdict:
    """One model's figures in words: the finding as headline, then what follows from it and what does not.

    record  of `Measured`
    """
    outlier_probe = _probe(record, "outlier patch")
    against = (outlier_probe or {}).get("against")
    kind, copies = record["outliers"]["kind"], (record["registers_alike"] or 0.0) > ALIKE
    text = render(
        "registers/templates/verdict.txt.j2",
        **record,
        copies=copies,
        outlier_probe=outlier_probe,
        against=against,
        difference=against and in_words(against, "share", (outlier_probe or {})["n_test"]),
        patch_probe=_probe(record, BESIDE_OUTLIERS) or _probe(record, "normal patch"),
    )
    headline, *sentences = (" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())
    return Verdict("plain" if kind == "none" and copies else TONES[kind], headline, tuple(sentences))


def _probe(record: dict[str, Any], token: str) -> dict[str, Any] | None:
    return next((probe for probe in record["probes"] if probe["token"] == token), None)


def console_table(records: Sequence[dict[str, Any]]) -> Table:
    """Models in columns, figures in rows, for the terminal."""
    table = Table("", title="registers")
    for record in records:
        table.add_column(in_markup(record["name"]), justify="right", overflow="fold")
    for name, cells in comparison(records):
        table.add_row(name, *cells)
    return table


def comparison(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of (name of the figure, a cell for each model); rows that no model has are left out."""
    lines = zip(*(_figures(record).splitlines() for record in records))
    parted = [[line.partition("|") for line in each] for each in lines]
    rows = [(each[0][0], [cell for _, _, cell in each]) for each in parted]
    return [(name, cells) for name, cells in rows if set(cells) != {DASH}]


def _figures(record: dict[str, Any]) -> str:
    accuracies = {probe["token"]: probe["accuracy"] for probe in record["probes"]}
    best = max((each for token, each in accuracies.items() if token.startswith("register")), default=None)
    found = {"dash": DASH, "accuracies": accuracies, "best_register": best}
    return render("registers/templates/comparison.txt.j2", **record, **found)


def or_dash(value: Any, written: Callable[[Any], str]) -> str:
    """A value as formatted by `written`; a dash for None."""
    return DASH if value is None else written(value)
