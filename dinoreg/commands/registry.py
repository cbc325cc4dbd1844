"""The verbs of the command line: the arguments of each, and the function that does its work."""

import importlib
import os
import shlex
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dinoreg.commands import options as keys
from dinoreg.commands.arguments import (
    Verb,
    check_early,
    config_and_options,
    given_by,
    read_options,
    source_and_overrides,
)
from dinoreg.commands.completion import SHELLS, script_of
from dinoreg.commands.doctor import explain_error
from dinoreg.config.load import Config, load_config, require_complete, shipped_configs
from dinoreg.config.option import split_texts
from dinoreg.config.plan_options import PlanOptions
from dinoreg.evaluation.options import EvalOptions
from dinoreg.jobs.job_type import find_job, job_files
from dinoreg.jobs.options import LaunchOptions
from dinoreg.runtime.errors import Interrupted, RunError, UserError, one_line
from dinoreg.runtime.guide import Verbatim, next_commands, next_lines, repeated
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.printable import print_status, printable
from dinoreg.runtime.regular_files import open_to_append


def _function(module: str, name: str, result: str = "") -> Callable[..., None]:
    """A function of `dinoreg.MODULE`, imported when it is called, since most need torch; prints `RESULT: PATH`."""

    def call(*args: Any, **named: Any) -> None:
        returned = getattr(importlib.import_module(f"dinoreg.{module}"), name)(*args, **named)
        if result:
            print(f"{result}: {printable(str(returned))}")

    return call


@contextmanager
def _running(out: str) -> Iterator[None]:
    """A context for the work of a command: failures name the log, an interruption explains how to resume.

    out     run folder
    raises  RunError for any failure of a run, after appending the traceback to its train.log; Interrupted for Ctrl-C
            when there is a checkpoint
    """
    log = Path(out) / "train.log"
    try:
        yield
    except KeyboardInterrupt:
        if not (log.parent / "checkpoints" / "last").is_file():
            raise
        advice = f"interrupted; go on with: dinoreg pretrain {out} resume=true"
        raise Interrupted(advice, signal.SIGINT) from None
    except (UserError, Interrupted, BrokenPipeError):
        raise
    except RunError as error:
        where = f" (log: {log})" if log.is_file() else ""
        located = RunError(f"{one_line(error)}{where}")
        located.reported = error.reported
        raise located from error
    except Exception as error:
        if not (log.parent / "config.yaml").is_file():  # not (yet) a run's folder
            raise
        with suppress(OSError, UserError), open_to_append(log) as file:
            file.write(traceback.format_exc())
        if os.environ.get("DINOREG_DEBUG") == "1":
            traceback.print_exc()
        raise RunError(f"{explain_error(error)} (traceback: {log})") from error


def _quickstart(options: keys.QuickstartOptions) -> None:
    with _running(options.out or "runs/quickstart"):
        _function("commands.quickstart", "quickstart")(options.out, seed=options.seed, overwrite=options.overwrite)


def _load_config(arguments: list[str]) -> Config:
    first = Path(arguments[0]) if arguments else Path()
    if arguments and first.is_dir() and not (first / "config.yaml").exists():
        said = {"data": arguments[0], "stem": first.name, "rest": Verbatim(shlex.join(arguments[1:]))}
        raise UserError(f"pretrain: {first} is a folder without config.yaml; Write: {next_commands('folder', said)[0]}")
    return load_config(*source_and_overrides("pretrain", arguments))


def _read_pretrain(arguments: list[str]) -> tuple[Config]:
    return (require_complete(_load_config(arguments)),)


def _pretrain(config: Config, **hooks: Any) -> None:
    """hooks are arguments of `pretrain` in train/loop.py: a job passes `on_checkpoint`."""
    with _running(str(config.out)):
        from dinoreg.distributed.process_group import is_main_process
        from dinoreg.train.loop import pretrain

        run = Path(pretrain(config, **hooks))
        if is_main_process():
            _function("commands.report", "report_run", "report")(run)


def _configs() -> list[str]:
    return [f"CONFIG: {', '.join(shipped_configs())}; a YAML file (ours or dinov2's); a run folder."]


