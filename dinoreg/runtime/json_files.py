"""Reading JSON files that may be cut short or edited: unreadable content is left out, without an error."""

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.runtime.regular_files import open_regular

STEP_NAME = re.compile(r"step_([0-9]+)")  # of a checkpoint and its teacher file
_MAX_BYTES = 1 << 30


def read_text(path: Path, most: int = _MAX_BYTES) -> str:
    """The first `most` bytes of a file as text, "" where it cannot be read; what is not UTF-8 is replaced."""
    try:
        with open_regular(path) as file:
            return file.read(most).decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_pointer(folder: Path, name: str) -> str | None:
    """What `last` or `best` in a run's folder `checkpoints` names, as step_0001250; None without one."""
    target = read_text(folder / name, 100).strip()
    return target if STEP_NAME.fullmatch(target) else None


def pointed_step(run: str | Path, pointer: str) -> int | None:
    """The step that `last` or `best` of a run folder points to; None without one."""
    return step_in(read_pointer(Path(run) / "checkpoints", pointer) or "")


def step_in(name: str) -> int | None:
    """The step in the name of a checkpoint, or in that of its teacher file without the suffix; None for other names."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def newest_teacher(run: Path) -> Path | None:
    """The teacher file of the highest step of a run folder; None without one."""
    found = [path for path in (run / "teacher").glob("step_*.safetensors") if step_in(path.stem) is not None]
    return max(found, key=lambda path: step_in(path.stem) or 0, default=None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file cannot be read or holds no object."""
    return parsed_object(read_text(path)) or {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one JSON object per line; other lines are skipped."""
    return [content for line in read_text(path).splitlines() if (content := parsed_object(line)) is not None]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys: {"model": {"dim": 64}} -> {"model.dim": 64}; empty ones stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_number(value: Any) -> bool:
    """Whether a value is an int or float (not a bool), finite and in the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_sides(value: Any) -> tuple[int, int] | None:
    """(height, width) where a value is a size, one or two positive integers; else None."""
    pair = [value, value] if type(value) is int else value
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    return (pair[0], pair[1]) if all(type(side) is int and side > 0 for side in pair) else None


def number(value: Any) -> float:
    """A JSON value as a float; NaN when it is not a number ("nan", null, a list)."""
    return float(value) if is_number(value) else math.nan


def parsed_object(text: str) -> dict[str, Any] | None:
    """The object that a text is in JSON; None for one that is cut short or holds something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
