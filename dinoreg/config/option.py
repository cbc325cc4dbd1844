"""Declaring options: each is a field of a frozen dataclass, from which parsing, checks, messages and help follow.

`lr: float | None = option(None, "peak rate, used as given", low=0)` gives a key its type, default, help and range.
`section(OptimConfig)` declares a field that holds further options, with dotted keys (`optim.lr`). From the
declarations come the parsing of `key=value` and of YAML, the checks, the messages with the nearest spelling, and
`--help`, for configs, verbs, evaluations, jobs and datasets alike. Nothing here imports torch: help answers at once.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import inspect
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import PurePath
from typing import Any, ClassVar, TypeVar

from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import flatten, is_number
from dinoreg.runtime.printable import enumerated, shortened

# What other programs call the same; of each group a key that is known here is meant.
_SYNONYMS = [
    *("data images source dataset data_dir data_path path folder input", "lr learning_rate", "weight_decay wd"),
    *("weights checkpoint ckpt model pretrained init", "out output output_dir save_dir outdir", "batch_size batch bs"),
    *("workers num_workers threads", "steps max_steps num_steps iterations", "epochs num_epochs max_epochs"),
    "global_size crop_size img_size image_size imgsz size",
]
LARGEST = 1e12  # of any whole number without an upper bound of its own: no count is meant to be larger
MAX_LISTED = 12  # a class with more keys than this does not list them all in a message
REQUIRED: Any = dataclasses.MISSING  # instead of the default of an option that must be given
T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------
# Declaring


@dataclass(frozen=True)
class Declaration:
    """The properties of an option besides its name, type and default; made by `option`.

    help           its meaning, for --help
    low, high      inclusive bounds; of a list or tuple they hold for every element, as choices do
    above, below   exclusive bounds
    unit           of a number, in the singular: "pixel"
    choices        the accepted texts
    ascending      a pair [low, high] must be in order
    empty          whether a list may have no elements; `option` sets False where the default is a tuple
    pattern        a regular expression that the full text must match, ignoring case
    fits           what an accepted value, as a whole, makes true, in `expected` words; none fits always
    expected       the accepted values in words, where the other properties do not say it
    shapes_result  whether a run's weights, or an evaluation's numbers, depend on it; None: as declared for its section
    """

    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    ascending: bool = False
    empty: bool = False
    pattern: str = ""
    fits: Callable[[Any], bool] | None = None
    expected: str = ""
    shapes_result: bool | None = None

    def allows(self, value: Any) -> bool:
        """Whether a value of the declared type is in the range, or among the choices. None is always allowed."""
        if isinstance(value, (list, tuple)):
            in_order = not self.ascending or list(value) == sorted(value)
            return in_order and (self.empty or len(value) > 0) and all(self.allows(item) for item in value)
        if value is None or isinstance(value, bool):
            return True
        if isinstance(value, str):
            fits = not self.pattern or re.fullmatch(self.pattern, value, re.IGNORECASE) is not None
            return fits and (not self.choices or value in self.choices)
        bounds = (self.low, operator.ge), (self.high, operator.le), (self.above, operator.gt), (self.below, operator.lt)
        if not is_number(value) or (isinstance(value, int) and abs(value) > LARGEST and self.high is None):
            return False
        return all(bound is None or holds(value, bound) for bound, holds in bounds)

    def accepted(self, value: Any = None) -> str:
        """The range or the choices in words, "" without any; for a list or tuple `value`, those of its elements."""
        words = self.expected or enumerated(self.choices, "or") or self._range()
        if isinstance(value, (list, tuple)) and self.fits is None:
            start = "[low, high]" if self.ascending else "" if value or self.empty else "one or more"
            return ", ".join(filter(None, (start, words and f"each {words}")))
        return words

    def _range(self) -> str:
        lower = f"[{self.low}" if self.low is not None else f"({self.above}" if self.above is not None else ""
        upper = f"{self.high}]" if self.high is not None else f"{self.below})" if self.below is not None else ""
        number = f"number of {self.unit}s" if self.unit else "number"
        if lower and upper:
            return f"a {number} in {lower}, {upper}"
        if self.above is not None:
            return f"a {number} above {self.above}" if self.above else f"a positive {number}"
        for words, bound in ("at least", self.low), ("at most", self.high), ("less than", self.below):
            if bound is not None:
                return f"{words} {bound}" + (f" {self.unit}{'' if bound == 1 else 's'}" if self.unit else "")
        return f"{self.unit}s" if self.unit else ""

    def check(self, key: str, value: Any, or_none: bool = False) -> None:
        """UserError, naming key, value and accepted values, unless `value` is allowed; `or_none` adds none to these."""
        if type(value) is int and abs(value) > LARGEST and self.high is None:
            check(False, key, value, f"at most {LARGEST:g} in size")
        if not self.allows(value) or (self.fits is not None and value is not None and not self.fits(value)):
            close = nearest(str(value), self.choices) if self.choices else ""
            check(False, key, value, f"{self.accepted(value)}{', or none' if or_none else ''}{close}")


def option(default: Any, help: str, **declared: Any) -> Any:
    """A field of a class of `Options`; the keywords are those of `Declaration`."""
    declared.setdefault("empty", not isinstance(default, tuple))
    return dataclasses.field(default=default, metadata={"option": Declaration(help, **declared)})


def fraction(default: Any, help: str, **declared: Any) -> Any:
    """A share or a probability, in [0, 1]."""
    return option(default, help, low=0, high=1, **declared)


def output(default: Any, help: str, **declared: Any) -> Any:
    """A path that is written to: one that shells and disks of all kinds take."""
    expected = "a path without control characters, its names of at most 200 bytes"
    return option(default, help, fits=_can_be_written, expected=expected, **declared)


def _can_be_written(path: str) -> bool:
    return path.isprintable() and len(path) <= 1000 and max(map(len, path.encode().split(b"/"))) <= 200


def section(cls: type[Options], shapes_result: bool = True) -> Any:
    """A field that holds the options of another class, each under the field's name and a dot."""
    return dataclasses.field(default_factory=cls, metadata={"shapes_result": shapes_result})


