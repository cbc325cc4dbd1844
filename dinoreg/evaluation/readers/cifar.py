"""CIFAR's "python version": pickled batches of 32 x 32 images, for `eval/cifar10.py` and `eval/cifar100.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.data.sources import JoinedSource
from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.readers.arrays import ArraySource
from dinoreg.evaluation.readers.python2_pickle import read_dictionary
from dinoreg.evaluation.readers.text import missing
from dinoreg.runtime.errors import UserError

SIDE = 32  # pixels


def read_names(path: Path, key: str, dataset: str, archive: str) -> list[str]:
    """The class names in a meta file, in the order of their labels."""
    names = _value(_dictionary(path, dataset, archive), key, path, dataset)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{dataset}: {path}: {key} is not a list of names")
    return names


def read_batches(
    folder: Path, files: Sequence[str], labels_key: str, num_classes: int, dataset: str, archive: str
) -> Labelled:
    """The images of several batch files, one behind the other; they stay in memory (3 KiB each).

    labels_key  "labels" or "fine_labels": whole numbers in [0, num_classes)
    Raises UserError for a file that is missing, refused or of another form, and for labels out of range.
    """
    parts, labels = [], []
    for file in files:
        path = folder / file
        batch = _dictionary(path, dataset, archive)
        data = _value(batch, "data", path, dataset)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * SIDE * SIDE:
            form = data.shape if isinstance(data, np.ndarray) else type(data).__name__
            raise UserError(f"{dataset}: {path}: data is {form}, expected (n, {3 * SIDE * SIDE}) bytes")
        told = _value(batch, labels_key, path, dataset)
        if not isinstance(told, list) or not all(type(label) is int for label in told) or len(told) != len(data):
            raise UserError(f"{dataset}: {path}: {labels_key} is not a list of {len(data)} whole numbers")
        # A row is the red, the green and the blue plane; the view turns them into pixels without a copy.
        parts.append(ArraySource(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), str(path)))
        labels.extend(told)
    return Labelled(JoinedSource(parts), np.array(labels), num_classes)


def _dictionary(path: Path, dataset: str, archive: str) -> dict[str, Any]:
    if not path.is_file():
        raise missing(path, dataset, archive)
    return read_dictionary(path, dataset)


def _value(values: dict[str, Any], key: str, path: Path, dataset: str) -> Any:
    if key not in values:
        raise UserError(f"{dataset}: {path} has no entry {key!r}; it has {list(values)[:8]}")
    return values[key]
