"""Values as a config declares them: what YAML or the command line gave becomes the type that the key has."""

from __future__ import annotations

import csv
import math
import types
import typing
from pathlib import PurePath
from typing import Any

from omegaconf import OmegaConf

from dinoreg.runtime.errors import UserError


class Text(str):
    """The text behind `key=` on the command line, to be read as the key's type asks."""


class _WrongType(Exception):
    pass


def convert(value: Any, hint: Any, key: str, where: str) -> Any:
    """`value` as the type that the key declares; text of the command line is read as that type."""
    shown = value
    try:
        if isinstance(value, Text):
            value = _read_text(str(value), hint)
        return _coerce(value, hint)
    except _WrongType:
        shown = list(shown) if isinstance(shown, tuple) else "none" if shown is None else shown
        raise UserError(f"{key}={shown}: expected {_words(hint)} ({where})") from None


def _read_text(text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    if type(None) in kinds and text.lower() in ("none", "null", "~"):
        return None
    if text == "":
        raise _WrongType
    if str in kinds:  # a path or a name stays the text it is, whatever YAML would make of it
        takes_list = any(typing.get_origin(kind) is list for kind in kinds)
        if takes_list and text.startswith("[") and text.endswith("]"):
            return next(csv.reader([text[1:-1]], skipinitialspace=True), [])
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except Exception:  # whatever YAML and OmegaConf object to, it is not a value of this type
        raise _WrongType from None


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint`; 3 passes for 3.0 and 1e4 for 10000, but no text and no truth value for a number."""
    kinds = _kinds(hint)
    if value is None or (type(None) in kinds and isinstance(value, str) and value.lower() == "none"):
        if type(None) in kinds:
            return None
        raise _WrongType
    for kind in kinds:
        if typing.get_origin(kind) in (tuple, list):
            inner = typing.get_args(kind)
            any_length = typing.get_origin(kind) is list or inner[-1] is Ellipsis
            if any_length and _is_number(value):
                value = [value]
            if isinstance(value, (list, tuple)) and (any_length or len(value) == len(inner)):
                hints = [inner[0]] * len(value) if any_length else inner
                items = [_coerce(item, each) for item, each in zip(value, hints)]
                return tuple(items) if typing.get_origin(kind) is tuple else items
        elif kind is bool and isinstance(value, bool):
            return value
        elif kind is str and isinstance(value, (str, PurePath)):
            return str(value)
        elif kind in (int, float) and _is_number(value) and (kind is float or float(value).is_integer()):
            return kind(value)
    raise _WrongType


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    words = []
    for kind in _kinds(hint):
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is tuple and inner[-1] is not Ellipsis:
            words.append(f"{len(inner)} numbers, like [{', '.join('ab'[: len(inner)])}]")
        elif inner:
            words.append("a list of numbers" if inner[0] is float else "a list of texts")
        else:
            words.append(names[kind])
    return " or ".join(words)