class Options:
    """Base of the frozen dataclasses of options: constructing one raises UserError for values that are not accepted.

    class ModelConfig(Options, section="model")   messages call a key model.KEY
    """

    _section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "") -> None:
        super().__init_subclass__()
        if section:
            cls._section = f"{section}."

    def __post_init__(self) -> None:
        """Check each option on its own, then what relates them."""
        cls: Any = type(self)
        for item in dataclasses.fields(cls):
            if "option" in item.metadata:
                or_none = type(None) in _kinds(_hints(cls)[item.name])
                item.metadata["option"].check(f"{self._section}{item.name}", getattr(self, item.name), or_none)
        self._check_relations()

    def _check_relations(self) -> None:
        """Subclasses check relations between options here, with `check`."""


def check(condition: bool, key: str, value: object, expected: str) -> None:
    """UserError `KEY=VALUE: expected …` unless the condition holds; for conditions that relate options."""
    if not condition:
        shown = f"{value:g}" if isinstance(value, float) else _typed(value)
        raise UserError(f"{key}={shortened(shown, 200)}: expected {expected}")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _walk(cls: Any, prefix: str = "", shapes: bool = True) -> Iterator[tuple[str, Any, dataclasses.Field, bool]]:
    """(dotted key, type, field, whether a result depends on it) of every option, in the order of declaration."""
    for item in dataclasses.fields(cls):
        key, hint, declared = f"{prefix}{item.name}", _hints(cls)[item.name], item.metadata.get("option")
        if declared is None:
            yield from _walk(hint, f"{key}.", item.metadata["shapes_result"])
        else:
            yield key, hint, item, shapes if declared.shapes_result is None else declared.shapes_result


def keys_of(cls: Any) -> dict[str, Any]:
    """Every dotted key of a class of options with its type, in the order of their declaration."""
    return {key: hint for key, hint, _, _ in _walk(cls)}


def declarations(cls: Any) -> dict[str, tuple[Any, Declaration]]:
    """Every dotted key of a class of options with its type and what it was declared with."""
    return {key: (hint, item.metadata["option"]) for key, hint, item, _ in _walk(cls)}


def flat(options: Any, shaping: bool = False) -> dict[str, Any]:
    """{"optim.lr": 0.004, …}: every value by its dotted key; `shaping`: only those that the result depends on."""
    found = ((key, shapes) for key, _, _, shapes in _walk(type(options)))
    return {key: operator.attrgetter(key)(options) for key, shapes in found if shapes or not shaping}


# ------------------------------------------------------------------------------------------------------------
# Reading


class Text(str):
    """The text behind `key=` on the command line, not yet converted to the key's type."""


