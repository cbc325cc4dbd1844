"""A verb, the usual ways to write its arguments, their parsing, and what of them is refused before torch is imported.

Nothing here imports torch, which takes seconds: help and messages about wrong arguments appear at once.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dinoreg.config.load import Config
from dinoreg.config.option import Declaration, Options, declarations, flat, read, split_texts
from dinoreg.config.overwrite import check_out
from dinoreg.models.registry import parse_name
from dinoreg.runtime.errors import UserError, one_line
from dinoreg.weights.names import not_there, random_name

T = TypeVar("T")
VERB_NAMES = {"train": "pretrain", "evaluate": "eval", "plot": "view"}
_MAPPED = re.compile(r"(?:([\w.]+)=)?(.+\.(?:csv|tsv|parquet)):((?:path|label|split)=.+)", re.IGNORECASE)
_DASHES = re.compile(r"[-\u2013\u2014]+(?=[^\W\d])")  # a text processor makes one of two
_POINTER = re.compile(r"[/\\](best|last)$")  # of a run, which is no file of it
_ELSEWHERE = ("WORLD_SIZE", "SLURM_PROCID")  # another process may have begun with the folder already


@dataclass(frozen=True)
class Verb:
    """A command of the program.

    name     as it is typed
    options  the class of the verb's keys
    run      does the work; it is called with the result of `parse`
    read     (arguments) -> arguments of `run`, where these are more than the options; UserError for wrong arguments
    kinds    {first argument: keys} of a verb with several forms
    lines    further lines of help
    values   (arguments) -> the options whose values help shows in place of the defaults, where a config is given
    flags    options that start with dashes; all others are written key=value
    also     a class whose keys it takes, too
    words    how many arguments without "=" it has itself
    path     the key that a path behind these stands for
    """

    name: str
    options: type[Options]
    run: Callable[..., None]
    read: Callable[[list[str]], tuple[Any, ...]] | None = None
    kinds: Mapping[str, type[Options]] = field(default_factory=dict)
    lines: Callable[[], Sequence[str]] = tuple
    values: Callable[[list[str]], Options] | None = None
    flags: tuple[str, ...] = ()
    also: type[Options] | None = None
    words: int = 0
    path: str = ""

    def parse(self, arguments: list[str]) -> tuple[Any, ...]:
        """The arguments of `run`; UserError, in one line, for wrong arguments."""
        return self.read(arguments) if self.read else (read_options(self.options, arguments)[1],)

    def keys(self) -> dict[str, tuple[Any, Declaration]]:
        """Every dotted key, of all its forms, with its type and declaration."""
        classes = (self.options, *self.kinds.values(), *((self.also,) if self.also else ()))
        return {key: found for cls in classes for key, found in declarations(cls).items()}


# ------------------------------------------------------------------------------------------------------------
# Spelling


def canonical(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """The arguments of a verb in the one form that is parsed: words, flags, then key=value.

    Accepted are --key value, --key=value, --some-key, key = value, key= value, a yes-or-no key alone, a path behind
    the verb's words, which stands for its `path` key, and columns behind a table, as TABLE:path=NAME,label=NAME.
    """
    rest, switches = _with_columns(verb, arguments), {key for key, (hint, _) in verb.keys().items() if hint is bool}
    words: list[str] = []
    pairs: list[str] = []
    while rest:
        word = rest.pop(0)
        dashes = _DASHES.match(word)
        name, equals, value = word[dashes.end() :].partition("=") if dashes else word.partition("=")
        joins = rest and (not value and not is_key_value(rest[0]) if equals else rest[0].startswith("="))
        if word in verb.flags:
            pairs.append(word)
        elif dashes:
            name = name.replace("-", "_")
            is_switch = name in switches and not (rest and rest[0].lower() in ("true", "false"))
            has_value = rest and not is_switch and not is_key_value(rest[0]) and not _DASHES.match(rest[0])
            pairs.append(f"{name}={value if equals else rest.pop(0) if has_value else 'true'}")
        elif joins:  # key = value, key= value
            rest[0] = f"{word}{rest[0]}"
        elif is_key_value(word):
            pairs.append(word)
        elif word in switches:
            pairs.append(f"{word}=true")
        else:
            words.append(word)
    return _with_paths(verb, words) + pairs


def _with_columns(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """The arguments, columns that stand behind a table under the key that names them."""
    apart, keys = list(arguments), verb.keys()
    for place, argument in enumerate(arguments):
        if mapped := _MAPPED.fullmatch(argument):
            key, table, names = mapped.groups()
            section = (key or verb.path).rpartition(".")[0] or "data"
            columns = "columns" if "columns" in keys else f"{section}.columns"
            if columns in keys:
                apart[place] = f"{key}={table}" if key else table
                apart.append(f"{columns}=" + re.sub("(^|,)(path|label|split)=", r"\1\2:", names))
    return apart


def _with_paths(verb: Verb, words: list[str]) -> list[str]:
    """The words, those that are paths behind the verb's own as key=value."""
    own, paths = words[: verb.words], words[verb.words :]
    if not verb.path or not paths or own == ["crops"] or (own and not all(Path(path).exists() for path in paths)):
        return words
    return [*own, f"{verb.path}={','.join(paths)}"]