def _read_eval(arguments: list[str]) -> tuple[Any, ...]:
    if "--list" in arguments:
        return "", [name for word in arguments if word != "--list" for name in word.split(",")]
    missing = "NAME, all, or the PATH of a labelled folder, of dinoreg eval --list"
    names, overrides = source_and_overrides("eval", arguments, missing, "; several datasets are written NAME,NAME")
    from dinoreg.evaluation.request import read_request

    return names, read_request(overrides)


def _eval(names: str, request: Any) -> None:
    """names, request  as for `evaluate_command`; "" and names: list these datasets, or all in short."""
    from dinoreg.evaluation.benchmark import PROTOCOLS, benchmarks, find_benchmark
    from dinoreg.evaluation.request import check_whole

    if names:
        check_whole(names, request)
        _function("commands.evaluate", "evaluate_command")(names, request)
    elif request:
        from dinoreg.runtime.templates import render

        found = [*map(find_benchmark, request)]
        print(render("commands/templates/datasets.txt.j2", datasets=found, protocols=PROTOCOLS).rstrip())
    else:  # at once, without templates
        print(f"{'name':<15}classes  {'folder below root=':<22}task")
        for each in benchmarks().values():
            task = each.task.replace(" classification", "")
            print(f"{each.name:<15} {each.classes or '-':>6}  {f'{each.folders[0]}/':<21} {task}")
        print("\ndinoreg eval --list NAME says how many images, from where, and its licence.")


def _read_verdict(arguments: list[str]) -> tuple[Any, ...]:
    missing = "LABELLED, a folder with a subfolder a class or a table"
    labelled, overrides = source_and_overrides("verdict", arguments, missing)
    return labelled, *keys.read_verdict(overrides)


def _verdict(labelled: str, *options: Any) -> None:
    from dinoreg.data.open import find_labelled

    find_labelled(labelled)
    _function("commands.verdict", "verdict_command")(labelled, *options)


def _read_report(arguments: list[str]) -> tuple[list[str], keys.ReportOptions]:
    runs, options = read_options(keys.ReportOptions, arguments, positional=None)
    if not runs:
        raise UserError("report: missing RUN, the folder of a run")
    return runs, options


def _report(runs: list[str], options: keys.ReportOptions) -> None:
    results = Path(runs[0])
    if len(runs) == 1 and results.parent.name == "eval" and results.name.isdigit():
        _function("commands.evaluate", "report_results", "report")(results)
    else:
        folders = [folder for run in runs for folder in _run_folders("report", run)]
        if len(folders) == 1 and options.out is None:
            _function("commands.report", "report_run", "report")(folders[0])
        else:
            _function("commands.report", "compare_runs", "report")(folders, options.out and Path(options.out))


