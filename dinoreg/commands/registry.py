"""The verbs of the command line: the arguments of each, and the function that does its work."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoreg.commands import options as keys
from dinoreg.commands.arguments import Verb, config_and_options, is_key_value, read_options, source_and_overrides
from dinoreg.commands.failures import running
from dinoreg.config.load import Config, load_config, require_complete, shipped_configs
from dinoreg.config.option import nearest
from dinoreg.config.plan_options import PlanOptions
from dinoreg.evaluation.options import EvalOptions
from dinoreg.jobs.job_type import find_job, job_files
from dinoreg.jobs.options import LaunchOptions
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import printable


def _function(module: str, name: str, result: str = "") -> Callable[..., None]:
    """A function of `dinoreg.MODULE`, imported when it is called, since most need torch; prints `RESULT: PATH`."""

    def call(*args: Any, **named: Any) -> None:
        returned = getattr(importlib.import_module(f"dinoreg.{module}"), name)(*args, **named)
        if result:
            print(f"{result}: {printable(str(returned))}")

    return call


def _quickstart(options: keys.QuickstartOptions) -> None:
    with running(options.out or "runs/quickstart"):
        _function("commands.quickstart", "quickstart")(options.out, seed=options.seed, overwrite=options.overwrite)


def _load_config(arguments: list[str]) -> Config:
    return load_config(*source_and_overrides("pretrain", arguments))


def _read_pretrain(arguments: list[str]) -> tuple[Config]:
    return (require_complete(_load_config(arguments)),)


def _pretrain(config: Config, **hooks: Any) -> None:
    """hooks are arguments of `pretrain` in train/loop.py: a job passes `on_checkpoint`."""
    with running(config.out):
        from dinoreg.distributed.process_group import is_main_process
        from dinoreg.train.loop import pretrain

        run = Path(pretrain(config, **hooks))
        if is_main_process():
            _function("commands.report", "report_run", "report")(run)


def _configs() -> list[str]:
    return [
        f"CONFIG: {', '.join(shipped_configs())}; a YAML file (ours or dinov2's); a run folder.",
        "Values below are those of CONFIG where it is given, else the defaults.",
        "data=PATH is short for data.source=PATH.",
        "A run that ended early goes on with: dinoreg pretrain RUN resume=true",
    ]


def _read_eval(arguments: list[str]) -> tuple[Any, ...]:
    if "--list" in arguments:
        return ()
    missing = "NAME, all, or the PATH of a labelled folder, of dinoreg eval --list"
    names, overrides = source_and_overrides("eval", arguments, missing, "; several datasets are written NAME,NAME")
    from dinoreg.commands.evaluate import read_request

    return names, read_request(overrides)


def _read_verdict(arguments: list[str]) -> tuple[Any, ...]:
    missing = "LABELLED, a folder with a subfolder a class or a table"
    labelled, overrides = source_and_overrides("verdict", arguments, missing)
    from dinoreg.commands.verdict import read_verdict

    return labelled, *read_verdict(overrides)


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


def _export(options: keys.ExportOptions) -> None:
    from dinoreg.export.certificate import summary
    from dinoreg.export.run import export, read_certificate

    folder = export(**vars(options))
    print(f"certificate: {summary(read_certificate(folder))}\nexport: {folder}")


def _inspect(options: keys.InspectOptions) -> None:
    from dinoreg.data.statistics import inspect_source, render_inspection

    own: Any = {"in_channels": options.in_channels, "value_range": options.range, "root": options.root}
    found = inspect_source(options.data, options.sample, **own, columns=options.columns)
    print(render_inspection(found))
    if len(found["bad"]) == found["looked_at"]:
        name, reason = next(iter(found["bad"].items()))
        raise UserError(f"data: none of the {found['looked_at']:,} images can be read; the first, {name}, {reason}")


def _read_view(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(kind of view, arguments of `dinoreg.visualize.KIND.view_KIND`)"""
    expected = f"expected {', '.join(keys.VIEWS)}"
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"view: missing what to view; {expected}")
    kind, *rest = arguments
    if kind not in keys.VIEWS:
        raise UserError(f"view: {kind}: unknown view{nearest(kind, keys.VIEWS)}; {expected}")
    if kind != "crops":
        return kind, vars(read_options(keys.VIEWS[kind], rest)[1])
    config, overrides, options = config_and_options("view crops", keys.VIEWS[kind], rest)
    return kind, {"config": config, "overrides": overrides, **vars(options)}


def _view(kind: str, values: dict[str, Any]) -> None:
    _function(f"visualize.{kind}", f"view_{kind}", "view")(**values)


def _read_plan(arguments: list[str]) -> tuple[Config, PlanOptions]:
    config, overrides, options = config_and_options("plan", PlanOptions, arguments)
    return load_config(config, overrides), options


def _jobs() -> list[str]:
    jobs = [find_job(job) for job in job_files()]
    return [
        "JOB, or a .py file of one's own with a JOB; their other keys are those of the command:",
        *(f"  dinoreg launch {job.usage}\n      {job.summary}" for job in jobs),
        "RUN is the folder that a launch names when it has submitted.",
    ]


