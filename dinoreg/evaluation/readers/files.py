"""Readers that the declarations in `eval/` share: text lists, JSON, MATLAB files, listed images, missing files."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoreg.data.decode import pillow_rgb
from dinoreg.data.folder_index import PathBlock
from dinoreg.data.source import ChosenSource, PathSource, Source
from dinoreg.evaluation.data import Labelled, Segmented
from dinoreg.evaluation.readers.dataset_folder import unpacked
from dinoreg.evaluation.readers.pixel_maps import read_mask
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.regular_files import MAX_BYTES, read_regular


def missing(path: Path, dataset: str, archive: str) -> UserError:
    """The UserError for a file of a dataset that is not there, naming the archive it comes from."""
    return UserError(f"{dataset}: {path} is missing; it comes from {archive}")


def first_existing(folder: Path, names: Iterable[str]) -> Path:
    """The first of these paths below the folder that exists; without any the first, which messages then name."""
    paths = [folder / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def read_bytes(path: Path, dataset: str, archive: str, most: int | None = None) -> bytes:
    """A file's content; UserError for one that is missing, cannot be read, or has more than `most` bytes.

    archive  in the message for a missing file
    """
    with readable(f"{dataset}: {path}"):
        try:
            return read_regular(path, MAX_BYTES if most is None else most)
        except FileNotFoundError:
            raise missing(path, dataset, archive) from None


def read_text(path: Path, dataset: str, archive: str) -> str:
    """A file's content as text; UserError for one that is missing, cannot be read or is not UTF-8."""
    with reworded(f"{dataset}: {path} cannot be read as text", UnicodeDecodeError):
        return read_bytes(path, dataset, archive).decode("utf-8-sig")


def lines(path: Path, dataset: str, archive: str) -> list[str]:
    """The lines of a text file that are not empty, without white space around them; UserError as `read_text`."""
    return [line.strip() for line in read_text(path, dataset, archive).splitlines() if line.strip()]


def matched(path: Path, form: str, expected: str, dataset: str, archive: str) -> list[tuple[str, ...]]:
    """The groups of the regular expression `form` in every line of a list of images.

    expected  the form in words, for messages
    raises    UserError with the number of a line that does not match, for an empty list, and as `read_text`
    """
    rows, found = lines(path, dataset, archive), []
    if not rows:
        raise UserError(f"{dataset}: {path} lists no images")
    for number, line in enumerate(rows, 1):
        match = re.fullmatch(form, line)
        if match is None:
            raise UserError(f"{dataset}: {path} row {number}: {line[:120]!r}, expected {expected}")
        found.append(match.groups())
    return found


def require_distinct(values: Iterable[object], what: str, where: str) -> None:
    """UserError naming the first repeated value.

    what, where  what a value is, and the list that has them, for the message
    """
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"{where} lists {what} {repeated[0]} twice")