def corrected(error: BaseException, arguments: Sequence[str]) -> str:
    """The text of an error; where it asks "did you mean …?", with the whole command in which that stands instead."""
    text = one_line(error)
    meant = re.search(r"did you mean '?([^\s?']+)'?\?", text)
    if meant is None:
        return text
    before, found = text[: meant.start()], []
    for place, word in enumerate(arguments):
        for part in filter(None, re.split("[=,]", word)) if place or "unknown verb" in before else ():
            if stands := re.search(rf"(?<![\w./]){re.escape(part)}(?![\w./])", before):
                new = word.replace(part, meant[1], 1)
                found.append((stands.start(), [*arguments[:place], new, *arguments[place + 1 :]]))
    # A value stands behind its key.
    return f"{text} Write: {shlex.join(['dinoreg', *max(found)[1]])}" if found else text


# ------------------------------------------------------------------------------------------------------------
# Parsing


def is_key_value(argument: str) -> bool:
    """Whether an argument has the form key=value; an existing path with "=" in it does not count."""
    key = argument.partition("=")[0]
    return "=" in argument and "/" not in key and not Path(argument).exists()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into positional ones and those of the form key=value."""
    pairs = [argument for argument in arguments if is_key_value(argument)]
    return [argument for argument in arguments if argument not in pairs], pairs


def read_options(cls: type[T], arguments: Sequence[str], positional: int | None = 0) -> tuple[list[str], T]:
    """The positional arguments (at most `positional`; None: any number) and the options from key=value.

    raises  UserError for more arguments, an unknown key, one given twice, and a value that is not accepted
    """
    plain, pairs = split_arguments(arguments)
    options, _ = read(cls, pairs)
    if positional is not None and len(plain) > positional:
        raise UserError(f"{plain[positional]}: unexpected; expected key=value")
    return plain, options


def source_and_overrides(
    verb: str, arguments: Sequence[str], missing: str = "CONFIG, a name in configs/ or a YAML file", hint: str = ""
) -> tuple[str, list[str]]:
    """The first, positional argument, and the key=value arguments after it.

    missing  a description of the first argument, for the message where it is missing
    hint     end of the message about another positional argument
    raises   UserError where the first argument is missing, and for another positional argument
    """
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"{verb}: missing {missing}; see dinoreg {verb} --help")
    source, *overrides = arguments
    stray = [argument for argument in overrides if "=" not in argument]
    if stray:
        raise UserError(f"{verb}: {stray[0]}: expected key=value{hint}")
    return source, overrides


def config_and_options(verb: str, cls: type[T], arguments: Sequence[str]) -> tuple[str, list[str], T]:
    """(CONFIG, its overrides, the verb's own options) of a verb that accepts the keys of a config, too.

    cls     the class of the verb's own options
    raises  UserError for wrong arguments
    """
    own, rest = split_texts(cls, arguments)
    return *source_and_overrides(verb, rest), read_options(cls, own)[1]


# ------------------------------------------------------------------------------------------------------------
# Early refusals


def check_early(parsed: tuple[Any, ...]) -> None:
    """UserError, in the words of what would refuse it later, for sources, weights and folders among parsed arguments.

    parsed  arguments of a verb's function, of which `given_by` takes the values
    """
    alone = not any(name in os.environ for name in _ELSEWHERE)  # else the processes agree first, and one speaks
    for each in parsed if alone else ():
        given = given_by(each)
        for key in ("data", "images", "data.source"):
            if isinstance(given.get(key), (str, os.PathLike, list, tuple)):  # `images` may also be a number of them
                from dinoreg.data.open import check_source

                check_source(given[key], key.partition(".")[0])
        for key in ("weights", "init", "distill", "public"):
            check_weights(given.get(key) or ())
        if isinstance(each, Config) and each.out:
            check_out(each, Path(each.out))


def given_by(parsed: Any) -> Mapping[str, Any]:
    """The values by key of a class of options, of what has `.options`, or a mapping; {} of anything else."""
    options = getattr(parsed, "options", parsed)
    return flat(options) if isinstance(options, Options) else options if isinstance(options, Mapping) else {}


def check_weights(weights: Any) -> None:
    """UserError for what is neither a path nor random:NAME or timm:NAME; several stand in a tuple or with commas."""
    if not isinstance(weights, str):
        for each in weights:
            check_weights(each)
    elif (name := random_name(weights)) is not None and "," not in name:
        parse_name(name)
    elif "," in weights and not os.path.exists(weights):
        check_weights(weights.split(","))
    elif not (weights.startswith("timm:") or os.path.exists(_POINTER.sub("", weights))):
        raise not_there(weights)
