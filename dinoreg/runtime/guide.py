"""The words of each verb, which stand in `templates/guide.ini`: its help, and what to do when it is done."""

import configparser
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


class Verbatim(str):
    """A value that is quoted already."""


def said_of(name: str, what: str) -> list[str]:
    """The lines on a verb: its usage, summary, details or examples; [] where there are none."""
    return _texts().get(name, what, fallback="").strip().splitlines()


def next_commands(name: str, values: Mapping[str, Any], case: str = "") -> list[str]:
    """The commands that follow one, the best first; [] where none does.

    values  of the placeholders in the text, by key; a key without one stands there in capitals
    case    which of several texts, the one without a case where it has none
    """
    known = {key: _quoted(value) for key, value in values.items() if value is not None}
    known.setdefault("reading", "")
    known.setdefault("stem", Path(str(values.get("weights") or values.get("out") or "model")).name.replace(":", "-"))
    lines = said_of(name, f"next {case}" if _texts().has_option(name, f"next {case}") else "next")
    return [line.format_map(_OrCapitals(known)).strip() for line in lines]


def next_lines(name: str, values: Mapping[str, Any], case: str = "") -> list[str]:
    """These commands as they are said: "next: dinoreg …" and "  or: dinoreg …", a line each."""
    return [f"{'  or' if place else 'next'}: {each}" for place, each in enumerate(next_commands(name, values, case))]


def after_training(run: object, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the commands that follow a training.

    run     its folder
    config  values by dotted key; data.source may be `data`
    """
    labelled, data = config.get("probe.data"), config.get("data.source", config.get("data"))
    own = [each for each in (labelled, data) if isinstance(each, str) and each.partition(":")[0] != "scenes"]
    found = {"weights": run, "labelled": labelled if labelled in own else None, "images": own[0] if own else None}
    found["columns"] = repeated(config, {"probe.columns" if labelled in own else "data.columns": "columns"})
    found["format"] = "timm" if config.get("model.channels", "joint") == "joint" else "safetensors"
    return found | {"reading": repeated(config, {"probe.columns": "columns", "probe.root": "own.root"})}


def repeated(values: Mapping[str, Any], keys: Mapping[str, str]) -> Verbatim:
    """The given ones of `keys` as the next command needs them again: {their key here: their key there}."""
    return Verbatim(" ".join(f"{there}={_quoted(values[here])}" for here, there in keys.items() if values.get(here)))


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
