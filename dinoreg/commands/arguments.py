"""How the arguments of a verb are read, and the help of the program and of each verb.

Nothing here imports torch, so that help and wrong spellings answer at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dinoreg.config.option import Options, describe, read, split_texts
from dinoreg.runtime.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Verb:
    """A command of the program.

    options  the class of the verb's keys
    run      does the work; it is called with what `parse` returns
    read     (arguments) -> what `run` is called with, where it is more than the options; UserError for what is wrong
             with the arguments, and nothing is started
    kinds    {first argument: keys} of a verb that is several
    details  further lines of help, or a function that gives them
    values   (arguments) -> options with the values that help shows instead of the defaults, where these name a config
    flags    the options that start with dashes; all others are written key=value
    """

    usage: str
    summary: str
    options: type[Options]
    run: Callable[..., None]
    read: Callable[[list[str]], tuple[Any, ...]] | None = None
    kinds: Mapping[str, type[Options]] = field(default_factory=dict)
    details: Sequence[str] | Callable[[], Sequence[str]] = ()
    values: Callable[[list[str]], Options] | None = None
    flags: tuple[str, ...] = ()

    def parse(self, arguments: list[str]) -> tuple[Any, ...]:
        """What `run` is called with; UserError in one line for what is wrong with the arguments."""
        return self.read(arguments) if self.read else (read_options(self.options, arguments)[1],)


def is_key_value(argument: str) -> bool:
    """Whether it reads as key=value; a path with "=" in it that exists is a path."""
    key = argument.partition("=")[0]
    return "=" in argument and "/" not in key and not Path(argument).exists()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(plain arguments, those that are key=value)."""
    pairs = [argument for argument in arguments if is_key_value(argument)]
    return [argument for argument in arguments if argument not in pairs], pairs


def read_options(cls: type[T], arguments: Sequence[str], positional: int | None = 0) -> tuple[list[str], T]:
    """The positional arguments (at most `positional`; None: any number) and the options of key=value.

    raises  UserError for more arguments, an unknown key, one given twice, and a value that is not accepted
    """
    plain, pairs = split_arguments(arguments)
    options, _ = read(cls, pairs)
    if positional is not None and len(plain) > positional:
        verb = getattr(cls, "_verb", "")
        raise UserError(f"{verb}: {plain[positional]}: unexpected; see dinoreg {verb} --help")
    return plain, options


def source_and_overrides(
    verb: str, arguments: Sequence[str], missing: str = "CONFIG, a name in configs/ or a YAML file", hint: str = ""
) -> tuple[str, list[str]]:
    """The first argument, which names what to work on, and the key=value after it.

    Raises UserError `VERB: missing …` where it is not there, and on an argument after it that is no key=value;
    `hint` is put behind the latter.
    """
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"{verb}: missing {missing}; see dinoreg {verb} --help")
    source, *overrides = arguments
    stray = [argument for argument in overrides if "=" not in argument]
    if stray:
        raise UserError(f"{verb}: {stray[0]}: expected key=value{hint}")
    return source, overrides


def config_and_options(verb: str, cls: type[T], arguments: Sequence[str]) -> tuple[str, list[str], T]:
    """(CONFIG, its overrides, the verb's own options) of a verb that takes the keys of a config besides its own."""
    own, rest = split_texts(cls, arguments)
    return *source_and_overrides(verb, rest), read_options(cls, own)[1]


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


def verb_help(verb: Verb, arguments: Sequence[str] = ()) -> str:
    """The help of one verb: usage, what it does, and every key with type, default and meaning.

    arguments  what else was typed; where they name a config, its values take the place of the defaults
    """
    lines = [f"usage: dinoreg {verb.usage}", "", verb.summary]
    if details := verb.details() if callable(verb.details) else verb.details:
        lines += ["", *details]
    named = [argument for argument in arguments if not argument.startswith("-")]
    shown = verb.values(named) if verb.values and named and not is_key_value(named[0]) else verb.options
    for kind, options in {"": shown, **verb.kinds}.items():
        if rows := describe(options):
            lines += ["", f"keys of {kind}:" if kind else "keys:", *_table(rows)]
    return "\n".join(lines)


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
