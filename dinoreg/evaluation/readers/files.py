"""Readers that the declarations in `eval/` share: text lists, JSON, MATLAB files, listed images, missing files."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.data.folder_index import PathBlock
from dinoreg.data.source import PathSource
from dinoreg.evaluation.data import IGNORED, Labelled, Segmented
from dinoreg.evaluation.readers.pixel_maps import read_label_map
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError, one_line


def missing(path: Path, dataset: str, archive: str) -> UserError:
    """The error for a file of a dataset that is not there."""
    return UserError(f"{dataset}: {path} is missing; it comes from {archive}")


def read_bytes(path: Path, dataset: str, archive: str, most: int | None = None) -> bytes:
    """A file's content; UserError for one that is missing, cannot be read, or has more than `most` bytes."""
    try:
        if most is not None and path.stat().st_size > most:
            raise UserError(f"{dataset}: {path} has more than {most >> 20} MiB, too many for a file of its kind")
        return path.read_bytes()
    except FileNotFoundError:
        raise missing(path, dataset, archive) from None
    except OSError as error:
        raise UserError(f"{dataset}: {path} cannot be read ({error.strerror})") from None


def read_text(path: Path, dataset: str, archive: str) -> str:
    """A file's content as text; UserError for one that is missing, cannot be read or is not UTF-8."""
    try:
        return read_bytes(path, dataset, archive).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{dataset}: {path} cannot be read as text ({error})") from None


def lines(path: Path, dataset: str, archive: str) -> list[str]:
    """The lines of a text file that are not empty, without white space around them."""
    return [line.strip() for line in read_text(path, dataset, archive).splitlines() if line.strip()]


def listed(path: Path, dataset: str, archive: str) -> list[str]:
    """The lines of a list of images; UserError for an empty one."""
    rows = lines(path, dataset, archive)
    if not rows:
        raise UserError(f"{dataset}: {path} lists no images")
    return rows


def read_json(
    path: Path, dataset: str, archive: str, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The value in a JSON file; UserError for one that is missing or of another kind.

    object_hook  gets each object as it closes, and returns what takes its place
    """
    text = read_text(path, dataset, archive)
    try:
        return json.loads(text, object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{dataset}: {path} cannot be read as JSON ({str(error)[:200]})") from None


def paths_source(folder: Path, paths: Iterable[str], dataset: str) -> PathSource:
    """A source of the files below `folder`, in the given order; UserError for a path that would leave it."""
    relative = []
    for path in paths:
        normal = os.path.normpath(path)
        if os.path.isabs(normal) or normal.split(os.sep)[0] == ".." or "\0" in path:
            raise UserError(f"{dataset}: the listed path {path!r} leaves {folder}")
        relative.append(normal)
    return PathSource(str(folder), PathBlock.of(relative))


def present(source: PathSource, dataset: str, archive: str, sample: int = 16) -> PathSource:
    """The source itself; UserError when one of some evenly spaced files of it is not there."""
    for index in sorted({round(each) for each in np.linspace(0, len(source) - 1, sample)} if len(source) else ()):
        if not os.path.exists(source.name(index)):
            raise missing(Path(source.name(index)), dataset, archive)
    return source


def labelled(
    folder: Path, rows: Sequence[tuple[str, str]], classes: Sequence[str], where: Path, dataset: str
) -> Labelled:
    """Images below a folder with one class each.

    rows     (class name, path), as the list `where` has them
    classes  names in the order of their numbers
    Raises UserError for a name that is no class and for a path that would leave the folder.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for name, _ in rows:
        if name not in numbers:
            raise UserError(f"{dataset}: {where}: {name!r} is not among the {len(numbers)} classes")
        labels.append(numbers[name])
    return Labelled(paths_source(folder, (path for _, path in rows), dataset), np.array(labels), len(classes))


def class_of(row: str, where: Path, dataset: str, form: str) -> str:
    """The class in a row `class/file`; UserError saying the expected form for any other row."""
    name, _, file = row.partition("/")
    if not (name and file):
        raise UserError(f"{dataset}: {where}: {row!r}, expected {form}")
    return name


def segmented(images: Path, masks: Path, names: Sequence[str], classes: range, void: int, dataset: str) -> Segmented:
    """Images `NAME.jpg` with masks `NAME.png`, each read when it is asked for.

    classes  the values of the classes 0..K-1 in a mask
    void     the value that is ignored
    """
    first, last = classes[0], classes[-1]
    expected = f"{void}..{last}" if void == first - 1 else f"{first}..{last} or {void}"

    def mask(index: int) -> np.ndarray:
        path = masks / f"{names[index]}.png"
        values = read_label_map(path, images / f"{names[index]}.jpg", dataset)
        wrong = values[(values != void) & ((values < first) | (values > last))]
        if len(wrong):
            raise UserError(f"{dataset}: {path} has the value {wrong[0]}, expected {expected}")
        return np.where(values == void, IGNORED, values - first).astype(np.uint8)

    stamp = paths_source(masks, (f"{name}.png" for name in names), dataset).stamp()
    return Segmented(paths_source(images, (f"{name}.jpg" for name in names), dataset), mask, len(classes), stamp)


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
        variables = loadmat(str(path), appendmat=False, variable_names=list(names))
    except Exception as error:  # what scipy raises for a damaged file depends on where the damage is
        raise UserError(f"{dataset}: {path} cannot be read as a MATLAB file ({one_line(error, 200)})") from None
    for name in names:
        if name not in variables:
            raise UserError(f"{dataset}: {path} has no variable {name}; expected the file of {archive}")
    return {name: np.asarray(variables[name]) for name in names}


def whole_number(text: str, what: str, where: Path, least: int, most: int) -> int:
    """An integer in [least, most]; UserError saying what and where otherwise."""
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{where}: {what} is {text!r}, expected a whole number") from None
    if not least <= value <= most:
        raise UserError(f"{where}: {what} is {value}, expected {least}..{most}")
    return value
