"""What the register report says in words, and its table: models in columns, figures in rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

from dinoreg.reports.verdict import Verdict, score

DASH = "\u2013"
ALIKE = 0.98  # mean cosine of registers that have not come apart
LARGE = 5.0  # points of accuracy, a change that a few hundred test images can tell


def judge(record: dict[str, Any]) -> Verdict:
    """What one model's figures say, in a sentence, and what follows from it and what does not."""
    found, count = record["outliers"], record["num_registers"]
    total = record["images"] * record["grid"][0] * record["grid"][1]
    added = " (added at test time)" if record.get("added") else ""
    held = f"{count} register{'s' * (count != 1)}{added}"
    if found["kind"] == "none":
        few = f", and {found['patches']} lie above its limit" if found["patches"] else ""
        headline = (
            f"No outlier tokens: of {total:,} patches the largest norm is {found['largest']:.2g} times the median{few}."
        )
        rest = [_nothing_to_clean(record, held)]
    elif found["kind"] == "tail":
        headline = (
            f"No group of outliers, but a long tail: {percent(found['share'])} of patches lie above the model's limit "
            "and follow on from the rest."
        )
        rest = ["Norms that spread without a gap are not the artifacts of the paper; look at where they are."]
    else:
        headline = (
            f"Outlier tokens found: {percent(found['share'])} of patches, at {found['ratio']:.2g} times the median "
            f"norm and apart from the rest{f', in spite of {held}' if count else ''}."
        )
        below = ", or use the test-time register that follows" if record["test_time"] else ""
        rest = [] if count else [f"They are what registers are for: train with registers{below}."]
    if found["kind"] != "none":
        rest += _of_outliers(record)
    if record["registers_alike"] is not None and record["registers_alike"] > ALIKE:
        rest.append(
            f"Its registers are as good as copies of one another (mean cosine {record['registers_alike']:.3f})."
        )
    rest += _of_controls(record)
    tone = {"none": "good", "tail": "warn", "group": "bad"}[found["kind"]]
    return Verdict(tone, headline, tuple(rest))


def _nothing_to_clean(record: dict[str, Any], held: str) -> str:
    if record.get("added"):
        return "The added token has taken over what the patches held."
    if record["num_registers"]:
        return (
            f"It has {held}; that they are the reason cannot be said without the same run with none, and small models "
            "often have no outliers to begin with."
        )
    return (
        "Registers would have nothing to take over here. That is usual for small models and short runs (the paper saw "
        "outliers in ViT-L and larger, from a third of the training on) and says nothing about larger ones."
    )


def _of_outliers(record: dict[str, Any]) -> list[str]:
    where, lines = record["where"], []
    if where["onset"] is not None:
        lines.append(f"They stand out from block {where['onset'] + 1} of {record['depth']} on.")
    if where["low_information"] is not None:
        lines.append(
            f"{percent(where['low_information'])} of them are among the quarter of patches most like their neighbours "
            f"(cosine {where['cosine_outliers']:.2f}, others {where['cosine_others']:.2f}), "
            f"{percent(where['border'])} on the border (by chance {percent(where['border_expected'])})."
        )
    probes = {each["token"]: each for each in record["probes"]}
    if "outlier patch" in probes:
        other = probes.get("normal patch, images with an outlier", probes.get("normal patch"))
        if other is not None:
            outlier = probes["outlier patch"]
            words = (
                "know more of the image than other patches"
                if outlier["low"] > other["high"]
                else "know less of the image than other patches"
                if outlier["high"] < other["low"]
                else "know no more of the image than other patches, as far as this test can tell"
            )
            lines.append(f"They {words}: {score(outlier['accuracy'])} against {score(other['accuracy'])}.")
    return lines


