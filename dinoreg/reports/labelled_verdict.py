"""The page of `dinoreg verdict`: own weights against others on one's own labels, and what to do next in one sentence.

It reads the record of a verdict (`commands/verdict.py`) and the pictures beside it, and nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.reports import html
from dinoreg.reports.html import Chart, Line
from dinoreg.reports.verdict import Verdict, in_words
from dinoreg.runtime.templates import score, with_interval

USE_PUBLIC, GO_ON, LONGER = "use the public backbone", "go on from it", "train longer"
OWN, MORE = "use your own", "more labels needed to tell"
TONES = {OWN: "good", USE_PUBLIC: "bad"}  # of the others: "warn"
KINDS = ("logistic", "knn")  # the judge, and the second opinion
RIVALS = ("public", "start")  # of the own weights; the others tell whether anything was learnt
LEVELS = ("random init", "raw pixels")
NAMES = {"own": "your own", "start": "its start", "public": "the public backbone", "random init": "random weights"}
NAMES["raw pixels"] = "raw pixels"
NO_MATTER = 0.02  # a difference of accuracy that is none for use
HALF = 0.5  # of the way from random weights to the public backbone
OPEN = ("not shown", "no difference")


class Advice(NamedTuple):
    """One of the five above, and why, in words without a full stop."""

    choice: str
    reason: str


def advise(record: Mapping[str, Any]) -> Advice:
    """What to do, by the paired differences of logistic regression with all labels: to RIVALS, without any to LEVELS.

    - worse than a rival: the public one, unless the way that own training has gone speaks for going on from it: it
      is better than its own start, or without one at least half of the way from random weights to the public one
    - worse than random weights or pixels, where there is no rival: longer training
    - better than each: own
    - else, where the difference is too small to matter: whichever is cheaper to run, or longer training where there is
      no public one
    - else more labels
    """
    found = {role: each["logistic"] for role, each in record["against"].items()}
    rivals = [role for role in RIVALS if role in found] or list(LEVELS)
    worse, open_ = ([r for r in rivals if found[r]["verdict"] in said] for said in (("worse",), OPEN))
    told = {role: f"{in_words(each, 'share', None)} than {NAMES[role]}" for role, each in found.items()}
    on = f"on the same {record['data']['n_test']:,} pictures{_dissent(record, [*worse, *open_, *rivals][0])}"
    if worse and rivals == list(LEVELS):
        return Advice(LONGER, f"your own is {' and '.join(told[role] for role in worse)} {on}")
    if worse == ["public"] and found.get("start", {}).get("verdict") == "better":
        return Advice(GO_ON, f"your training helps, {told['start']}, but it began too low: {told['public']} {on}")
    if worse == rivals == ["public"] and (way := _way(record)) >= HALF:
        gone = f"from random weights your own has gone {way:.0%} of the way to it"
        return Advice(GO_ON, f"{gone}, but is {told['public']} {on}")
    if worse:
        return Advice(USE_PUBLIC, f"your own is {told[worse[0]]} {on}")
    if not open_:
        return Advice(OWN, f"it is {' and '.join(told[role] for role in rivals)} {on}")
    left = found[open_[0]]
    widest = max(abs(left["low"]), abs(left["high"]))
    if widest > (NO_MATTER if rivals[0] in RIVALS else 0.05):  # from random weights, which more labels should tell
        return Advice(MORE, _more(left, NAMES[open_[0]], record["data"]["n_test"]))
    equal = f"your own is as good as {NAMES[open_[0]]} to within {100 * widest:.1f} points {on}"
    if open_[0] != "public":
        return Advice(LONGER, f"so far it has changed nothing that matters, {equal}")
    own, public = (record["contenders"][role]["cost"]["gflops"] for role in ("own", "public"))
    return Advice(OWN if own < public else USE_PUBLIC, f"{equal}, with {own / public:.2g} times the operations")


def _more(found: Mapping[str, Any], whom: str, count: int) -> str:
    """What these labels leave open, and how many would tell a difference of the size that was measured."""
    half, difference = (found["high"] - found["low"]) / 2, abs(found["difference"])
    left = f"the difference to {whom} may be anything from {_points(found)} points with these {count:,} pictures"
    if difference < NO_MATTER / 2:
        return left
    wanted = float(f"{max(count * (half / difference) ** 2, 1.2 * count):.2g}")
    return f"{left}; about {wanted:,.0f} would show the {100 * difference:.1f} that were measured"


def _points(found: Mapping[str, Any], between: str = " to ") -> str:
    return between.join(f"{100 * found[end]:+.1f}" for end in ("low", "high"))


def _way(record: Mapping[str, Any]) -> float:
    """How far own training has come from random weights to a better public backbone, as a share of accuracy.

    0 where it is not shown to be better than random weights and than pixels.
    """
    own, random, public = (record["contenders"][role]["logistic"]["value"] for role in ("own", "random init", "public"))
    learnt = all(record["against"][role]["logistic"]["verdict"] == "better" for role in LEVELS)
    return (own - random) / (public - random) if learnt else 0.0


def _dissent(record: Mapping[str, Any], role: str) -> str:
    """What k-NN says where it shows the opposite of logistic regression; else ""."""
    both = record["against"][role]
    if {both[kind]["verdict"] for kind in KINDS} != {"better", "worse"}:
        return ""
    return f" (k-NN shows the opposite: {in_words(both['knn'], 'share', None)})"


def labels_in_words(needed: Mapping[str, float], fewest: int, most: int) -> str:
    """A number of labels with its interval: "61 [38, > 404]", of a curve from `fewest` to `most` labels."""

    def end(value: float) -> str:
        return f"> {most:,}" if value > most else f"\u2264 {fewest:,}" if value <= fewest else f"{value:,.0f}"

    middle, low, high = (end(float(needed[key])) for key in ("labels", "low", "high"))
    return middle if middle == low == high else f"{middle} [{low}, {high}]"


def in_short(record: Mapping[str, Any]) -> list[str]:
    """The record in lines for the terminal: accuracies, differences, labels, the advice."""
    roles, count = record["contenders"], record["data"]["n_test"]
    lines = [f"{NAMES[role]} ({each['name']}): {with_interval(**each['logistic'])}" for role, each in roles.items()]
    lines += [f"your own against {row[0]}: {row[1]}; k-NN {row[2]}" for row in _differences(record)]
    lines += [f"labels for {what}: {said}" for what, said in _labels(record)]
    return [f"{record['data']['title']}, logistic regression on {count:,} pictures", *lines]


def _differences(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(who, the own difference by logistic regression, that by k-NN)."""

    def told(found: Mapping[str, Any]) -> str:
        said = in_words(found, "share", record["data"]["n_test"])
        measured = f"{100 * found['difference']:+.1f} points [{_points(found, ', ')}]"
        return f"{measured}, {said}" if found["verdict"] == "not shown" else said

    return [(NAMES[role], *(told(each[kind]) for kind in KINDS)) for role, each in record["against"].items()]


