"""What a verb of the command line takes: its keys, how they are read, and the help that lists them.

Keys of the config, of evaluations and of `embed` have readers of their own; here are those of the other verbs,
and the help of all of them. Nothing here imports torch, so that help and wrong spellings answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.runtime.errors import UserError


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


def is_key_value(argument: str) -> bool:
    """Whether it reads as key=value; a path with "=" in it that exists is a path."""
    key = argument.partition("=")[0]
    return "=" in argument and "/" not in key and not Path(argument).exists()


def read_keys(
    name: str, verb: Verb, arguments: Sequence[str], positional: int | None
) -> tuple[list[str], dict[str, Any]]:
    """The positional arguments of verb `name` (at most `positional`; None: any number) and its own keys' values.

    Raises UserError on a key that the verb does not have, one given twice, a value of another type, and on
    more positional arguments than it takes.
    """
    known: Mapping[str, Key] = {key.name: key for key in verb.keys}
    plain: list[str] = []
    values: dict[str, Any] = {}
    for argument in arguments:
        if not is_key_value(argument):
            plain.append(argument)
            continue
        from dinoreg.config.keys import nearest
        from dinoreg.config.values import Text, convert

        key, _, text = argument.partition("=")
        if key not in known:
            accepted = f"; accepted: {', '.join(known)}" if known else "; it takes no keys"
            raise UserError(f"{key}: unknown key of dinoreg {name}{nearest(key, known)}{accepted}")
        if key in values:
            raise UserError(f"{key}: given twice")
        values[key] = convert(Text(text), known[key].hint, key, "command line")
    if positional is not None and len(plain) > positional:
        raise UserError(f"{name}: {plain[positional]}: unexpected; usage: dinoreg {verb.usage}")
    return plain, values


def split_keys(names: Sequence[str], arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that give one of the keys `names`, and all others: for verbs that take config keys besides."""
    own = [each for each in arguments if is_key_value(each) and each.partition("=")[0] in names]
    return own, [each for each in arguments if each not in own]


def source_and_overrides(verb: str, arguments: Sequence[str], missing: str, hint: str = "") -> tuple[str, list[str]]:
    """The first argument, which names what to work on, and the key=value after it.

    Raises UserError `VERB: missing …` where it is not there, and on an argument after it that is no key=value;
    `hint` is put behind the latter.
    """
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"{verb}: missing {missing}")
    source, *overrides = arguments
    stray = [argument for argument in overrides if "=" not in argument]
    if stray:
        raise UserError(f"{verb}: {stray[0]}: expected key=value{hint}")
    return source, overrides


# ------------------------------------------------------------------------------------------------------------
# Help


def overview(verbs: Mapping[str, Verb]) -> str:
    """The help of the program: a line for each verb."""
    width = max(map(len, verbs))
    lines = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in verbs.items())
    return (
        "dinoreg: self-supervised pretraining of Vision Transformers with register tokens\n\n"
        f"usage: dinoreg VERB … key=value …\n\n{lines}\n\n"
        "dinoreg VERB --help lists a verb's keys; dinoreg --version prints the version."
    )


def verb_help(name: str, verb: Verb) -> str:
    """The help of one verb: usage, what it does, and every key with type, default and meaning."""
    rows = [(key.name, f"{_type(key.hint)} = {key.default}", key.meaning) for key in verb.keys]
    lines = [f"usage: dinoreg {verb.usage}", "", verb.summary]
    if verb.details:
        lines += ["", verb.details]
    if name == "pretrain":
        from dinoreg.config.bundled import bundled
        from dinoreg.config.keys import describe
        from dinoreg.config.load import Config

        configs = sorted(path.stem for path in bundled("configs").glob("*.yaml"))
        lines += ["", f"CONFIG: {', '.join(configs)}; a YAML file (ours or dinov2's); a run folder"]
        rows = describe(Config)
        at = [key for key, _, _ in rows].index("init")
        kind, meaning = next(row[1:] for row in rows if row[0] == "data.source")
        rows.insert(at, ("data", kind, f"short for data.source: {meaning}"))
    if name == "eval":
        from dinoreg.config.keys import describe
        from dinoreg.evaluation.options import EvalOptions

        rows = describe(EvalOptions)
    if name == "launch":
        from dinoreg.config.keys import describe
        from dinoreg.jobs.job_type import find_job, job_files
        from dinoreg.jobs.options import LaunchOptions

        jobs = [find_job(job) for job in job_files()]
        lines += ["", "JOB, or a .py file of one's own with a JOB; their other keys are those of the command:"]
        lines += [f"  dinoreg launch {job.usage}\n      {job.summary}" for job in jobs]
        lines += ["", "RUN is the folder that a launch names when it has submitted:"]
        lines += ["  dinoreg launch status RUN", "  dinoreg launch logs RUN [job=] [task=0] [lines=40] [follow=false]"]
        lines += ["  dinoreg launch cancel RUN [job=] [save=false]"]
        rows = describe(LaunchOptions)
    if name == "embed":
        from dinoreg.commands.embed import EmbedOptions
        from dinoreg.config.keys import describe

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
