"""Dotted keys over frozen dataclasses: reading, checking and describing the options of a verb.

A dataclass declares every key once: its name, type, default, and the comment behind it as its help text. A field
whose default factory is a dataclass is a section. Unknown keys are refused with the nearest spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import tokenize
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from dinoreg.config.values import Text, convert
from dinoreg.runtime.errors import UserError


def nested(overrides: Mapping[str, Any] | Iterable[str], short: Mapping[str, str] | None = None) -> dict[str, Any]:
    """{"optim.lr": 1} or ["optim.lr=1"] as {"optim": {"lr": 1}}; `short` names whole keys by shorter ones."""
    if not isinstance(overrides, Mapping):
        pairs: dict[str, Any] = {}
        for item in overrides:
            key, separator, value = item.partition("=")
            if not separator or not key:
                raise UserError(f"{item}: expected key=value")
            if key in pairs:
                raise UserError(f"{key}: given twice")
            pairs[key] = Text(value)
        overrides = pairs
    result: dict[str, Any] = {}
    for key, value in overrides.items():
        if not isinstance(value, Mapping):
            key = (short or {}).get(key, key)
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise UserError(f"{key}: {parent} is a value already, not a section")
            node = child
        if isinstance(value, Mapping) and isinstance(node.get(leaf), dict):
            node[leaf].update(value)
        else:
            node[leaf] = dict(value) if isinstance(value, Mapping) else value
    refuse_interpolation(result, "command line")
    return result


def refuse_interpolation(node: Any, where: str) -> None:
    # A config is data: it may not read the environment or other keys.
    if isinstance(node, dict):
        for value in node.values():
            refuse_interpolation(value, where)
    elif isinstance(node, list):
        for value in node:
            refuse_interpolation(value, where)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"{where}: {node}: ${{…}} is not allowed in a config")


def flatten(
    layer: Mapping[str, Any], cls: type, where: str, prefix: str = "", root: type | None = None
) -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1.0}: keys of `cls`, values of the declared types.

    where  the values come from, for messages     root  the class whose keys are offered as nearest spellings
    """
    root = root or cls
    hints = typing.get_type_hints(cls)
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if key not in hints:
            if isinstance(value, Mapping) and value:  # name the key itself, not just its section
                name = f"{name}.{next(iter(value))}"
            everywhere = [path for path, _, _ in describe(root)]
            hint = nearest(name, everywhere) or nearest(str(key), everywhere)
            raise UserError(f"{name}: unknown key ({where}){hint}")
        section = hints[key] if dataclasses.is_dataclass(hints[key]) else None
        if section is None:
            if isinstance(value, Mapping):
                raise UserError(f"{name}: is a value, not a section ({where})")
            flat[name] = convert(value, hints[key], name, where)
        elif isinstance(value, Mapping):
            flat.update(flatten(value, section, where, f"{name}.", root))
        else:
            raise UserError(f"{name}={value}: expected keys below it, such as {_first_key(section, name)} ({where})")
    return flat


def _first_key(section: type, prefix: str) -> str:
    return f"{prefix}.{dataclasses.fields(section)[0].name}"


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass of flat, dotted values; keys that are not given keep their defaults."""
    arguments = {}
    for key, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            arguments[key] = build(typing.cast(type, hint), values, f"{prefix}{key}.")
        elif f"{prefix}{key}" in values:
            arguments[key] = values[f"{prefix}{key}"]
    return cls(**arguments)


def nearest(key: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for the closest of `known`, or nothing where none is close."""
    known = list(known)
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not matches:  # a right name in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        leaves = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
        matches = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f"; did you mean {matches[0]}?" if matches else ""


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every dotted key with its type and default and its comment: (key, "type = default", meaning)."""
    comments = _comments(cls)
    rows = []
    for item in dataclasses.fields(cls):
        section = item.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            rows += describe(section, f"{prefix}{item.name}.")
        else:
            kind = str(item.type).replace("None", "none")
            rows.append((f"{prefix}{item.name}", f"{kind} = {_shown(item.default)}", comments.get(item.name, "")))
    return rows


def _shown(default: Any) -> str:
    """A default as one would type it."""
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return "[" + ", ".join(f"{item:.4g}" for item in default) + "]"
    return str(default)


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field: the one place an option is explained."""
    found: dict[str, str] = {}
    name = ""
    start_of_line = True
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.NAME and start_of_line:
            name = token.string
        if token.type == tokenize.COMMENT and name:
            found.setdefault(name, token.string.lstrip("# "))
        start_of_line = token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    return found


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