def _labels(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(who is to reach what, how many labels it takes): the reference for the own figure, and the other way round."""
    found, roles = record["labels"], record["contenders"]
    other, ends = found["reference"], (found["fewest"], found["most"])
    rows = []
    for who, whose in ((other, "own"), ("own", other)):
        goal = score(roles[whose]["logistic"]["value"])
        what = f"{NAMES[who]} to reach the {goal} of {NAMES[whose]} with {ends[1]:,}"
        rows.append((what, labels_in_words(found[who], *ends)))
    return rows


def write_page(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `verdict.html` beside the record's pictures; returns its path."""
    roles, data, changed = record["contenders"], record["data"], record["changed"]
    ends = {role: [each["logistic"][key] for key in ("value", "low", "high")] for role, each in roles.items()}
    rows = [(NAMES[role], *each, role == "own") for role, each in ends.items()]
    curves = {NAMES[role]: each["curve"] for role, each in roles.items() if each["curve"]}
    points = {name: [[each[key] for each in curve] for key in ("labels", "value")] for name, curve in curves.items()}
    lines = [Line(name, *both) for name, both in points.items()]
    note = "Share of pictures named rightly, over the labels learnt from: higher and further to the left is better."
    options: dict[str, Any] = {"percent": True, "marker": True, "x_label": "labels", "log_x": True}
    advice = record["advice"]
    headline = f"{advice['choice'][:1].upper()}{advice['choice'][1:]}: {advice['reason']}."
    content = html.page(
        "reports/templates/verdict.html.j2",
        f"Verdict on {data['title']}",
        lead=f"{roles['own']['name']}, {data['n_test']:,} pictures of {data['classes']} classes",
        words=Verdict(TONES.get(advice["choice"], "warn"), headline),
        record=record,
        names=NAMES,
        scale=html.Scale(rows, chance=data["majority"], level="always naming the largest class"),
        differences=_differences(record),
        labels=_labels(record),
        curves=curves,
        charts=html.charts([Chart("Accuracy over labels", note, lines, **options)]),
        galleries={kind: _pictures(changed[kind], folder) for kind in ("won", "lost")},
    )
    write_atomic(folder / "verdict.html", content)
    return folder / "verdict.html"


def _pictures(shown: Sequence[Mapping[str, str]], folder: Path) -> list[html.Picture | None]:
    told = [(each["file"], each["image"], f"is {each['is']}; said {each['wrong']}") for each in shown]
    return [html.picture(folder / file, image, said) for file, image, said in told]
