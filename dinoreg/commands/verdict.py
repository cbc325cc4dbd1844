"""`dinoreg verdict` and `dinoreg.verdict`: own weights against others on one's own labels, and what to do next.

Every encoder is measured by `evaluation.runner` on one split, in a folder of its own; `evaluation.comparison` compares
them, and `reports.labelled_verdict` says what to do. Logistic regression is the judge: like what is built on frozen
features in the end, it weighs their dimensions by the labels, has one penalty, chosen on training pictures, and gives
the curve over numbers of labels with the same method. k-NN stands beside it as a second opinion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.checkpoint.atomic import write_atomic, write_picture
from dinoreg.commands.evaluate import folder_name
from dinoreg.commands.options import VerdictOptions, read_verdict
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.backbones.open import Opened, open_model
from dinoreg.evaluation.benchmark import PROTOCOLS
from dinoreg.evaluation.comparison import compare, curve, labels_needed, shares
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.features.images import read_picture, shown
from dinoreg.evaluation.options import EvalOptions, FewShotOptions, KnnOptions, SharedOptions
from dinoreg.evaluation.protocols.classification import GREEN, RED, framed
from dinoreg.evaluation.request import Request
from dinoreg.evaluation.result import Result, Row, headlines, plain, unpacked
from dinoreg.evaluation.runner import baselines_of, look, measure, preflight
from dinoreg.plan.encoder_cost import encoder_cost
from dinoreg.reports.html import WithPage
from dinoreg.reports.labelled_verdict import KINDS, Advice, advise, in_short, write_page
from dinoreg.runtime.device import keep_freed_memory
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import print_status, printable

REFERENCES = ("public", "start", "random init")  # whose labels are counted: the first that there is
SIDE, SHOWN = 128, 12  # pixels of a picture that changed sides, and how many of them each way


@dataclass(frozen=True, repr=False)
class LabelledVerdict(WithPage):
    """What `dinoreg.verdict` found, and its `page`.

    advice  the choice and its reason
    record  all figures, as in `verdict.json`
    """

    advice: Advice
    record: dict[str, Any]


def verdict(labelled: str | Path, **options: Any) -> LabelledVerdict:
    """Compare own weights with others on labelled pictures; the same as `dinoreg verdict LABELLED key=value …`.

    labelled  a folder with a subfolder a class, or a table of paths and labels
    options   the command line's keys: weights="runs/a", public="dinov2-small", init=…, out=…, **{"own.folds": 10}
    returns   `.advice`, `.record` and the `.page`
    raises    UserError (a ValueError) for wrong options or data, before anything is computed
    """
    return _judge(labelled, *read_verdict(options))


def verdict_command(labelled: str, options: VerdictOptions, own: Mapping[str, Any]) -> None:
    """Run `dinoreg verdict`: print the figures, the advice and the page's path."""
    found = _judge(labelled, options, own)
    lines = [*in_short(found.record), f"verdict: {': '.join(found.advice)}", f"page: {found.page}"]
    print(printable("\n".join(lines), keep="\n"))


def _judge(labelled: str | Path, options: VerdictOptions, own: Mapping[str, Any]) -> LabelledVerdict:
    benchmark = own_benchmark(labelled, own, options.columns)
    if not set(KINDS) <= {task.protocol for task in benchmark.tasks}:
        other = f"for {benchmark.task} see dinoreg eval, one out= for all"
        raise UserError(f"{labelled}: expected one class a picture; {other}")
    encoders, mine = _open(options)
    run = mine.run or Path("runs/verdict") / folder_name(mine.encoder)
    out = Path(options.out) if options.out else run / "verdict" / f"{mine.step:07d}" / benchmark.name
    data = benchmark.tasks[0].read(out, {})  # own data know where they are
    request = _request(options, mine.encoder, data, (run / "eval" if mine.run else out) / "features")
    (plan,), _ = preflight([benchmark], request)
    looked = {role: look(encoder, plan, request) for role, encoder in encoders.items()}
    warnings = list(dict.fromkeys(line for plan in looked.values() for line in plan.warnings))
    print_status(*(f"warning: {warning}" for warning in warnings))
    other = next(role for role in REFERENCES if role in encoders)
    results = {}
    for role, plan in looked.items():
        print_status(f"{role}: {encoders[role].name} ({encoders[role].identity})")
        tasks = tuple(each for each in plan.tasks if each[0].protocol in KINDS or role in ("own", other))
        results[role] = measure(encoders[role], replace(plan, tasks=tasks), request, out / role.replace(" ", "_"))
    record = _record(encoders, results, data, other)
    record["data"] |= {key: getattr(benchmark, key) for key in ("title", "place", "classes")} | {"split": data.variant}
    record["warnings"] = warnings + [
        f"{role}: {line}" for role, each in results.items() for line in each.facts["warnings"] if line not in warnings
    ]
    record["settings"] = plain(vars(options))
    record["changed"] = _changed(results, other, data, out)
    advice = advise(record)
    record["advice"] = advice._asdict()
    write_atomic(out / "verdict.json", json.dumps(plain(record), indent=1) + "\n")
    return LabelledVerdict(write_page(record, out), advice, record)