def read_json(
    path: Path, dataset: str, archive: str, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The value in a JSON file; UserError for one that is missing or is no JSON.

    object_hook  called with each object as it closes; what it returns replaces the object
    """
    text = read_text(path, dataset, archive)
    with reworded(f"{dataset}: {path} cannot be read as JSON", ValueError, RecursionError):
        return json.loads(text, object_hook=object_hook)


def paths_source(folder: Path, paths: Iterable[str], dataset: str) -> PathSource:
    """A source of the files below `folder`, in the given order; UserError for a path that would leave it.

    Folders that the paths begin with may have been unpacked one folder too deep (DatasetFolder).
    """
    relative: list[str] = []
    places: dict[str, str] = {}
    for path in paths:
        normal = os.path.normpath(path)
        if os.path.isabs(normal) or normal.split(os.sep)[0] == ".." or "\0" in path:
            raise UserError(f"{dataset}: the listed path {path!r} leaves {folder}")
        place, slash, rest = normal.partition(os.sep)
        if slash and place not in places:
            places[place] = os.path.relpath(unpacked(folder / place), folder)
        relative.append(os.path.join(places[place], rest) if slash else normal)
    return PathSource(str(folder), PathBlock.of(relative))


def present(source: PathSource, dataset: str, archive: str, sample: int = 16) -> PathSource:
    """The source itself; UserError when one of `sample` evenly spaced files of it does not exist."""
    for index in sorted({round(each) for each in np.linspace(0, len(source) - 1, sample)} if len(source) else ()):
        if not os.path.exists(source.name(index)):
            raise missing(Path(source.name(index)), dataset, archive)
    return source


class CroppedSource(ChosenSource):
    """Image files of another source, decoded to RGB and cropped.

    crop  (index, image) -> its part; BadImage where there is none
    said  which part, in words: fingerprints depend on them
    """

    def __init__(self, source: Source, crop: Callable[[int, Image.Image], Image.Image], said: str) -> None:
        super().__init__(source, np.arange(len(source)))
        self.crop, self.said = crop, said

    def read(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8; BadImage for what cannot be decoded or has no such part."""
        data = self.source.read(index)
        assert isinstance(data, bytes)
        return np.asarray(self.crop(index, pillow_rgb(data)))

    def _with_indices(self, text: str) -> str:
        return super()._with_indices(f"{text} {self.said}")


def labelled(
    folder: Path, rows: Sequence[tuple[str, ...]], classes: Sequence[str] | range, where: Path, dataset: str
) -> Labelled:
    """Images below a folder with one class each.

    rows     (class, path), as the list `where` has them
    classes  names in the order of their labels; or the range of the numbers that the list has instead
    raises   UserError for a name or number that is no class, and as `paths_source`
    """
    labels_of = {name: label for label, name in enumerate(classes)}
    labels = []
    for name, path in rows:
        if isinstance(classes, range):
            labels.append(whole_number(name, f"the class of {path}", where, classes[0], classes[-1]) - classes[0])
        elif name in labels_of:
            labels.append(labels_of[name])
        else:
            raise UserError(f"{dataset}: {where}: {name!r} is not among the {len(classes)} classes")
    return Labelled(paths_source(folder, (path for _, path in rows), dataset), np.array(labels), len(classes))


def segmented(images: Path, masks: Path, names: Sequence[str], classes: range, void: int, dataset: str) -> Segmented:
    """Images `NAME.jpg` with masks `NAME.png`.

    classes, void  as for `read_mask`
    raises         UserError for a name that leaves its folder; later, on access, as `read_mask`
    """
    source = paths_source(images, (f"{name}.jpg" for name in names), dataset)
    truths = paths_source(masks, (f"{name}.png" for name in names), dataset)

    def mask(index: int) -> np.ndarray:
        return read_mask(Path(truths.name(index)), classes, void, dataset)

    return Segmented(source, mask, len(classes), truths.stamp())


def matlab(path: Path, names: Iterable[str], dataset: str, archive: str) -> dict[str, np.ndarray]:
    """The named variables of a MATLAB file (up to version 7.2), with the shapes that MATLAB gave them.

    A struct array is (1, n) with fields; a field's values are arrays of their own. Raises UserError for a file that
    is missing or damaged, or that lacks a name.
    """
    with reworded(f"{dataset}: reading {path} needs scipy: {install('scipy')}", ImportError):
        from scipy.io import loadmat
    if not path.is_file():
        raise missing(path, dataset, archive)
    # What scipy raises for a damaged file depends on where the damage is.
    with reworded(f"{dataset}: {path} cannot be read as a MATLAB file", Exception):
        variables = loadmat(str(path), appendmat=False, variable_names=list(names))
    for name in names:
        if name not in variables:
            raise UserError(f"{dataset}: {path} has no variable {name}; expected the file of {archive}")
    return {name: np.asarray(variables[name]) for name in names}


def matlab_numbers(path: Path, names: Iterable[str], most: int, dataset: str, archive: str) -> dict[str, np.ndarray]:
    """The named variables of a MATLAB file, each a list of integers in 1..most, as (n,) int64 with n > 0.

    Raises UserError as `matlab` does, and for any other content.
    """
    lists = {}
    for name, values in matlab(path, names, dataset, archive).items():
        numbers = values.ravel()
        if not numbers.size or numbers.dtype.kind not in "uif" or (numbers != np.floor(numbers)).any():
            raise UserError(f"{dataset}: {path}: {name} is not what it should be, expected a list of whole numbers")
        outside = numbers[(numbers < 1) | (numbers > most)]
        if outside.size:
            raise UserError(f"{dataset}: {path}: {name} holds {outside[0]:g}, expected 1..{most}")
        lists[name] = numbers.astype(np.int64)
    return lists


def whole_number(text: str, what: str, where: Path, least: int, most: int) -> int:
    """An integer in [least, most]; UserError, with `where` and `what`, for any other text."""
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{where}: {what} is {text!r}, expected a whole number") from None
    if not least <= value <= most:
        raise UserError(f"{where}: {what} is {value}, expected {least}..{most}")
    return value