def _read_view(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(kind of view, arguments of `dinoreg.visualize.KIND.view_KIND`)"""
    kind, *rest = arguments or [""]
    keys.check_view(kind)
    if kind != "crops":
        return kind, vars(read_options(keys.VIEWS[kind], rest)[1])
    config, overrides, options = config_and_options("view crops", keys.VIEWS[kind], rest)
    load_config(config, overrides)  # for what is wrong with it
    return kind, {"config": config, "overrides": overrides, **vars(options)}


def _read_plan(arguments: list[str]) -> tuple[Config, PlanOptions]:
    config, overrides, options = config_and_options("plan", PlanOptions, arguments)
    return load_config(config, overrides), options


def _plan(config: Config, options: PlanOptions) -> None:
    from dinoreg.plan.run import plan

    plan(config, **vars(options)).show()
    if options.out is not None:
        print(f"plan: {options.out}")


def _jobs() -> list[str]:
    jobs = [find_job(job) for job in job_files()]
    return [
        "JOB, or a .py file of one's own with a JOB; their other keys are those of the command:",
        *(f"  dinoreg launch {job.usage}\n      {job.summary}" for job in jobs),
        "RUN is the folder that a launch names when it has submitted.",
    ]


_view = _function("commands.view", "draw", "view")
_VIEWS = {f"view {kind}": cls for kind, cls in keys.VIEWS.items()}
_ACTIONS = {f"launch {action} RUN": cls for action, cls in keys.ACTIONS.items()}


def _read_runs(arguments: list[str]) -> tuple[str]:
    return ([*read_options(keys.NoOptions, arguments, positional=1)[0], "runs"][0],)


def _read_completion(arguments: list[str]) -> tuple[str]:
    if (shell := " ".join(arguments)) not in SHELLS:
        raise UserError(f"completion: {shell or 'missing SHELL'}: expected {' or '.join(SHELLS)}")
    return (script_of(shell),)


def _read_doctor(arguments: list[str]) -> tuple[Path | None]:
    runs, _ = read_options(keys.NoOptions, arguments, positional=1)
    return (_run_folder("doctor", runs[0]) if runs else None,)


_VERBS = (
    Verb("quickstart", keys.QuickstartOptions, _quickstart),
    Verb("pretrain", Config, _pretrain, _read_pretrain, lines=_configs, values=_load_config, words=1, path="data"),
    Verb("inspect", keys.InspectOptions, _function("commands.inspect", "inspect_command"), path="data"),
    Verb("plan", PlanOptions, _plan, _read_plan, also=Config, words=1, path="data"),
    Verb("verdict", keys.VerdictOptions, _verdict, _read_verdict, words=1),
    Verb("eval", EvalOptions, _eval, _read_eval, flags=("--list",), words=1),
    Verb("report", keys.ReportOptions, _report, _read_report),
    Verb("runs", keys.NoOptions, _function("reports.run_list", "print_runs"), _read_runs),
    Verb("embed", keys.EmbedOptions, _function("commands.embed", "embed_command", "features"), path="data"),
    Verb("curate", keys.CurateOptions, _function("commands.curate", "curate_command"), path="features"),
    Verb("view", keys.NoOptions, _view, _read_view, _VIEWS, also=Config, words=1, path="images"),
    Verb("registers", keys.RegistersOptions, _function("commands.registers", "registers_command"), path="images"),
    Verb("export", keys.ExportOptions, _function("commands.export", "export_command"), path="weights"),
    Verb("launch", LaunchOptions, _function("commands.launch", "launch_command"), tuple, _ACTIONS, _jobs, also=Config),
    Verb("doctor", keys.NoOptions, _function("commands.doctor", "doctor"), _read_doctor),
    Verb("completion", keys.NoOptions, print, _read_completion),
)
VERBS = {verb.name: verb for verb in _VERBS}


def run_verb(verb: str, arguments: list[str], **hooks: Any) -> None:
    """Run a verb with its arguments; UserError for wrong ones, and whatever the verb raises.

    hooks  arguments for a training, such as `on_checkpoint`, from the job that it runs in
    """
    parsed = VERBS[verb].parse(arguments)
    check_early(parsed)
    VERBS[verb].run(*parsed, **hooks)
    print_status(*next_lines(verb, *_done(verb, arguments, parsed)))


def _done(verb: str, arguments: list[str], parsed: tuple[Any, ...]) -> tuple[dict[str, Any], str]:
    """(values, case) of the line on what to do next, see `say_next`."""
    values = {key: value for each in parsed for key, value in given_by(each).items()}
    first = parsed[0] if isinstance(parsed[0], str) else (arguments or [""])[0].partition("=")[0]
    case = str(values.get("format", first))
    if verb == "eval":
        from dinoreg.evaluation.request import is_own

        case = "listed" if not first else "own" if is_own(first) else ""
        values["own.root"] = parsed[1].dataset.get("own", {}).get("root") if first else None
    elif case == "crops":
        values["source"] = dict(pair.partition("=")[::2] for pair in arguments).get("data")
    elif verb == "doctor" and first:
        case = "finished" if read_json(Path(first) / "status.json").get("phase") == "finished" else "unfinished"
    elif verb == "plan":
        rest = split_texts(PlanOptions, arguments[1:])[1] + ([] if values.get("data.source") else ["data=FOLDER"])
        values |= {"rest": Verbatim(shlex.join(rest)), "stem": Path(first).stem}
    elif verb == "registers":
        values["weights"] = parsed[0].models[0]
    reading = repeated(values, {key: key for key in ("columns", "range", "own.root")})
    return {**values, "first": first, "reading": reading}, case


def _run_folders(verb: str, text: str) -> list[Path]:
    """A run's folder, or the runs in a folder of runs."""
    inside = sorted(path.parent for path in Path(text).glob("*/config.yaml"))
    return inside if inside and not (Path(text) / "config.yaml").is_file() else [_run_folder(verb, text)]


def _run_folder(verb: str, text: str) -> Path:
    folder = Path(text)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{verb}: {folder}: expected the folder of a run, with its config.yaml")
    return folder
