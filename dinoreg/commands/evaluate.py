"""`dinoreg eval` and `dinoreg.evaluate`: from what was asked for to results on disk, a table and a report.

`dinoreg.evaluation` measures, `dinoreg.reports` shows; here the two meet.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dinoreg.config.option import dotted, read
from dinoreg.evaluation.benchmark import PROTOCOLS, benchmarks
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.runner import Planned, Request, check_size, choose, measure, preflight
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.json_files import read_json


def read_request(overrides: Mapping[str, Any] | Iterable[str]) -> Request:
    """Options from `key=value`: those of EvalOptions, and NAME.KEY=VALUE for a dataset's own.

    raises UserError for an unknown key, naming the nearest, or a value of the wrong type
    """
    names = {name: each.name for each in benchmarks().values() for name in (each.name, *each.aliases)} | {"own": "own"}
    general: dict[str, Any] = {}
    dataset: dict[str, dict[str, Any]] = {}
    for key, value in dotted(overrides).items():
        name, _, rest = key.partition(".")
        if rest and name in names:
            dataset.setdefault(names[name], {})[rest] = value
        else:
            general[key] = value
    return Request(*read(EvalOptions, general), dataset)


def evaluate_command(names: Sequence[str], request: Request) -> None:
    """What the command line does; says what is missing, shows progress, prints the table and the report's path."""
    if request.options.weights is None:
        raise UserError("eval: weights= is missing: a run folder, a weight file, or a model's name for random weights")
    everything = list(names) == ["all"]
    plans, problems = _prepare(names, request, everything)
    from dinoreg.reports.evaluation_report import console_table, read_records, write_evaluation

    encoder, folder, run = _open(request.options.weights, request.options)
    _say(f"{encoder.name} ({encoder.identity}), {len(plans)} dataset(s), results in {folder}")
    failed = _measure(encoder, plans, request, folder)
    report = write_evaluation(folder, [*problems.values(), *failed]) if request.options.report else None
    if run is not None and report is not None:
        from dinoreg.commands.report import report_run

        report_run(run)
    Console().print(console_table(read_records(folder)))
    for line in problems.values():
        _say(f"not evaluated: {line}")
    if report is not None:
        print(f"report: {report}")
    if failed:
        raise RunError("; ".join(failed))


def evaluate_dataset(model: Any, dataset: str, options: Mapping[str, Any]) -> Any:
    """`dinoreg.evaluate`: one Result, or a list of them."""
    request = read_request(options)
    names = [dataset] if Path(dataset).exists() else dataset.split(",")
    plans, _ = _prepare(names, request, dataset == "all")
    encoder, folder, _ = _open(model, request.options)
    results = [measure(encoder, plan, request, folder) for plan in plans]
    from dinoreg.reports.evaluation_report import write_evaluation

    write_evaluation(folder)
    return results[0] if len(results) == 1 and dataset != "all" else results


def report_results(folder: Path) -> Path:
    """Write the report of results that are there, naming what a launch was to measure and did not; returns its path.

    raises RunError when nothing was measured
    """
    from dinoreg.reports.evaluation_report import read_records, write_evaluation

    absent = _not_evaluated(folder)
    if not read_records(folder):
        raise RunError(f"{folder}: no results; {'; '.join(absent) or 'nothing was evaluated into this folder'}")
    report = write_evaluation(folder, absent)
    run = folder.parent.parent
    if _is_finished(run):
        from dinoreg.reports.run_report import write_report

        write_report(run)
    return report


def _not_evaluated(folder: Path) -> list[str]:
    """A line for each dataset that the newest launch into this folder did not get to the end with."""
    from dinoreg.jobs.records import read_records
    from dinoreg.jobs.status import examine

    out = folder.parent.parent
    records = read_records(out)
    target = folder.resolve()
    reports = [each for each in records if each.group == "report" and Path(each.command[-1]).resolve() == target]
    mine = [each for each in records if reports and each.launch == reports[-1].launch and each.group == "evaluate"]
    return [f"{each.record.command[1]}: {each.state}, {each.text}" for each in examine(out, mine) if not each.is_well]


