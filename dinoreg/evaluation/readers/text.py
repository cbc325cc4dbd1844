"""Small readers that the declarations in `eval/` share: text lists, path lists inside a folder, missing files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dinoreg.data.folder_index import PathBlock
from dinoreg.data.sources import PathSource
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError


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


def present(source: PathSource, dataset: str, archive: str, sample: int = 16) -> PathSource:
    """The source itself; UserError when one of some evenly spaced files of it is not there."""
    for index in sorted({round(each) for each in np.linspace(0, len(source) - 1, sample)} if len(source) else ()):
        if not os.path.exists(source.name(index)):
            raise missing(Path(source.name(index)), dataset, archive)
    return source


def matlab(path: Path, names: Iterable[str], dataset: str, archive: str) -> dict[str, np.ndarray]:
    """The named variables of a MATLAB file (up to version 7.2), with the shapes that MATLAB gave them.

    A struct array is (1, n) with fields; a field's values are arrays of their own. Raises UserError for a file that
    is missing or damaged, or that lacks a name.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{dataset}: reading {path} needs scipy: {install('scipy')}") from None
    if not path.is_file():
        raise missing(path, dataset, archive)
    try:
        found = loadmat(str(path), appendmat=False, variable_names=list(names))
    except Exception as error:  # what scipy raises for a damaged file depends on where the damage is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{dataset}: {path} cannot be read as a MATLAB file ({reason})") from None
    for name in names:
        if name not in found:
            raise UserError(f"{dataset}: {path} has no variable {name}; expected the file of {archive}")
    return {name: np.asarray(found[name]) for name in names}


def numbered(names: Iterable[str], numbers: Mapping[str, int], where: Path, dataset: str) -> list[int]:
    """The label of each class name; UserError for a name that is no class."""
    labels = []
    for name in names:
        if name not in numbers:
            raise UserError(f"{dataset}: {where}: {name!r} is not among the {len(numbers)} classes")
        labels.append(numbers[name])
    return labels


def whole_number(text: str, what: str, where: Path, least: int, most: int) -> int:
    """An integer in [least, most]; UserError saying what and where otherwise."""
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{where}: {what} is {text!r}, expected a whole number") from None
    if not least <= value <= most:
        raise UserError(f"{where}: {what} is {value}, expected {least}..{most}")
    return value
