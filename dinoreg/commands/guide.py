"""The words of each verb, which stand in `templates/guide.ini`: its help, and what to do when it is done."""

import configparser
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dinoreg.config.option import Options, flat


def said_of(name: str, what: str) -> list[str]:
    """The lines on a verb: its usage, summary, details or examples; [] where there are none."""
    return _texts().get(name, what, fallback="").strip().splitlines()


def next_line(name: str, values: Options | Mapping[str, Any], case: str = "") -> str:
    """ "next: …" with the commands that follow one; "" where nothing does.

    values  of the placeholders in the text, by key; a key without one stands there in capitals
    case    which of several texts
    """
    given = flat(values) if isinstance(values, Options) else values
    known = {key: _quoted(value) for key, value in given.items() if value not in (None, "")}
    known.setdefault("stem", Path(str(given.get("weights") or given.get("out") or "model")).name.replace(":", "-"))
    text = _texts().get(name, f"next {case}".strip(), fallback="").strip().replace("\n", "; ")
    return text and "next: " + text.format_map(_OrCapitals(known))


class Verbatim(str):
    """A value that is quoted already."""


class _OrCapitals(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return key.upper()


def _quoted(value: Any) -> str:
    if isinstance(value, Verbatim):
        return value
    return shlex.quote(",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


@cache
def _texts() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    found.read(Path(__file__).with_name("templates") / "guide.ini", encoding="utf-8")
    return found