def _of_controls(record: dict[str, Any]) -> list[str]:
    rows = {row["kind"]: row for row in record["controls"] if row["what"] == "registers"}
    if not rows or rows["as it is"]["cls_accuracy"] is None:
        return []
    base = rows["as it is"]["cls_accuracy"]
    change = {kind: 100 * (row["cls_accuracy"] - base) for kind, row in rows.items() if kind != "as it is"}
    others = [value for kind, value in change.items() if kind != "zero"]
    line = (
        f"With its registers set to zero the class token's probe changes by {change['zero']:+.1f} points, with their "
        f"mean, noise or another image's by {min(others):+.1f} to {max(others):+.1f} ({rows['zero']['images']} images)"
    )
    if change["zero"] < -LARGE and min(others) > change["zero"] / 2:
        return [f"{line}: something like a register is needed there more than what it holds."]
    return [f"{line}."]


def console_table(records: Sequence[dict[str, Any]]) -> Table:
    """Models in columns, figures in rows, for the terminal."""
    table = Table(title="registers")
    table.add_column("")
    for record in records:
        table.add_column(record["name"], justify="right", overflow="fold")
    for name, cells in comparison(records):
        table.add_row(name, *cells)
    return table


def comparison(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of (what, a cell for each model); rows that no model has are left out."""

    def probe(token: str) -> list[str]:
        found = [next((p for p in r["probes"] if p["token"] == token), None) for r in records]
        return [DASH if p is None else f"{score(p['accuracy'])}" for p in found]

    def best_register(record: dict[str, Any]) -> str:
        scores = [p["accuracy"] for p in record["probes"] if p["token"].startswith("register")]
        return score(max(scores)) if scores else DASH

    rows = [
        ("registers", [_registers(r) for r in records]),
        ("finding", [_finding(r) for r in records]),
        ("outliers, by the model's own limit", [percent(r["outliers"]["share"]) for r in records]),
        ("outliers, norm above 150", [percent(r["outliers"]["paper_share"]) for r in records]),
        ("largest norm / median", [f"{r['outliers']['largest']:.2f}" for r in records]),
        ("median patch norm", [f"{r['limit']['median']:.3g}" for r in records]),
        ("the model's own limit", [f"{r['limit']['value']:.3g}" for r in records]),
        ("norm of CLS", [f"{r['layers'][-1]['cls']:.3g}" for r in records]),
        ("norms of registers", [_listed(r["layers"][-1]["registers"]) for r in records]),
        ("cosine between registers", [or_dash(r["registers_alike"], _two) for r in records]),
        ("stand out from block", [or_dash(r["where"]["onset"], lambda b: str(b + 1)) for r in records]),
        ("outliers on low-information patches", [or_dash(r["where"]["low_information"], percent) for r in records]),
        ("neighbour cosine at outliers", [or_dash(r["where"]["cosine_outliers"], _two) for r in records]),
        ("neighbour cosine elsewhere", [_two(r["where"]["cosine_others"]) for r in records]),
        ("CLS attention on registers", [percent(r["attention"]["cls_to_registers"]) for r in records]),
        ("CLS attention on outliers", [percent(r["attention"]["cls_to_outliers"]) for r in records]),
        ("probe: CLS", probe("CLS")),
        ("probe: best register", [best_register(r) for r in records]),
        ("probe: mean patch", probe("mean patch")),
        ("probe: a normal patch", probe("normal patch")),
        ("probe: an outlier patch", probe("outlier patch")),
        ("LOST CorLoc, plain", [or_dash(r["discovery"], lambda d: score(d["plain"])) for r in records]),
        ("LOST CorLoc, best bias", [or_dash(r["discovery"], lambda d: score(d["CorLoc"])) for r in records]),
        ("whole-image box", [or_dash(r["discovery"], lambda d: score(d["whole_image_box"])) for r in records]),
    ]
    return [(name, cells) for name, cells in rows if set(cells) != {DASH}]


def _registers(record: dict[str, Any]) -> str:
    return f"{record['num_registers']}{' (test time)' if record.get('added') else ''}"


def _finding(record: dict[str, Any]) -> str:
    return {"none": "no outliers", "tail": "a tail", "group": "outliers"}[record["outliers"]["kind"]]


def percent(share: float) -> str:
    """0.0237 -> 2.4 %, with two digits where it is small."""
    return "0 %" if share == 0 else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.3g} %"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values) or DASH


def or_dash(value: Any, written: Callable[[Any], str]) -> str:
    return DASH if value is None else written(value)