def read(cls: type[T], overrides: Mapping[str, Any] | Iterable[str]) -> tuple[T, frozenset[str]]:
    """(options, dotted keys that were given) from `key=value` texts, or from a mapping.

    raises  UserError for an unknown key, naming the nearest, a value of the wrong type or one that is not accepted
    """
    values = typed(dotted(overrides), cls)
    return build(cls, values), frozenset(values)


def split_texts(cls: type, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split `key=value` texts into those whose key `cls` has, and all others."""
    parts: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        parts[text.partition("=")[0] not in keys_of(cls)].append(text)
    return parts


def dotted(values: Mapping[str, Any] | Iterable[str], where: str = "command line") -> dict[str, Any]:
    """{"optim": {"lr": 1}} or ["optim.lr=1"] as {"optim.lr": 1}.

    raises  UserError for a text without key or value, a key given twice, and ${…}: a config is data, it may not read
            the environment or other keys
    """
    if not isinstance(values, Mapping):
        given: dict[str, Any] = {}
        for text in values:
            key, separator, value = text.partition("=")
            if not separator or not key:
                raise UserError(f"{shortened(text)}: expected key=value")
            if key in given:
                raise UserError(f"{key}: given twice{'' if where == 'command line' else f' ({where})'}")
            given[key] = Text(value)
        values = given
    by_key = flatten(values)
    for value in by_key.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, str) and "${" in item:
                raise UserError(f"{where}: {shortened(item)}: ${{…}} is not allowed in a config")
    return by_key


def typed(values: Mapping[str, Any], cls: type, where: str = "command line") -> dict[str, Any]:
    """The values of dotted keys, converted to the types that `cls` declares.

    where   the origin of the values, for messages
    raises  UserError for an unknown key, naming the nearest, a section given a value or a value of the wrong type
    """
    known = keys_of(cls)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        parent = name.rpartition(".")[0]
        below = next((key for key in known if key.startswith(f"{name}.")), None)
        if name in known:
            if isinstance(value, Mapping):
                raise UserError(f"{name}: is a value, not a section ({where})")
            converted[name] = convert(value, known[name], name, where)
        elif parent in known:
            raise UserError(f"{parent}: is a value, not a section ({where})")
        elif below is None:
            hint = _synonym(name, known) or nearest(name, known) or nearest(name.rpartition(".")[2], known)
            shown = known if len(known) <= MAX_LISTED else dict.fromkeys(key.partition(".")[0] for key in known)
            accepted = f"; accepted: {', '.join(shown)}" if known else "; it takes no keys"
            accepted = "" if hint and len(known) > MAX_LISTED else accepted
            raise UserError(f"{shortened(name)}: unknown key ({where}){hint}{accepted}")
        elif value != {}:
            raise UserError(f"{shortened(name)}={shortened(value)}: expected keys below it, such as {below} ({where})")
    return converted


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """An instance of `cls`, and of its sections, from values by dotted key; other keys keep their defaults.

    prefix  of the keys, of a section: "optim."
    raises  UserError for a required key that is not given, and for a value that is not accepted
    """
    declared: Any = cls
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(declared):
        name = f"{prefix}{item.name}"
        if "option" not in item.metadata:
            arguments[item.name] = build(_hints(declared)[item.name], values, f"{name}.")
        elif name in values:
            arguments[item.name] = values[name]
        elif item.default is REQUIRED:
            raise UserError(f"{name}= is missing: {item.metadata['option'].help}")
    return cls(**arguments)


def read_value(key: str, value: Any, field: dataclasses.Field) -> Any:
    """The value of an option outside a class, converted to the type of its default; UserError unless accepted."""
    converted = convert(value, type(field.default), key, "options")
    field.metadata["option"].check(key, converted)
    return converted


class _WrongType(Exception):
    pass


def convert(value: Any, hint: Any, key: str, where: str) -> Any:
    """`value` converted to the type `hint`; a `Text` from the command line is parsed, other values only checked.

    key, where  name and origin of the value, for messages
    raises      UserError for a value of another type
    """
    try:
        return _coerce(_read_text(str(value), hint) if isinstance(value, Text) else value, hint)
    except _WrongType:
        raise UserError(f"{key}={shortened(_typed(value), 200)}: expected {_type_words(hint)} ({where})") from None


def _read_text(text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    if type(None) in kinds and text.lower() in ("none", "null", "~"):
        return None
    if text == "":
        raise _WrongType
    if any(typing.get_origin(kind) is list and str in typing.get_args(kind) for kind in kinds):
        if text.startswith("[") and text.endswith("]"):
            return _split_list(text[1:-1])
        if str not in kinds:  # names, unlike paths, hold no commas
            return _split_list(text)
        parts = _split_list(text)
        if len(parts) > 1 and not os.path.exists(text) and all(os.path.exists(os.path.expanduser(p)) for p in parts):
            return parts
    if str in kinds:  # a path or a name stays the text it is, whatever YAML would make of it
        return text
    if "," in text and text[0] not in "[{":
        text = f"[{text}]"
    from omegaconf import OmegaConf  # here, so that help does not wait for it

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except Exception:  # whatever YAML and OmegaConf object to, it is not a value of this type
        raise _WrongType from None


def _split_list(text: str) -> list[str]:
    """The elements of `a, b, "c, d"`; an element with commas stands in double or single quotes."""
    quote = "'" if re.search(r"(^|,)\s*'", text) else '"'
    return next(csv.reader([text], skipinitialspace=True, quotechar=quote), [])


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint`: 3 is accepted as 3.0 and 1e4 as 10000, but neither text nor a bool as a number.

    A single value stands for a list of one.
    """
    kinds = _kinds(hint)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    for kind in kinds:
        if typing.get_origin(kind) in (tuple, list):
            inner = typing.get_args(kind)
            any_length = typing.get_origin(kind) is list or inner[-1] is Ellipsis
            if any_length and (is_number(value) or (inner[0] is str and isinstance(value, str) and str not in kinds)):
                value = [value]
            if isinstance(value, (list, tuple)) and (any_length or len(value) == len(inner)):
                items = (_coerce(item, each) for item, each in zip(value, repeat(inner[0]) if any_length else inner))
                return typing.get_origin(kind)(items)
        elif kind is bool and isinstance(value, bool):
            return value
        elif kind is str and isinstance(value, (str, PurePath)):
            return str(value)
        elif kind in (int, float) and is_number(value) and (kind is float or float(value).is_integer()):
            return kind(value)
    raise _WrongType


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


# ------------------------------------------------------------------------------------------------------------
# Words


def nearest(key: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for the closest of `known`, or nothing where none is close."""
    known = list(known)
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not matches:  # a right name in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        leaves = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
        matches = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f"; did you mean {matches[0]}?" if matches else ""


def _synonym(name: str, known: Iterable[str]) -> str:
    """As `nearest`, for a key that another program has for one of `known`."""
    leaf = name.lower().replace("-", "_").rpartition(".")[2]
    same = next((group.split() for group in _SYNONYMS if leaf in group.split()), [])
    leaves = {key.rpartition(".")[2]: key for key in reversed(list(known))}
    found = next((leaves[word] for word in same if word in leaves), "")
    return f"; did you mean {found}?" if found else ""


def describe(options: Any) -> list[tuple[str, str, str]]:
    """Rows of help, (key, "type = value", meaning), of a class of options with its defaults, or of an instance.

    The meaning ends with the accepted values in parentheses.
    """
    cls, values = (options, {}) if isinstance(options, type) else (type(options), flat(options))
    written = inspect.formatannotation
    return [_row(key, written(hint), item, values.get(key, item.default)) for key, hint, item, _ in _walk(cls)]


def describe_fields(fields: Mapping[str, dataclasses.Field], prefix: str = "") -> list[tuple[str, str, str]]:
    """The rows of `describe` for options outside a class, by name; `prefix` is put before each name."""
    return [_row(f"{prefix}{name}", type(item.default).__name__, item, item.default) for name, item in fields.items()]


def _row(key: str, kind: str, item: dataclasses.Field, value: Any) -> tuple[str, str, str]:
    declared = item.metadata["option"]
    accepted = declared.accepted(item.default)
    shown = ", required" if value is REQUIRED else f" = {_typed(value)}"
    return key, f"{kind.replace('None', 'none')}{shown}", f"{declared.help} ({accepted})" if accepted else declared.help


def _typed(value: Any) -> str:
    """A value as one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value) + "]"
    return str(value)


def _type_words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    words = []
    for kind in _kinds(hint):
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is tuple and inner[-1] is not Ellipsis:
            words.append(f"{len(inner)} numbers, like [{', '.join('ab'[: len(inner)])}]")
        elif inner:
            words.append("a list of texts" if inner[0] is str else "a list of numbers")
        else:
            words.append(names[kind])
    return " or ".join(words)
