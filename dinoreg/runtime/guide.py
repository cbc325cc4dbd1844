"""The words of each verb, which stand in `templates/guide.ini`: its help, and what to do when it is done."""

import configparser
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


def said_of(name: str, what: str) -> list[str]:
    """The lines on a verb: its usage, summary, details or examples; [] where there are none."""
    return _texts().get(name, what, fallback="").strip().splitlines()


def next_commands(name: str, values: Mapping[str, Any], case: str = "") -> list[str]:
    """The commands that follow one, the best first; [] where none does.

    values  of the placeholders in the text, by key; a key without one stands there in capitals
    case    which of several texts, the one without a case where it has none
    """
    known = {key: _quoted(value) for key, value in values.items() if value is not None}
    known.setdefault("stem", Path(str(values.get("weights") or values.get("out") or "model")).name.replace(":", "-"))
    lines = said_of(name, f"next {case}" if _texts().has_option(name, f"next {case}") else "next")
    return [line.format_map(_OrCapitals(known)).strip() for line in lines]


def next_lines(name: str, values: Mapping[str, Any], case: str = "") -> list[str]:
    """These commands as they are said: "next: dinoreg …" and "  or: dinoreg …", a line each."""
    return [f"{'  or' if place else 'next'}: {each}" for place, each in enumerate(next_commands(name, values, case))]


def after_training(run: object, labelled: Any, data: Any) -> dict[str, Any]:
    """The values of the commands that follow a training.

    run       its folder
    labelled  its probe.data
    data      its data.source
    """
    own = [each for each in (labelled, data) if isinstance(each, str) and each.partition(":")[0] != "scenes"]
    return {"weights": run, "labelled": labelled if labelled in own else None, "images": own[0] if own else None}


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
