"""Named doubts: what makes a result say less than its numbers seem to. Each is a line that begins with its name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from dinoreg.evaluation.comparison import BETTER, MAJORITY, SAME, UNKNOWN
from dinoreg.evaluation.data import Data, MultiLabelled
from dinoreg.evaluation.result import Row, headlines
from dinoreg.runtime.templates import score

FEW = 30  # test images below which a verdict is hardly possible
HALF = 0.5  # of the ground truth


def doubts(rows: Sequence[Row], baselines: Mapping[str, Sequence[Row]], data: Iterable[Data]) -> list[str]:
    """The doubts about a measurement, for the `warnings` of its result.

    rows       of the model, already compared with the baselines and with the largest class
    baselines  {name: rows}
    data       of every task
    """
    found = [line for row in rows for line in row.warnings]
    of_kind = defaultdict[tuple[str, str], list[str]](list)
    for row in headlines(rows):
        for kind in _kinds(row, tuple(name for name in baselines if name in row.against)):
            of_kind[kind].append(f"{row.protocol} {score(row.value, row.unit)}")
    found += [f"{name}: {', '.join(figures)}: {doubt}" for (name, doubt), figures in of_kind.items()]
    fewest = min((row.n_test for row in rows if row.n_test), default=FEW)
    if fewest < FEW:
        found.append(f"few test images: {fewest}, of which one is {100 / fewest:.1f} points")
    for each in data:
        test = each.splits.get("test")
        used = float((test.labels >= 0).mean()) if isinstance(test, MultiLabelled) else 1.0
        if used < HALF:
            found.append(f"unused truth: only {used:.0%} of the labels of test say yes or no")
    return list(dict.fromkeys(found))


def _kinds(row: Row, baselines: Sequence[str]) -> list[tuple[str, str]]:
    """The names of the doubts about a figure that was compared with some baselines, and what they are in words."""
    found = []
    guess = max(each for each in (row.chance, row.majority, -1.0) if each is not None)
    against = row.against.get(MAJORITY, {})
    if row.unit == "share" and guess > 1 - 1e-9:
        found.append(("one answer", "guessing reaches 100 %"))
    elif against.get("verdict", UNKNOWN) not in (BETTER, UNKNOWN):
        shown = "not shown to be" if against["difference"] > 0 else "not"
        found.append(("largest class", f"{shown} better than always naming it, {score(row.majority or 0.0, row.unit)}"))
    same = [name for name in baselines if row.against[name]["verdict"] == SAME]
    if len(same) > 1 and len(same) == len(baselines):
        found.append(("all the same", f"no other figure than {' and '.join(same)}, on every resample"))
    else:
        found += [(f"as {name}", f"no other figure than {name}, on every resample") for name in same]
    return found
