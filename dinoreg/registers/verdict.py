"""What the register report says in words (`templates/verdict.txt.j2`), and its table: models in columns."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from dinoreg.registers.measure import BESIDE_OUTLIERS
from dinoreg.reports.verdict import DASH, Verdict, in_words
from dinoreg.runtime.printable import in_markup
from dinoreg.runtime.templates import percent, render, score

TONES = {"none": "good", "tail": "warn", "group": "bad"}
ALIKE = 0.98  # mean cosine of registers that have not come apart
FINDINGS = {"none": "no outliers", "tail": "a tail", "group": "outliers"}


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
    rows = [(name, [cell(record) for record in records]) for name, cell in ROWS]
    return [(name, cells) for name, cells in rows if set(cells) != {DASH}]


def or_dash(value: Any, written: Callable[[Any], str]) -> str:
    """A value as formatted by `written`; a dash for None."""
    return DASH if value is None else written(value)


def _probe_score(token: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: or_dash(_probe(record, token), lambda probe: score(probe["accuracy"]))


def _best_register(record: dict[str, Any]) -> str:
    scores = [probe["accuracy"] for probe in record["probes"] if probe["token"].startswith("register")]
    return or_dash(max(scores, default=None), score)


def _discovery_score(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: or_dash(record["discovery"], lambda found: score(found[key]))


# What is compared, and how a record says it.
ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("registers", lambda r: f"{r['num_registers']}{' (test time)' if r.get('added') else ''}"),
    ("finding", lambda r: FINDINGS[r["outliers"]["kind"]]),
    ("outliers, by the model's own limit", lambda r: percent(r["outliers"]["share"])),
    ("outliers, norm above 150", lambda r: percent(r["outliers"]["paper_share"])),
    ("largest norm / median", lambda r: "{:.2f}".format(r["outliers"]["largest"])),
    ("median patch norm", lambda r: f"{r['limit']['median']:.3g}"),
    ("the model's own limit", lambda r: f"{r['limit']['value']:.3g}"),
    ("norm of CLS", lambda r: f"{r['layers'][-1]['cls']:.3g}"),
    ("norms of registers", lambda r: ", ".join(f"{norm:.3g}" for norm in r["layers"][-1]["registers"]) or DASH),
    ("cosine between registers", lambda r: or_dash(r["registers_alike"], "{:.2f}".format)),
    ("stand out from block", lambda r: or_dash(r["where"]["onset"], str)),
    ("outliers on low-information patches", lambda r: or_dash(r["where"]["low_information"], percent)),
    ("neighbour cosine at outliers", lambda r: or_dash(r["where"]["cosine_outliers"], "{:.2f}".format)),
    ("neighbour cosine elsewhere", lambda r: "{:.2f}".format(r["where"]["cosine_others"])),
    ("CLS attention on registers", lambda r: percent(r["attention"]["cls_to_registers"])),
    ("CLS attention on outliers", lambda r: percent(r["attention"]["cls_to_outliers"])),
    ("probe: CLS", _probe_score("CLS")),
    ("probe: best register", _best_register),
    ("probe: mean patch", _probe_score("mean patch")),
    ("probe: a normal patch", _probe_score("normal patch")),
    ("probe: an outlier patch", _probe_score("outlier patch")),
    ("LOST CorLoc, plain", _discovery_score("plain")),
    ("LOST CorLoc, best bias", _discovery_score("CorLoc")),
    ("whole-image box", _discovery_score("whole_image_box")),
)
