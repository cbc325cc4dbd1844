"""Stanford Cars (Krause et al., 2013): 196 makes, models and years.

Two layouts hold the same images. In the original one (torchvision's), `cars_train/` and `cars_test/` come with
`devkit/cars_train_annos.mat`, and the labels of the test, which the devkit's own file lacks, lie beside the devkit in
`cars_test_annos_withlabels.mat`. In the combined one, `cars_annos.mat` lists 1..16,185 of `car_ims/` in another order
with a flag `test`. Classes are 1-based there. Boxes are not used; a few images are grey. The original host is gone.
Metric: top-1 (SimCLR B.8.1); 1,650 of train for choosing C (BYOL, App. D).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Task
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.published import fine_grained
from dinoreg.evaluation.readers.text import matlab, paths_source, whole_number
from dinoreg.runtime.errors import UserError

NAME, DEVKIT, TEST_LABELS = "cars", "car_devkit.tgz", "cars_test_annos_withlabels.mat"
META, TRAIN_LIST, COMBINED = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_annos.mat"
COUNTS = {"train": 8_144, "test": 8_041}


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """Both splits, in the order of the annotations."""
    if (folder / META).exists():
        names = _names(matlab(folder / META, ("class_names",), NAME, DEVKIT))
        splits = {}
        for split, listed, archive in (("train", TRAIN_LIST, DEVKIT), ("test", TEST_LABELS, TEST_LABELS)):
            annotations = matlab(folder / listed, ("annotations",), NAME, archive)["annotations"]
            files = [f"cars_{split}/{file}" for file in _column(annotations, "fname", folder / listed)]
            splits[split] = _labelled(folder, files, _classes(annotations, folder / listed, len(names)), len(names))
        return Data(splits, names)
    path = folder / COMBINED
    found = matlab(path, ("annotations", "class_names"), NAME, COMBINED)
    names = _names(found)
    files = _column(found["annotations"], "relative_im_path", path)
    labels = _classes(found["annotations"], path, len(names))
    flags = [whole_number(text, "test", path, 0, 1) for text in _column(found["annotations"], "test", path)]
    splits = {}
    for split, flag in (("train", 0), ("test", 1)):
        chosen = [index for index, each in enumerate(flags) if each == flag]
        splits[split] = _labelled(folder, [files[i] for i in chosen], [labels[i] for i in chosen], len(names))
    return Data(splits, names)


def _names(found: Mapping[str, np.ndarray]) -> list[str]:
    return ["".join(str(part) for part in np.asarray(name).ravel()) for name in found["class_names"].ravel()]


def _column(annotations: np.ndarray, field: str, path: Path) -> list[str]:
    """One field of a struct array, (1, n) also for a single record, as text."""
    if annotations.dtype.names is None or field not in annotations.dtype.names:
        raise UserError(f"{NAME}: the annotations of {path} have no field {field!r}; expected those with labels")
    cells = [np.asarray(cell).ravel() for cell in annotations[field].ravel()]
    if any(len(cell) != 1 for cell in cells):
        raise UserError(f"{NAME}: {path}: a record's {field!r} is not one value")
    return [str(cell[0]) for cell in cells]


def _classes(annotations: np.ndarray, path: Path, count: int) -> list[int]:
    return [whole_number(text, "class", path, 1, count) - 1 for text in _column(annotations, "class", path)]


def _labelled(folder: Path, files: list[str], labels: list[int], count: int) -> Labelled:
    return Labelled(paths_source(folder, files, NAME), labels, count)


BENCHMARK = Benchmark(
    name=NAME,
    title="Stanford Cars",
    task="classification",
    classes=196,
    splits="8,144 / 8,041",
    folders=("stanford_cars", "stanford-cars", "cars"),
    layouts=(
        (
            Need("cars_train", "cars_train.tgz"),
            Need("cars_test", "cars_test.tgz"),
            Need(META, DEVKIT),
            Need(TRAIN_LIST, DEVKIT),
            Need(TEST_LABELS, f"{TEST_LABELS}, a file of its own"),
        ),
        (Need(COMBINED, f"{COMBINED}, a file of its own"), Need("car_ims", "car_ims.tgz")),
    ),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="top-1",
            counts=COUNTS,
            published=fine_grained((81.6, 88.2, 90.1, 91.4), 94.6, (91.5, 10.8, 85.2)),
            options={"validation_share": 1_650 / 8_144},
        ),
        Task(protocol="knn", read=read, metric="top-1", counts=COUNTS),
    ),
    download=f"cars_train.tgz, cars_test.tgz, {DEVKIT}, {TEST_LABELS}; or car_ims.tgz, {COMBINED}",
    licence="research use implied; the original host is gone",
    aliases=("stanford_cars", "stanford-cars"),
)

if __name__ == "__main__":
    script(BENCHMARK)
