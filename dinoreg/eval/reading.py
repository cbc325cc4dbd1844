"""Small readers that the declarations in `eval/` share: text lists, path lists inside a folder, missing files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dinoreg.data.index import PathBlock
from dinoreg.data.sources import PathSource
from dinoreg.errors import UserError


def lines(path: Path, dataset: str, archive: str) -> list[str]:
    """The lines of a text file that are not empty, without their line ends; UserError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise missing(path, dataset, archive) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{dataset}: {path} cannot be read as text ({error})") from None
    return [line for line in text.splitlines() if line.strip()]


def missing(path: Path, dataset: str, archive: str) -> UserError:
    """The error for a file of a dataset that is not there."""
    return UserError(f"{dataset}: {path} is missing; it comes from {archive}")


def paths_source(folder: Path, paths: Iterable[str], dataset: str) -> PathSource:
    """A source of the files below `folder`, in the given order; UserError for a path that would leave it."""
    found = []
    for path in paths:
        tidy = os.path.normpath(path)
        if os.path.isabs(tidy) or tidy.split(os.sep)[0] == ".." or "\0" in path:
            raise UserError(f"{dataset}: the listed path {path!r} leaves {folder}")
        found.append(tidy)
    return PathSource(str(folder), PathBlock.of(found))


def whole_number(text: str, what: str, where: Path, least: int, most: int) -> int:
    """An integer in [least, most]; UserError saying what and where otherwise."""
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{where}: {what} is {text!r}, expected a whole number") from None
    if not least <= value <= most:
        raise UserError(f"{where}: {what} is {value}, expected {least}..{most}")
    return value
