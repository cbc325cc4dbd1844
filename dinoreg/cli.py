"""The command line: a verb, its arguments, and `key=value`.

Every verb parses all it was given before it starts, so that a wrong key or value ends with one line and exit
code 2 and nothing written. A failure at run time is one line, the log's path and exit code 1. The parts
that do the work are imported inside the verbs: help and wrong spellings answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.errors import Interrupted, RunError, UserError

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Key:
    """A key of a verb that is not a key of the config."""

    name: str
    hint: Any
    default: str
    meaning: str


@dataclass(frozen=True)
class Verb:
    """flags are the options that start with dashes; all others are written key=value."""

    usage: str
    summary: str
    run: Callable[[list[str]], None]
    keys: tuple[Key, ...] = ()
    details: str = ""
    flags: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------
# The verbs


def _quickstart(arguments: list[str]) -> None:
    values = _keys("quickstart", arguments, positional=0)[1]
    with _running(values.get("out") or "runs/quickstart"):
        from dinoreg.quickstart import quickstart

        quickstart(values.get("out"), seed=values.get("seed", 0), overwrite=values.get("overwrite", False))


def _pretrain(arguments: list[str]) -> None:
    from dinoreg.config import load_config, require_complete

    if not arguments or _is_key_value(arguments[0]):
        raise UserError("pretrain: missing CONFIG, a name in configs/ or a YAML file; see dinoreg pretrain --help")
    source, *overrides = arguments
    stray = [argument for argument in overrides if "=" not in argument]
    if stray:
        raise UserError(f"pretrain: {stray[0]}: expected key=value")
    config = load_config(source, overrides)
    require_complete(config)
    with _running(config.out):
        from dinoreg.train.loop import pretrain

        run = Path(pretrain(config))
        from dinoreg.view.report import write_report

        print(f"report: {write_report(run)}")


def _eval(arguments: list[str]) -> None:
    if "--list" in arguments:
        from dinoreg.evaluation import list_datasets

        list_datasets()
        return
    if not arguments or _is_key_value(arguments[0]):
        raise UserError("eval: missing NAME, all, or the PATH of a labelled folder; see dinoreg eval --list")
    names, *overrides = arguments
    stray = [argument for argument in overrides if "=" not in argument]
    if stray:
        raise UserError(f"eval: {stray[0]}: expected key=value; several datasets are written NAME,NAME")
    from dinoreg.evaluation import evaluate_command, read_request

    request = read_request(overrides)
    with _running(None):
        evaluate_command([names] if Path(names).exists() else names.split(","), request)


def _registers(arguments: list[str]) -> None:
    values = _keys("registers", arguments, positional=0)[1]
    for key, need in (("weights", "run folders, weight files or model names"), ("images", "a folder, a list, scenes")):
        if not values.get(key):
            raise UserError(f"registers: missing {key}=, {need}; see dinoreg registers --help")
    weights = values.pop("weights")
    from dinoreg.registers import Request, report_registers

    names = (weights,) if Path(weights).exists() else tuple(weights.split(","))
    request = Request(names, **{key: value for key, value in values.items() if value is not None})
    with _running(None):
        report_registers(request)


def _report(arguments: list[str]) -> None:
    runs, values = _keys("report", arguments, positional=None)
    if not runs:
        raise UserError("report: missing RUN, the folder of a run")
    folders = [_run_folder("report", run) for run in runs]
    with _running(None):
        from dinoreg.view.report import compare_report, write_report

        out = Path(values["out"]) if values.get("out") else None
        single = len(folders) == 1 and out is None
        print(f"report: {write_report(folders[0]) if single else compare_report(folders, out)}")


def _view(arguments: list[str]) -> None:
    from dinoreg.keys import nearest

    if not arguments or _is_key_value(arguments[0]):
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

        module = importlib.import_module(f"dinoreg.view.{kind}")
        print(f"view: {getattr(module, f'view_{kind}')(**values)}")


def _view_crops(arguments: list[str]) -> None:
    own = [each for each in arguments if _is_key_value(each) and each.partition("=")[0] in VIEW_KEYS["crops"]]
    rest = [each for each in arguments if each not in own]
    if not rest or _is_key_value(rest[0]):
        raise UserError("view crops: missing CONFIG, a name in configs/, a YAML file or a run folder")
    config, *overrides = rest
    stray = [argument for argument in overrides if "=" not in argument]
    if stray:
        raise UserError(f"view crops: {stray[0]}: expected key=value")
    values = _keys("view", own, positional=0)[1]
    with _running(None):
        from dinoreg.view.crops import view_crops

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
    from dinoreg.embed import embed, read_options

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
        from dinoreg.data.inspect import inspect_source, render_inspection

        print(render_inspection(inspect_source(values["data"], sample=values.get("sample", 1000))))


def _doctor(arguments: list[str]) -> None:
    runs = _keys("doctor", arguments, positional=1)[0]
    folder = _run_folder("doctor", runs[0]) if runs else None
    from dinoreg.doctor import doctor

    doctor(folder)


_OUT = Key("out", str | None, "none", "folder to write to")
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
        "write the report of a run, or compare several",
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
    "doctor": Verb(
        "doctor [RUN]",
        "what this machine has and what is missing for what; or what happened to a run",
        _doctor,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 refused, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except UserError as error:
        _say(f"dinoreg: {_one_line(error)}")
        return REFUSED
    except Interrupted as stop:
        _say(f"dinoreg: {_one_line(stop)}")
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        _say("dinoreg: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except RunError as error:
        _say(f"dinoreg: {_one_line(error)}")
        return FAILED
    except Exception as error:
        if os.environ.get("DINOREG_DEBUG") == "1":
            traceback.print_exc()
            _say(f"dinoreg: {_explain(error)}")
        else:
            _say(f"dinoreg: {_explain(error)} (DINOREG_DEBUG=1 shows the traceback)")
        return FAILED


def script(benchmark: Any) -> None:
    """Run a declaration as a script: `python eval/pets.py weights=… root=…` is `dinoreg eval pets weights=… root=…`."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    raise SystemExit(main(["eval", str(path or benchmark.name), *sys.argv[1:]]))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return OK
    if arguments[0] in ("--version", "-V"):
        from dinoreg import __version__

        print(f"dinoreg {__version__}")
        return OK
    name, *rest = arguments
    if name not in VERBS:
        from dinoreg.keys import nearest

        raise UserError(f"{name}: unknown verb{nearest(name, VERBS)}; known: {', '.join(VERBS)}")
    if any(argument in ("-h", "--help") for argument in rest):
        print(_verb_help(name))
        return OK
    for argument in rest:
        if argument.startswith("-") and argument not in VERBS[name].flags:
            raise UserError(f"{name}: {argument}: unknown option; options are written key=value")
    VERBS[name].run(rest)
    return OK


