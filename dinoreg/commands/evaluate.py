"""`dinoreg eval` and `dinoreg.evaluate`: from arguments to results on disk, a table and a report.

This module connects `dinoreg.evaluation`, which measures, and `dinoreg.reports`, which shows results.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dinoreg.checkpoint.steps import role_of
from dinoreg.commands.report import report_run
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.backbones.open import open_model
from dinoreg.evaluation.benchmark import shadowed
from dinoreg.evaluation.comparison import between
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.request import Request, choose, read_request, split_names
from dinoreg.evaluation.runner import Planned, check_size, look, measure, preflight, read_result
from dinoreg.jobs.records import read_records as read_jobs
from dinoreg.jobs.status import examine
from dinoreg.reports.evaluation_report import console_table, read_records, write_evaluation
from dinoreg.reports.verdict import paired_rows
from dinoreg.runtime.device import keep_freed_memory
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.printable import print_status
from dinoreg.visualize.subject import safe_name


def evaluate_command(names: str, request: Request) -> None:
    """Run `dinoreg eval`: show progress, print the table of results and the report's path.

    names    "all", or datasets with commas between
    raises   UserError for wrong options or missing data, before anything is measured; RunError naming the datasets
             that failed, after the others were measured
    """
    assert request.options.weights is not None
    plans, problems = _prepare(names, request)
    encoder, folder, run = _open(request.options.weights, request.options)
    plans = _look(encoder, plans, request, problems)
    print_status(f"{encoder.name} ({encoder.identity}), {len(plans)} dataset(s), results in {folder}")
    if run is not None:
        print_status(f"{run}: these weights are {role_of(run, int(folder.name))}")
    failed = _measure(encoder, plans, request, folder)
    paired = paired_with(folder)
    report = write_evaluation(folder, [*problems.values(), *failed], paired) if request.options.report else None
    if run is not None and report is not None and request.options.out is None:
        report_run(run)
    Console().print(console_table(read_records(folder)))
    for dataset, figure, model, said, other in paired_rows(paired):
        print_status(f"{dataset}, {figure}: {model} against {other}: {said}")
    print_status(*(f"not evaluated: {line}" for line in problems.values()))
    if report is not None:
        print(f"report: {report}")
    if failed:
        raise RunError("; ".join(failed))


def evaluate(model: Any, dataset: str | Path, **options: Any) -> Any:
    """Measure a backbone on a dataset; the same as `dinoreg eval DATASET weights=… key=value …`.

    model    a RegisterViT, a ViT of timm or transformers, or whatever `weights=` takes: a run folder, a file, a name
    dataset  a name of `dinoreg eval --list`, several with commas, "all", or the path of a labelled folder or CSV
    options  the command line's keys: root="/datasets", out="runs/a", **{"knn.k": [20], "aircraft.crop_banner": False}
    returns  dinoreg.evaluation.result.Result, or a list of them for several datasets; `.headline` is the figure
    raises   UserError (a ValueError) for a wrong key, value, dataset or missing file, before anything is computed
    """
    request = read_request(options)
    if isinstance(dataset, Path) and dataset.exists():
        dataset = dataset.absolute()  # a path, whatever else has its name
    plans, problems = _prepare(str(dataset), request)
    encoder, folder, _ = _open(model, request.options)
    plans = _look(encoder, plans, request, problems)
    results = [measure(encoder, plan, request, folder) for plan in plans]
    write_evaluation(folder, paired=paired_with(folder))
    return results[0] if len(results) == 1 and dataset != "all" else results


def report_results(folder: Path) -> Path:
    """Write the report of the existing results, naming the datasets of the launch without a result; returns its path.

    folder  RUN/eval/STEP
    raises  RunError when there are no results
    """
    absent = _not_evaluated(folder)
    if not read_records(folder):
        raise RunError(f"{folder}: no results; {'; '.join(absent) or 'nothing was evaluated into this folder'}")
    report = write_evaluation(folder, absent, paired_with(folder))
    run = folder.parent.parent
    if read_json(run / "status.json").get("phase") == "finished":  # until then its page belongs to the training
        from dinoreg.reports.run_report import write_report

        write_report(run)
    return report


def paired_with(folder: Path) -> list[dict[str, Any]]:
    """The results in OUT/eval/STEP and its other steps against one another on the same images (`between`)."""
    # By stem: "set" before "set-HASH", the later weights in a folder.
    paths = sorted(
        folder.parent.glob("[0-9]*/*.json"), key=lambda path: (path.parent == folder, path.parent, path.stem)
    )
    results = [result for path in paths if (result := read_result(path)) is not None]
    return between([(str(result.facts.get("weights", {}).get("name")), result) for result in results])


def _not_evaluated(folder: Path) -> list[str]:
    """One line for each dataset whose job in the newest launch into this folder did not succeed."""
    out = folder.parent.parent
    jobs = read_jobs(out)
    target = folder.resolve()
    reports = [job for job in jobs if job.group == "report" and Path(job.command[-1]).resolve() == target]
    measuring = [job for job in jobs if reports and job.launch == reports[-1].launch and job.group == "evaluate"]
    return [
        f"{each.record.command[1]}: {each.state}, {each.text}" for each in examine(out, measuring) if not each.is_well
    ]


def _prepare(names: str, request: Request) -> tuple[list[Planned], dict[str, str]]:
    """The plans of the datasets, and problems of others; UserError when a named dataset, or all, cannot be measured."""
    plans, problems = preflight(choose(split_names(names), request), request)
    if problems and not (names == "all" and plans):
        *lines, last = problems.values()
        print_status(*(f"dinoreg: {line}" for line in lines))
        raise UserError(last)
    if not plans:
        raise UserError(f"protocols={','.join(request.options.protocols or ())}: none of the datasets declares them")
    print_status(*shadowed(split_names(names)))
    print_status(*(f"warning: {warning}" for plan in plans for warning in plan.warnings))
    return plans, problems


def _look(encoder: Encoder, plans: Sequence[Planned], request: Request, problems: dict[str, str]) -> list[Planned]:
    """The plans whose pictures the encoder can take; of several, others are added to the problems."""
    ready = []
    for plan in plans:
        try:
            ready.append(look(encoder, plan, request))
        except UserError as error:
            if plan is plans[-1] and not ready:
                raise
            problems[plan.benchmark.name] = str(error)
        else:
            print_status(*(f"warning: {warning}" for warning in ready[-1].warnings[len(plan.warnings) :]))
    return ready


def _open(model: Any, options: EvalOptions) -> tuple[Any, Path, Path | None]:
    """(encoder, folder of results, run folder or None)."""
    keep_freed_memory()
    encoder, run, step = open_model(model, options.device, options.precision)
    check_size(encoder, options)
    out = Path(options.out) if options.out else run or Path("runs") / "eval" / folder_name(encoder)
    return encoder, out / "eval" / f"{step:07d}", run


def folder_name(encoder: Encoder) -> str:
    """An encoder's name and identity as the name of a folder."""
    return f"{safe_name(encoder.name)}-{encoder.identity[:8]}"


def _measure(encoder: Any, plans: Sequence[Planned], request: Request, folder: Path) -> list[str]:
    """Measure each dataset on its own, so that a failure does not stop the others; returns lines about failures."""
    failed = []
    for plan in plans:
        try:
            result = measure(encoder, plan, request, folder)
            new = (warning for warning in result.facts["warnings"] if warning not in plan.warnings)
            print_status(*(f"warning: {warning}" for warning in new))
            if result.dataset != (name := plan.benchmark.name):
                kept = f"{name}.json holds another measurement (other data, weights or options) and stays"
                print_status(f"{kept}; this one is {result.dataset}.json (overwrite=true replaces)")
            row = result.headline
            print_status(f"{result.dataset}: {row.metric} {row.value:.4g} ({row.low:.4g} to {row.high:.4g})")
        except (UserError, RunError) as error:
            if len(plans) == 1:
                raise
            failed.append(f"{plan.benchmark.name} failed: {error}")
            print_status(failed[-1])
    return failed
