"""The verbs of the command line: what each takes, and the call that does its work."""

from functools import partial
from pathlib import Path
from typing import Any

from dinoreg.commands.arguments import Verb, read_options, source_and_overrides
from dinoreg.commands.failures import running
from dinoreg.commands.launch import jobs_in_words, launch_command
from dinoreg.commands.options import (
    ACTIONS,
    VIEWS,
    DoctorOptions,
    EmbedOptions,
    ExportOptions,
    InspectOptions,
    NoOptions,
    QuickstartOptions,
    RegistersOptions,
    ReportOptions,
)
from dinoreg.commands.plan import read_plan, run_plan
from dinoreg.commands.view import read_view, view
from dinoreg.config.load import Config, load_config, require_complete
from dinoreg.config.plan_options import PlanOptions
from dinoreg.evaluation.options import EvalOptions
from dinoreg.jobs.options import LaunchOptions
from dinoreg.runtime.errors import UserError


def _quickstart(options: QuickstartOptions) -> None:
    with running(options.out or "runs/quickstart"):
        from dinoreg.commands.quickstart import quickstart

        quickstart(options.out, seed=options.seed, overwrite=options.overwrite)


def _read_pretrain(arguments: list[str]) -> tuple[Config]:
    config = load_config(*source_and_overrides("pretrain", arguments))
    require_complete(config)
    return (config,)


def _pretrain(config: Config, **hooks: Any) -> None:
    """hooks are handed to the training by what runs it: a job listens to its checkpoints."""
    with running(config.out):
        from dinoreg.distributed.process_group import is_main_process
        from dinoreg.train.loop import pretrain

        run = Path(pretrain(config, **hooks))
        if not is_main_process():
            return
        from dinoreg.commands.report import report_run

        print(f"report: {report_run(run)}")


def _configs() -> list[str]:
    from dinoreg.config.bundled import bundled

    names = sorted(path.stem for path in bundled("configs").glob("*.yaml"))
    return [
        f"CONFIG: {', '.join(names)}; a YAML file (ours or dinov2's); a run folder.",
        "Values below are those of CONFIG where it is given, else the defaults.",
        "data=PATH is short for data.source=PATH.",
        "A run that ended early goes on with: dinoreg pretrain RUN resume=true",
    ]


def _read_eval(arguments: list[str]) -> tuple[Any, ...]:
    if "--list" in arguments:
        return (None, None)
    missing = "NAME, all, or the PATH of a labelled folder, of dinoreg eval --list"
    names, overrides = source_and_overrides("eval", arguments, missing, "; several datasets are written NAME,NAME")
    from dinoreg.commands.evaluate import read_request

    return [names] if Path(names).exists() else names.split(","), read_request(overrides)


def _eval(names: list[str] | None, request: Any) -> None:
    from dinoreg.commands.evaluate import evaluate_command, list_datasets

    if names is None:
        list_datasets()
    else:
        evaluate_command(names, request)


def _registers(options: RegistersOptions) -> None:
    from dinoreg.commands.registers import report_registers

    report_registers(options)


def _read_report(arguments: list[str]) -> tuple[list[str], ReportOptions]:
    runs, options = read_options(ReportOptions, arguments, positional=None)
    if not runs:
        raise UserError("report: missing RUN, the folder of a run")
    return runs, options


def _report(runs: list[str], options: ReportOptions) -> None:
    if len(runs) == 1 and _is_results(Path(runs[0])):
        from dinoreg.commands.evaluate import report_results

        print(f"report: {report_results(Path(runs[0]))}")
        return
    folders = [folder for run in runs for folder in _run_folders("report", run)]
    from dinoreg.commands.report import report_runs

    print(f"report: {report_runs(folders, Path(options.out) if options.out else None)}")


def _export(options: ExportOptions) -> None:
    from dinoreg.export.certificate import summary
    from dinoreg.export.run import export, read_certificate

    folder = export(**vars(options))
    print(f"certificate: {summary(read_certificate(folder))}\nexport: {folder}")


def _embed(options: EmbedOptions) -> None:
    from dinoreg.commands.embed import embed

    print(f"features: {embed(options)}")


def _inspect(options: InspectOptions) -> None:
    from dinoreg.data.statistics import inspect_source, render_inspection

    print(render_inspection(inspect_source(options.data, sample=options.sample)))


def _launch(arguments: list[str]) -> None:
    launch_command(arguments, VERBS, run_verb)