# ------------------------------------------------------------------------------------------------------------
# Arguments


def _is_key_value(argument: str) -> bool:
    """Whether it reads as key=value; a path with "=" in it that exists is a path."""
    key = argument.partition("=")[0]
    return "=" in argument and "/" not in key and not Path(argument).exists()


def _keys(verb: str, arguments: list[str], positional: int | None) -> tuple[list[str], dict[str, Any]]:
    """The positional arguments (at most `positional`; None: any number) and the verb's own keys."""
    known: Mapping[str, Key] = {key.name: key for key in VERBS[verb].keys}
    plain: list[str] = []
    values: dict[str, Any] = {}
    for argument in arguments:
        if not _is_key_value(argument):
            plain.append(argument)
            continue
        from dinoreg.keys import nearest
        from dinoreg.values import Text, convert

        name, _, text = argument.partition("=")
        if name not in known:
            accepted = f"; accepted: {', '.join(known)}" if known else "; it takes no keys"
            raise UserError(f"{name}: unknown key of dinoreg {verb}{nearest(name, known)}{accepted}")
        if name in values:
            raise UserError(f"{name}: given twice")
        values[name] = convert(Text(text), known[name].hint, name, "command line")
    if positional is not None and len(plain) > positional:
        raise UserError(f"{verb}: {plain[positional]}: unexpected; usage: dinoreg {VERBS[verb].usage}")
    return plain, values


def _run_folder(verb: str, text: str) -> Path:
    folder = Path(text)
    if not folder.is_dir():
        raise UserError(f"{verb}: {folder}: no such folder; expected the folder of a run")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{verb}: {folder}: not a run folder (it has no config.yaml)")
    return folder


# ------------------------------------------------------------------------------------------------------------
# How a command ends


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
        raise RunError(f"{_one_line(error)}{where}") from error
    except Exception as error:
        if log is None or not (log.parent / "config.yaml").is_file():  # not (yet) a run's folder
            raise
        with open(log, "a") as file:
            file.write(traceback.format_exc())
        if os.environ.get("DINOREG_DEBUG") == "1":
            traceback.print_exc()
        raise RunError(f"{_explain(error)} (traceback: {log})") from error


def _explain(error: BaseException) -> str:
    from dinoreg.doctor import explain

    return explain(error) or f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Help


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "dinoreg: self-supervised pretraining of Vision Transformers with register tokens\n\n"
        f"usage: dinoreg VERB … key=value …\n\n{verbs}\n\n"
        "dinoreg VERB --help lists a verb's keys; dinoreg --version prints the version."
    )


def _verb_help(name: str) -> str:
    verb = VERBS[name]
    rows = [(key.name, f"{_type(key.hint)} = {key.default}", key.meaning) for key in verb.keys]
    lines = [f"usage: dinoreg {verb.usage}", "", verb.summary]
    if verb.details:
        lines += ["", verb.details]
    if name == "pretrain":
        from dinoreg.bundled import bundled
        from dinoreg.config import Config
        from dinoreg.keys import describe

        configs = sorted(path.stem for path in bundled("configs").glob("*.yaml"))
        lines += ["", f"CONFIG: {', '.join(configs)}; a YAML file (ours or dinov2's); a run folder"]
        rows = describe(Config)
        at = [key for key, _, _ in rows].index("init")
        kind, meaning = next(row[1:] for row in rows if row[0] == "data.source")
        rows.insert(at, ("data", kind, f"short for data.source: {meaning}"))
    if name == "eval":
        from dinoreg.eval.options import EvalOptions
        from dinoreg.keys import describe

        rows = describe(EvalOptions)
    if name == "embed":
        from dinoreg.embed import EmbedOptions
        from dinoreg.keys import describe

        rows = describe(EmbedOptions)
    if rows:
        lines += ["", "keys:", *_table(rows)]
    return "\n".join(lines)


def _type(hint: Any) -> str:
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("None", "none")


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines: list[str] = []
    section = ""
    for key, kind, meaning in rows:
        if "." in key and key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append("")
        lines.append(f"  {key:<{widths[0]}}  {kind:<{widths[1]}}  {meaning}".rstrip())
    return lines
