"""The verbs of the command line: what each takes, and the call that does its work."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from dinoreg.commands.arguments import (
    Key,
    Verb,
    is_key_value,
    read_keys,
    source_and_overrides,
    split_keys,
)
from dinoreg.runtime.errors import Interrupted, RunError, UserError


def _quickstart(arguments: list[str]) -> None:
    values = _keys("quickstart", arguments, positional=0)[1]
    with _running(values.get("out") or "runs/quickstart"):
        from dinoreg.commands.quickstart import quickstart

        quickstart(values.get("out"), seed=values.get("seed", 0), overwrite=values.get("overwrite", False))


def _pretrain(arguments: list[str], **hooks: Any) -> None:
    """hooks are handed to the training by what runs it: a job listens to its checkpoints."""
    from dinoreg.config.load import load_config, require_complete

    missing = "CONFIG, a name in configs/ or a YAML file; see dinoreg pretrain --help"
    source, overrides = source_and_overrides("pretrain", arguments, missing)
    config = load_config(source, overrides)
    require_complete(config)
    with _running(config.out):
        from dinoreg.distributed.process_group import is_main_process
        from dinoreg.train.loop import pretrain

        run = Path(pretrain(config, **hooks))
        if not is_main_process():
            return
        from dinoreg.commands.report import report_run

        print(f"report: {report_run(run)}")


def _eval(arguments: list[str]) -> None:
    if "--list" in arguments:
        from dinoreg.commands.evaluate import list_datasets

        list_datasets()
        return
    missing = "NAME, all, or the PATH of a labelled folder; see dinoreg eval --list"
    names, overrides = source_and_overrides("eval", arguments, missing, "; several datasets are written NAME,NAME")
    from dinoreg.commands.evaluate import evaluate_command, read_request

    request = read_request(overrides)
    with _running(None):
        evaluate_command([names] if Path(names).exists() else names.split(","), request)


def _registers(arguments: list[str]) -> None:
    values = _keys("registers", arguments, positional=0)[1]
    for key, need in (("weights", "run folders, weight files or model names"), ("images", "a folder, a list, scenes")):
        if not values.get(key):
            raise UserError(f"registers: missing {key}=, {need}; see dinoreg registers --help")
    weights = values.pop("weights")
    from dinoreg.commands.registers import Request, report_registers

    names = (weights,) if Path(weights).exists() else tuple(weights.split(","))
    request = Request(names, **{key: value for key, value in values.items() if value is not None})
    with _running(None):
        report_registers(request)


def _report(arguments: list[str]) -> None:
    runs, values = _keys("report", arguments, positional=None)
    if not runs:
        raise UserError("report: missing RUN, the folder of a run")
    if len(runs) == 1 and _is_results(Path(runs[0])):
        with _running(None):
            from dinoreg.commands.evaluate import report_results

            print(f"report: {report_results(Path(runs[0]))}")
        return
    folders = [folder for run in runs for folder in _run_folders("report", run)]
    with _running(None):
        from dinoreg.commands.report import report_runs

        print(f"report: {report_runs(folders, Path(values['out']) if values.get('out') else None)}")


def _view(arguments: list[str]) -> None:
    from dinoreg.config.keys import nearest

    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"view: missing what to view; expected {', '.join(VIEW_KEYS)}")
    kind, *rest = arguments
    if kind not in VIEW_KEYS:
        raise UserError(f"view: {kind}: unknown view{nearest(kind, VIEW_KEYS)}; expected {', '.join(VIEW_KEYS)}")
    if kind == "crops":
        _view_crops(rest)
        return
    values = _keys("view", rest, positional=0)[1]
    for key in values:
        if key not in VIEW_KEYS[kind]:
            raise UserError(f"{key}: no key of dinoreg view {kind}; accepted: {', '.join(VIEW_KEYS[kind])}")
    if values.get("weights") is None:
        raise UserError(f"view {kind}: weights= is missing: a run folder, a weight file, or a model's name")
    with _running(None):
        import importlib

        module = importlib.import_module(f"dinoreg.visualize.{kind}")
        print(f"view: {getattr(module, f'view_{kind}')(**values)}")


def _view_crops(arguments: list[str]) -> None:
    own, rest = split_keys(VIEW_KEYS["crops"], arguments)
    missing = "CONFIG, a name in configs/, a YAML file or a run folder"
    config, overrides = source_and_overrides("view crops", rest, missing)
    values = _keys("view", own, positional=0)[1]
    with _running(None):
        from dinoreg.visualize.crops import view_crops

        print(f"view: {view_crops(config, overrides, **values)}")


def _export(arguments: list[str]) -> None:
    values = _keys("export", arguments, positional=0)[1]
    for key, need in (
        ("weights", "a run folder, a weight file or a model name"),
        ("format", "timm, transformers, meta, safetensors or onnx"),
        ("out", "the folder to write"),
    ):
        if values.get(key) is None:
            raise UserError(f"export: missing {key}=, {need}; see dinoreg export --help")
    with _running(None):
        from dinoreg.export.certificate import summary
        from dinoreg.export.run import export, read_certificate

        folder = export(**values)
        print(f"certificate: {summary(read_certificate(folder))}\nexport: {folder}")


def _embed(arguments: list[str]) -> None:
    from dinoreg.commands.embed import embed, read_options

    options = read_options(arguments)
    with _running(None):
        print(f"features: {embed(options)}")


def _inspect(arguments: list[str]) -> None:
    values = _keys("inspect", arguments, positional=0)[1]
    if values.get("data") is None:
        raise UserError("inspect: missing data=, a folder of images, a list of paths, or scenes")
    if values.get("sample", 1) < 1:
        raise UserError(f"sample={values['sample']}: expected at least 1 image")
    with _running(None):
        from dinoreg.data.statistics import inspect_source, render_inspection

        print(render_inspection(inspect_source(values["data"], sample=values.get("sample", 1000))))


def _launch(arguments: list[str]) -> None:
    from dinoreg.commands.launch import launch_command

    launch_command(arguments, VERBS, run_verb)


def _plan(arguments: list[str]) -> None:
    own, rest = split_keys([key.name for key in VERBS["plan"].keys], arguments)
    missing = "CONFIG, a name in configs/, a YAML file or a run folder; see dinoreg plan --help"
    source, overrides = source_and_overrides("plan", rest, missing)
    values = _keys("plan", own, positional=0)[1]
    out = values.pop("out", None)
    from dinoreg.config.load import load_config

    config = load_config(source, overrides)
    with _running(None):
        from dinoreg.plan import plan
        from dinoreg.plan.text import show

        found = plan(config, **{key: value for key, value in values.items() if value is not None})
        written = None if out is None else found.write(out)
        show(found)
        if written is not None:
            print(f"plan: {written}")


def _doctor(arguments: list[str]) -> None:
    runs = _keys("doctor", arguments, positional=1)[0]
    folder = _run_folder("doctor", runs[0]) if runs else None
    from dinoreg.commands.doctor import doctor

    doctor(folder)


# The views of `dinoreg view`, and the keys of each.
_MODEL_KEYS = ("weights", "images", "out", "num", "size", "device")


VIEW_KEYS: dict[str, tuple[str, ...]] = {
    "attention": (*_MODEL_KEYS, "layer", "head"),
    "pca": (*_MODEL_KEYS, "layer", "foreground", "basis"),
    "norms": _MODEL_KEYS,
    "crops": ("out", "num"),
}


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "quickstart [out=FOLDER] [seed=0] [overwrite=false]",
        "pretrain a tiny model on the embedded scenes, probe it, write the report: CPU, minutes, no data",
        _quickstart,
        (
            Key("out", str | None, "none", "the run folder; none: runs/quickstart"),
            Key("seed", int, "0", "of weights, data order, crops and masks"),
            Key("overwrite", bool, "false", "delete what is in `out` first"),
        ),
    ),
    "pretrain": Verb(
        "pretrain CONFIG data=FOLDER out=FOLDER [key=value …]",
        "train a register ViT on a folder of images; CONFIG is a name in configs/ or a YAML file",
        _pretrain,
        details="A run that ended early goes on with: dinoreg pretrain RUN resume=true",
    ),
    "eval": Verb(
        "eval NAME[,NAME…]|all|PATH weights=… root=FOLDER [key=value …]",
        "measure a backbone on benchmark datasets or on your own labelled images, beside two baselines",
        _eval,
        details="PATH is a folder with one subfolder per class, a CSV, images/ + masks/ or depth/, or an eval/*.py of "
        "your own.\nA dataset's own options are written NAME.KEY=VALUE; dinoreg eval --list shows all datasets.",
        flags=("--list",),
    ),
    "registers": Verb(
        "registers weights=W[,W2…] images=FOLDER [out=FOLDER] [key=value …]",
        "look for artifact tokens, and at what registers do and hold; several models side by side",
        _registers,
        (
            Key("weights", str | None, "none", "run folders, weight files or model names, with commas between"),
            Key("images", str | None, "none", "a folder (one subfolder a class adds probes), a list of paths, scenes"),
            Key("out", str | None, "none", "folder for registers.html; none: runs/registers/NAMES"),
            Key("size", int | None, "none", "pixels a side; none: the first model's own, enlarged where it is small"),
            Key("num_images", int, "300", "images at most, from all over the source"),
            Key("labels", bool, "true", "whether the subfolders of `images` are classes"),
            Key("test_time", bool, "true", "try a test-time register on models that have outliers and no registers"),
            Key("seed", int, "0", "of the probes' split, of patches drawn and of noise"),
            Key("device", str, "auto", "auto, cpu, cuda[:N] or mps"),
        ),
    ),
    "report": Verb(
        "report RUN… [out=FILE]",
        "write the report of a run, compare several (or all in a folder), or write that of RUN/eval/STEP",
        _report,
        (
            Key(
                "out",
                str | None,
                "none",
                "the HTML file; none: report.html, in the run's folder if it is one run",
            ),
        ),
    ),
    "export": Verb(
        "export weights=… format=timm|transformers|meta|safetensors|onnx out=FOLDER [size=…]",
        "write a backbone for another library, with a certificate that it computes the same there, and a model card",
        _export,
        (
            Key("weights", str | None, "none", "a run folder, a weight file (ours or others'), or a model name"),
            Key("format", str | None, "none", "timm, transformers, meta (torch.hub), safetensors or onnx"),
            Key("out", str | None, "none", "folder to write; new or empty"),
            Key(
                "size",
                int | tuple[int, int] | None,
                "none",
                "pixels, or [height,width]: positions are resampled to it first; onnx then takes no other size",
            ),
        ),
        details="Exit code 1 and nothing written when the other library differs from the source above the bound.",
    ),
    "inspect": Verb(
        "inspect data=FOLDER [sample=1000]",
        "count, sizes, formats and unreadable files of a data source",
        _inspect,
        (
            Key(
                "data",
                str | list[str] | None,
                "none",
                "as data= of pretrain: a folder, [several], a list, scenes",
            ),
            Key("sample", int, "1000", "images that are opened and decoded"),
        ),
    ),
    "embed": Verb(
        "embed data=FOLDER weights=… out=FILE.safetensors|FILE.parquet [key=value …]",
        "write the features of a folder, list or archive of images to one file; goes on where it was stopped",
        _embed,
    ),
    "view": Verb(
        "view attention|pca|norms weights=… images=… [key=value …]\n"
        "       dinoreg view crops CONFIG [data=…] [key=value …]",
        "pictures of what a model sees: attention, patch colours, token norms; or of the crops a config makes",
        _view,
        (
            Key("weights", str | None, "none", "a run folder, a weight file, or a model's name (random weights)"),
            Key(
                "images",
                str | list[str] | None,
                "none",
                "an image, a folder, [several], a list, tars, scenes; none: the run's own data",
            ),
            Key("out", str | None, "none", "folder to write to; none: RUN/view/<step>/, or view/<name>/"),
            Key("num", int | None, "none", "images at most; none: 8, or every file that was named"),
            Key(
                "size",
                int | tuple[int, int] | None,
                "none",
                "pixels, a side or [height, width], multiples of the patch size; none: the model's own",
            ),
            Key("device", str, "auto", "auto | cpu | cuda | cuda:0 | mps"),
            Key("layer", str, "-1", "attention: blocks, as 11 or 0,5,11 or all; pca: one block; -1 is the last"),
            Key("head", str, "all", "attention: all (the mean and each) | mean | a number from 0"),
            Key("foreground", bool, "false", "pca: set the foreground apart, and fit the colours on it alone"),
            Key("basis", str | None, "none", "pca: file of a colour basis, used where it is there, else written"),
        ),
        details="view crops takes the keys of pretrain besides, as data=photos/ or crops.num_local=4.",
    ),
    "launch": Verb(
        "launch JOB [CONFIG] [key=value …]\n       dinoreg launch status|logs|cancel RUN [key=value …]",
        "run a command as a job: on Slurm, or detached on this machine; it saves, requeues and goes on by itself",
        _launch,
    ),
    "plan": Verb(
        "plan CONFIG [nodes=1] [gpus=8] [gpu=h100] [out=FILE.json] [key=value …]",
        "what a run will cost before it starts: memory, speed, traffic, time, and what to change when it does not fit",
        _plan,
        (
            Key("nodes", int | None, "none", "machines; with none of nodes, gpus, gpu and memory: one process here"),
            Key("gpus", int | None, "none", "devices of a machine; none: 8, or 1 on a CPU"),
            Key("gpu", str | None, "none", "their kind, as h100, a100-40, rtx4090; none: the one here, else h100"),
            Key("memory", float | None, "none", "GiB of a device; none: what that kind has"),
            Key("link", float | None, "none", "GB/s from a device to other machines; none: what is usual for its kind"),
            Key("local_link", float | None, "none", "GB/s from a device to its neighbours; none: its maker's figure"),
            Key("utilisation", float | None, "none", "share of the peak where nothing is measured; none: by the width"),
            Key("num_images", int | None, "none", "in the data set; none: counted in data=, where that is here"),
            Key("disk", float, "1", "GB/s at which all processes together write a checkpoint"),
            Key("probe", bool | None, "none", "run a few steps here; none: on CUDA if it fits, on a CPU if quick"),
            Key("out", str | None, "none", "JSON file for every figure"),
        ),
        details="All other keys are those of pretrain, as batch_size=32 or parallel.strategy=fsdp.",
    ),
    "doctor": Verb(
        "doctor [RUN]",
        "what this machine has and what is missing for what; or what happened to a run",
        _doctor,
    ),
}


def run_verb(verb: str, arguments: list[str], **hooks: Any) -> None:
    """Run a verb from inside a job; `hooks` go to the training, which tells the job of its checkpoints."""
    cast(Any, VERBS[verb].run)(arguments, **hooks)


def _keys(verb: str, arguments: list[str], positional: int | None) -> tuple[list[str], dict[str, Any]]:
    """The positional arguments (at most `positional`; None: any number) and the verb's own keys."""
    return read_keys(verb, VERBS[verb], arguments, positional)


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


@contextmanager
def _running(out: str | None) -> Iterator[None]:
    """Around the work itself: failures name the log, an interruption says how to go on."""
    log = Path(out) / "train.log" if out else None
    try:
        yield
    except KeyboardInterrupt:
        if out is None or not (Path(out) / "checkpoints" / "last").is_file():
            raise
        advice = f"interrupted; go on with: dinoreg pretrain {out} resume=true"
        raise Interrupted(advice, signal.SIGINT) from None
    except (UserError, Interrupted, BrokenPipeError):
        raise
    except RunError as error:
        where = f" (log: {log})" if log is not None and log.is_file() else ""
        located = RunError(f"{_one_line(error)}{where}")
        located.reported = error.reported
        raise located from error
    except Exception as error:
        if log is None or not (log.parent / "config.yaml").is_file():  # not (yet) a run's folder
            raise
        with open(log, "a") as file:
            file.write(traceback.format_exc())
        if os.environ.get("DINOREG_DEBUG") == "1":
            traceback.print_exc()
        raise RunError(f"{_explain(error)} (traceback: {log})") from error


def _explain(error: BaseException) -> str:
    from dinoreg.commands.doctor import explain

    return explain(error) or f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