def _doctor(runs: list[str], _: DoctorOptions) -> None:
    folder = _run_folder("doctor", runs[0]) if runs else None
    from dinoreg.commands.doctor import doctor

    doctor(folder)


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "quickstart [out=FOLDER] [seed=0] [overwrite=false]",
        "pretrain a tiny model on the embedded scenes, probe it, write the report: CPU, minutes, no data",
        QuickstartOptions,
        _quickstart,
    ),
    "pretrain": Verb(
        "pretrain CONFIG data=FOLDER out=FOLDER [key=value …]",
        "train a register ViT on a folder of images; CONFIG is a name in configs/ or a YAML file",
        Config,
        _pretrain,
        _read_pretrain,
        details=_configs,
        values=lambda arguments: load_config(*source_and_overrides("pretrain", arguments)),
    ),
    "eval": Verb(
        "eval NAME[,NAME…]|all|PATH weights=… root=FOLDER [key=value …]",
        "measure a backbone on benchmark datasets or on your own labelled images, beside two baselines",
        EvalOptions,
        _eval,
        _read_eval,
        details=(
            "PATH is a folder with a subfolder per class, a CSV, images/ + masks/ or depth/, or your own eval/*.py.",
            "A dataset's own options are written NAME.KEY=VALUE; dinoreg eval --list shows all datasets.",
        ),
        flags=("--list",),
    ),
    "registers": Verb(
        "registers weights=W[,W2…] images=FOLDER [out=FOLDER] [key=value …]",
        "look for artifact tokens, and at what registers do and hold; several models side by side",
        RegistersOptions,
        _registers,
    ),
    "report": Verb(
        "report RUN… [out=FILE]",
        "write the report of a run, compare several (or all in a folder), or write that of RUN/eval/STEP",
        ReportOptions,
        _report,
        _read_report,
    ),
    "export": Verb(
        "export weights=… format=timm|transformers|meta|safetensors|onnx out=FOLDER [size=…]",
        "write a backbone for another library, with a certificate that it computes the same there, and a model card",
        ExportOptions,
        _export,
        details=("Exit code 1 and nothing written when the other library differs from the source above the bound.",),
    ),
    "inspect": Verb(
        "inspect data=FOLDER [sample=1000]",
        "count, sizes, formats and unreadable files of a data source",
        InspectOptions,
        _inspect,
    ),
    "embed": Verb(
        "embed data=FOLDER weights=… out=FILE.safetensors|FILE.parquet [key=value …]",
        "write the features of a folder, list or archive of images to one file; goes on where it was stopped",
        EmbedOptions,
        _embed,
    ),
    "view": Verb(
        "view attention|pca|norms weights=… images=… [key=value …]\n"
        "       dinoreg view crops CONFIG [data=…] [key=value …]",
        "pictures of what a model sees: attention, patch colours, token norms; or of the crops a config makes",
        NoOptions,
        view,
        read_view,
        kinds={f"view {kind}": keys for kind, keys in VIEWS.items()},
        details=("view crops takes the keys of pretrain besides, as data=photos/ or crops.num_local=4.",),
    ),
    "launch": Verb(
        "launch JOB [CONFIG] [key=value …]\n       dinoreg launch status|logs|cancel RUN [key=value …]",
        "run a command as a job: on Slurm, or detached on this machine; it saves, requeues and goes on by itself",
        LaunchOptions,
        _launch,
        lambda arguments: (arguments,),
        kinds={f"launch {action} RUN": keys for action, keys in ACTIONS.items()},
        details=jobs_in_words,
    ),
    "plan": Verb(
        "plan CONFIG [nodes=1] [gpus=8] [gpu=h100] [out=FILE.json] [key=value …]",
        "what a run will cost before it starts: memory, speed, traffic, time, and what to change when it does not fit",
        PlanOptions,
        run_plan,
        read_plan,
        details=("All other keys are those of pretrain, as batch_size=32 or parallel.strategy=fsdp.",),
    ),
    "doctor": Verb(
        "doctor [RUN]",
        "what this machine has and what is missing for what; or what happened to a run",
        DoctorOptions,
        _doctor,
        partial(read_options, DoctorOptions, positional=1),
    ),
}


def run_verb(verb: str, arguments: list[str], **hooks: Any) -> None:
    """Run a verb; `hooks` go to the training, which tells the job that it runs in of its checkpoints."""
    VERBS[verb].run(*VERBS[verb].parse(arguments), **hooks)


def _is_results(folder: Path) -> bool:
    """Whether a path is that of an evaluation's results, `…/eval/<step>`, whether or not anything was written there."""
    return folder.parent.name == "eval" and folder.name.isdigit()


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
