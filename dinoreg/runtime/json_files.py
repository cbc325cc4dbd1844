"""JSON files that a kill may have cut short or somebody may have edited: what cannot be read is left out."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text of a file, "" where it cannot be read; bytes that are no UTF-8 are replaced."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    return _parsed(read_text(path)) or {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; lines that are none are passed over."""
    return [content for line in read_text(path).splitlines() if (content := _parsed(line)) is not None]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 64}} -> {"model.dim": 64}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(value: Any) -> float:
    """A JSON value as a float; NaN when it is not a number ("nan", null, a list)."""
    return float(value) if is_number(value) else math.nan


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
