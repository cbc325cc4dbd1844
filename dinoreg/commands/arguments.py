"""A verb, and the parsing of its arguments.

Nothing here imports torch, so that help and messages about wrong arguments appear at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dinoreg.config.option import Declaration, Options, declarations, read, split_texts
from dinoreg.runtime.errors import UserError

T = TypeVar("T")


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
        verb = getattr(cls, "_verb", "")
        raise UserError(f"{verb}: {plain[positional]}: unexpected; see dinoreg {verb} --help")
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