def _is_finished(run: Path) -> bool:
    """Whether a folder is a run that trains no more: until then its page belongs to the training."""
    return read_json(run / "status.json").get("phase") == "finished"


def list_datasets() -> None:
    """Print the table of every dataset: task, classes, splits, metrics and protocols, download, licence."""
    table = Table(title="dinoreg eval NAME weights=… root=…", show_lines=True)
    for heading in (
        "name",
        "task",
        "classes",
        "images",
        "metric (protocol)",
        "folder, download and options",
        "licence",
    ):
        table.add_column(heading, overflow="fold")
    for benchmark in benchmarks().values():
        metrics = "\n".join(f"{task.metric} ({PROTOCOLS[task.protocol][1]})" for task in benchmark.tasks)
        table.add_row(
            f"{benchmark.name}\n{benchmark.title}",
            benchmark.task,
            str(benchmark.classes or "n/a"),
            benchmark.splits,
            metrics,
            f"{benchmark.folders[0]}/\n{benchmark.download}",
            benchmark.licence,
        )
    console = Console()
    # A pipe has no width: a line that nobody wrapped is easier to search.
    Console(width=max(console.width, 150) if not console.is_terminal else None).print(table)
    print("keys of single datasets:")
    for benchmark in benchmarks().values():
        print("".join(f"  {line}\n" for line in benchmark.options_in_words()), end="")


def _prepare(names: Sequence[str], request: Request, everything: bool) -> tuple[list[Planned], dict[str, str]]:
    """What can be measured; UserError when a dataset that was named cannot, or nothing at all can."""
    plans, problems = preflight(choose(names, request), request)
    if problems and not (everything and plans):
        *lines, last = problems.values()
        for line in lines:
            _say(f"dinoreg: {line}")
        if everything:
            _say(f"dinoreg: {last}")
            last = f"eval all: none of the {len(problems)} datasets can be read below root={request.options.root}"
        raise UserError(last)
    if not plans:
        raise UserError(f"protocols={','.join(request.options.protocols or ())}: none of the datasets declares them")
    for plan in plans:
        for warning in plan.warnings:
            _say(f"warning: {warning}")
    return plans, problems


def _open(model: Any, options: EvalOptions) -> tuple[Any, Path, Path | None]:
    """(encoder, folder of results, run folder or None)."""
    from dinoreg.evaluation.backbones.encoder import wrap
    from dinoreg.evaluation.backbones.open import open_encoder
    from dinoreg.runtime.device import keep_freed_memory, pick_device, pick_precision

    keep_freed_memory()
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    run, step = None, 0
    if isinstance(model, (str, Path)):
        opened = open_encoder(str(model), device, dtype)
        encoder, run, step = opened.encoder, opened.run, opened.step
    else:
        encoder = wrap(model, device=device, dtype=dtype)
    check_size(encoder, options)
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in encoder.name).strip("-")
    out = Path(options.out) if options.out else run or Path("runs") / "eval" / f"{safe[:60]}-{encoder.identity[:8]}"
    return encoder, out / "eval" / f"{step:07d}", run if options.out is None else None


def _measure(encoder: Any, plans: Sequence[Planned], request: Request, folder: Path) -> list[str]:
    """Every dataset on its own, so that one that fails does not keep the others; lines on those that failed."""
    failed = []
    for plan in plans:
        try:
            row = measure(encoder, plan, request, folder).headline
            _say(f"{plan.benchmark.name}: {row.metric} {row.value:.4g} ({row.low:.4g} to {row.high:.4g})")
        except (UserError, RunError) as error:
            if len(plans) == 1:
                raise
            failed.append(f"{plan.benchmark.name} failed: {error}")
            _say(failed[-1])
    return failed


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