def _request(options: VerdictOptions, own: Encoder, data: Data, features: Path) -> Request:
    """The same for all encoders: KINDS and the shares of labels, without baselines, which are encoders here."""
    shared = {each.name: getattr(options, each.name) for each in fields(SharedOptions)} | {"weights": None}
    if options.range is None:  # one for all, so that all see the same pixels
        shared["range"] = own.preprocessing.as_json()["range"]
    shared |= {"baselines": False, "report": False, "examples": 0, "features": str(features)}
    learnt = data.splits.get("train", data.splits["test"])  # of folds, most of them
    few = FewShotOptions((), shares(len(learnt), learnt.num_classes), options.repeats)
    return Request(EvalOptions(**shared, protocols=[*KINDS, "few_shot"], knn=KnnOptions(k=(20,)), few_shot=few))


def _open(options: VerdictOptions) -> tuple[dict[str, Encoder], Opened]:
    """The encoders by role, the own one first, and what `weights=` is.

    The start sees pictures as the own model does, since training began like that; the public one as it states itself.
    """
    keep_freed_memory()
    machine = options.device, options.precision
    mine = open_model(options.weights, *machine)
    encoders = {"own": mine.encoder}
    kept = None if mine.run is None else mine.run / "init.safetensors"
    if init := options.init or (kept and kept.is_file() and str(kept)):
        start = open_model(init, *machine).encoder
        for key in ("patch_size", "in_channels"):
            if (given := getattr(start, key)) != (expected := getattr(mine.encoder, key)):
                raise UserError(f"init={init}: its {key} is {given}, expected {expected}, as weights= began with it")
        start.preprocessing = mine.encoder.preprocessing
        encoders["start"] = start
    if options.public is not None:
        encoders["public"] = open_model(options.public, *machine).encoder
    return encoders | {role: make() for role, make in baselines_of(mine.encoder, options.seed).items()}, mine


def _row(result: Result, protocol: str) -> Row:
    return next(row for row in headlines(result.rows) if row.protocol == PROTOCOLS[protocol][1])


def _record(encoders: Mapping[str, Encoder], results: Mapping[str, Result], data: Data, other: str) -> dict[str, Any]:
    """All figures: contenders by role, the own differences to each, the labels that one needs for another's figure."""
    rows = {role: {kind: _row(result, kind) for kind in KINDS} for role, result in results.items()}
    curves = {role: curve(results[role].rows, rows[role]["logistic"]) for role in ("own", other)}
    judge = rows["own"]["logistic"]
    contenders: dict[str, Any] = {}
    for role, each in rows.items():
        encoder = encoders[role]
        costly = role in ("own", "public")  # random weights and the start cost what the own ones do
        contenders[role] = {
            **{"name": encoder.name, "identity": encoder.identity},
            **{kind: _figures(row) for kind, row in each.items()},
            "curve": [{"labels": point.n_train, **_figures(point)} for point in curves.get(role, ())],
            "cost": encoder_cost(encoder, results[role].facts["image_size"]) if costly else None,
        }
    others = [role for role in rows if role != "own"]
    pairs = ((other, "own"), ("own", other))
    labels: dict[str, Any] = {who: labels_needed(curves[who], rows[whose]["logistic"]) for who, whose in pairs}
    return {
        **{"format": "dinoreg-verdict", "version": 1},
        "data": {key: getattr(judge, key) for key in ("n_test", "n_train", "majority")},
        "contenders": contenders,
        "against": {role: {kind: compare(rows["own"][kind], rows[role][kind]) for kind in KINDS} for role in others},
        "labels": labels | {"reference": other, "fewest": curves["own"][0].n_train, "most": judge.n_train},
    }


def _figures(row: Row) -> dict[str, float]:
    return {key: getattr(row, key) for key in ("value", "low", "high")}


def _changed(results: Mapping[str, Result], other: str, data: Data, out: Path) -> dict[str, Any]:
    """Pictures that one of two is right about and the other is not, drawn into `out`/changed: "won" and "lost"."""
    test: Labelled = data.splits["test"]
    names = data.names(test.num_classes)
    own, theirs = (unpacked(_row(results[role], "logistic").details["answers"], "<i4") for role in ("own", other))
    sides = {"won": (own, theirs, GREEN), "lost": (theirs, own, RED)}
    found: dict[str, Any] = {}
    (out / "changed").mkdir(parents=True, exist_ok=True)
    for kind, (right, wrong, edge) in sides.items():
        places = np.flatnonzero((right == test.labels) & (wrong != test.labels))
        found[kind], found[f"{kind}_count"] = [], len(places)
        picked = np.unique(np.linspace(0, len(places) - 1, min(SHOWN, len(places))).astype(int))
        for number, place in enumerate(places[picked].tolist()):
            file = f"changed/{kind}_{number:02d}.png"
            write_picture(out / file, framed(shown(read_picture(test.source, place)), SIDE, 3, edge))
            classes = {"is": names[test.labels[place]], "wrong": names[wrong[place]]}
            found[kind].append({"file": file, "image": test.source.name(place), **classes})
    return found