def _read_doctor(arguments: list[str]) -> tuple[Path | None]:
    runs, _ = read_options(keys.DoctorOptions, arguments, positional=1)
    return (_run_folder("doctor", runs[0]) if runs else None,)


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "quickstart [out=FOLDER] [seed=0] [overwrite=false]",
        "pretrain a tiny model on the embedded scenes, probe it, write the report: CPU, minutes, no data",
        keys.QuickstartOptions,
        _quickstart,
    ),
    "pretrain": Verb(
        "pretrain CONFIG data=FOLDER out=FOLDER [key=value …]",
        "train a register ViT on a folder of images; CONFIG is a name in configs/ or a YAML file",
        Config,
        _pretrain,
        _read_pretrain,
        details=_configs,
        values=_load_config,
    ),
    "eval": Verb(
        "eval NAME[,NAME…]|all|PATH weights=… root=FOLDER [key=value …]",
        "measure a backbone on benchmark datasets or on your own labelled images, beside two baselines",
        EvalOptions,
        _function("commands.evaluate", "evaluate_command"),
        _read_eval,
        details=(
            "PATH is a folder with a subfolder per class, a CSV, images/ + masks/ or depth/, or your own eval/*.py.",
            "A dataset's own options are written NAME.KEY=VALUE; dinoreg eval --list shows all datasets.",
        ),
        flags=("--list",),
    ),
    "verdict": Verb(
        "verdict LABELLED weights=RUN [public=WEIGHTS] [init=WEIGHTS] [key=value …]",
        "own weights against their start, a public backbone, random weights and pixels on own labels: what to do next",
        keys.VerdictOptions,
        _function("commands.verdict", "verdict_command"),
        _read_verdict,
        details=("LABELLED is as for eval, with one class a picture; own.KEY=VALUE are its options, as own.folds=10.",),
    ),
    "registers": Verb(
        "registers weights=W[,W2…] images=FOLDER [out=FOLDER] [key=value …]",
        "look for artifact tokens, and at what registers do and hold; several models side by side",
        keys.RegistersOptions,
        _function("commands.registers", "report_registers"),
    ),
    "report": Verb(
        "report RUN… [out=FILE]",
        "write the report of a run, compare several (or all in a folder), or write that of RUN/eval/STEP",
        keys.ReportOptions,
        _report,
        _read_report,
    ),
    "runs": Verb(
        "runs [FOLDER]",
        "the runs in a folder (runs/): how each stands, its last and best figures; dinoreg report FOLDER compares them",
        keys.RunsOptions,
        _function("reports.run_list", "print_runs"),
        lambda arguments: ([*read_options(keys.RunsOptions, arguments, positional=1)[0], "runs"][0],),
    ),
    "export": Verb(
        "export weights=… format=timm|transformers|meta|safetensors|onnx out=FOLDER [size=…]",
        "write a backbone for another library, with a certificate that it computes the same there, and a model card",
        keys.ExportOptions,
        _export,
        details=("Exit code 1 and nothing written when the other library differs from the source above the bound.",),
    ),
    "inspect": Verb(
        "inspect data=FOLDER [sample=1000]",
        "count, sizes, formats and unreadable files of a data source",
        keys.InspectOptions,
        _inspect,
    ),
    "embed": Verb(
        "embed data=FOLDER weights=… out=FILE.safetensors|FILE.parquet [key=value …]",
        "write the features of a folder, list or archive of images to one file; goes on where it was stopped",
        keys.EmbedOptions,
        _function("commands.embed", "embed", "features"),
    ),
    "view": Verb(
        "view attention|pca|norms weights=… images=… [key=value …]\n"
        "       dinoreg view crops CONFIG [data=…] [key=value …]",
        "pictures of what a model sees: attention, patch colours, token norms; or of the crops a config makes",
        keys.NoOptions,
        _view,
        _read_view,
        kinds={f"view {kind}": cls for kind, cls in keys.VIEWS.items()},
        details=("view crops takes the keys of pretrain besides, as data=photos/ or crops.num_local=4.",),
    ),
    "launch": Verb(
        "launch JOB [CONFIG] [key=value …]\n       dinoreg launch status|logs|cancel RUN [key=value …]",
        "run a command as a job: on Slurm, or detached on this machine; it saves, requeues and goes on by itself",
        LaunchOptions,
        _function("commands.launch", "launch_command"),
        tuple,
        kinds={f"launch {action} RUN": cls for action, cls in keys.ACTIONS.items()},
        details=_jobs,
    ),
    "plan": Verb(
        "plan CONFIG [nodes=1] [gpus=8] [gpu=h100] [out=FILE.json] [key=value …]",
        "what a run will cost before it starts: memory, speed, traffic, time, and what to change when it does not fit",
        PlanOptions,
        _function("commands.plan", "plan_command"),
        _read_plan,
        details=("All other keys are those of pretrain, as batch_size=32 or parallel.strategy=fsdp.",),
    ),
    "doctor": Verb(
        "doctor [RUN]",
        "what this machine has and what is missing for what; or what happened to a run",
        keys.DoctorOptions,
        _function("commands.doctor", "doctor"),
        _read_doctor,
    ),
}


def run_verb(verb: str, arguments: list[str], **hooks: Any) -> None:
    """Run a verb with its arguments; UserError for wrong ones, and whatever the verb raises.

    hooks  arguments for a training, such as `on_checkpoint`, from the job that it runs in
    """
    VERBS[verb].run(*VERBS[verb].parse(arguments), **hooks)


def _run_folders(verb: str, text: str) -> list[Path]:
    """A run's folder, or the runs in a folder of runs."""
    inside = sorted(path.parent for path in Path(text).glob("*/config.yaml"))
    return inside if inside and not (Path(text) / "config.yaml").is_file() else [_run_folder(verb, text)]


def _run_folder(verb: str, text: str) -> Path:
    folder = Path(text)
    if not folder.is_dir():
        raise UserError(f"{verb}: {folder}: no such folder; expected the folder of a run")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{verb}: {folder}: not a run folder (it has no config.yaml)")
    return folder
