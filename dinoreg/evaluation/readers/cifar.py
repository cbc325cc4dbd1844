"""CIFAR's "python version": pickled batches of 32 x 32 images, for `eval/cifar10.py` and `eval/cifar100.py`."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.data.source import JoinedSource, Source
from dinoreg.evaluation.benchmark import Options, Reader
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.python2_pickle import read_dictionary
from dinoreg.runtime.errors import UserError

SIDE = 32  # pixels


class ArraySource(Source):
    """Images of one size held in memory.

    pixels  (n, H, W, 3) uint8 in any memory layout, so that a view costs no copy
    title   where they come from: image 17 is called "TITLE:17"
    """

    def __init__(self, pixels: np.ndarray, title: str) -> None:
        self.pixels, self.title = pixels, title

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8, contiguous."""
        return np.ascontiguousarray(self.pixels[index])

    def name(self, index: int) -> str:
        """ "TITLE:index"."""
        return f"{self.title}:{index}"

    def fingerprint(self) -> str:
        """16 hexadecimal digits over the shape and every pixel."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()[:16]


def cifar_reader(
    dataset: str, archive: str, splits: Mapping[str, Sequence[str]], meta: str, names_key: str, labels_key: str
) -> Reader:
    """A reader of batch files, whose images stay in memory (3 KiB each).

    archive     in the message for a missing file
    splits      {split: its files, one behind the other}
    meta        the file with the class names, a list below `names_key` in the order of their labels
    labels_key  "labels" or "fine_labels": whole numbers in [0, number of names)
    returns     a reader, which raises UserError for a file that is missing, refused or of another form, and for labels
                out of range
    """

    def read(folder: Path, options: Options) -> Data:
        names = read_dictionary(folder / meta, dataset, archive).get(names_key)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{dataset}: {folder / meta}: {names_key} is not a list of names")
        parts = {
            split: _batches([folder / file for file in files], labels_key, len(names), dataset, archive)
            for split, files in splits.items()
        }
        return Data(parts, names)

    return read


def _batches(paths: Sequence[Path], labels_key: str, num_classes: int, dataset: str, archive: str) -> Labelled:
    parts, labels = [], []
    for path in paths:
        values = read_dictionary(path, dataset, archive)
        data: Any = values.get("data")
        numbers = values.get(labels_key)
        is_whole = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3 * SIDE * SIDE,)
        if not is_whole or not isinstance(numbers, list) or [type(each) for each in numbers] != [int] * len(data):
            form = f"data, (n, {3 * SIDE * SIDE}) bytes, and {labels_key}, a list of n whole numbers"
            raise UserError(f"{dataset}: {path} is of another form, expected {form}")
        # A row is the red, the green and the blue plane; the view turns them into pixels without a copy.
        parts.append(ArraySource(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), str(path)))
        labels.extend(numbers)
    return Labelled(JoinedSource(parts), np.array(labels), num_classes)
