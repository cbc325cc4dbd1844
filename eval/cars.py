"""Stanford Cars (Krause et al., 2013): 196 makes, models and years.

Two layouts hold the same images. In the original one (torchvision's), `cars_train/` and `cars_test/` come with
`devkit/cars_train_annos.mat`, and the labels of the test, which the devkit's own file lacks, lie beside the devkit in
`cars_test_annos_withlabels.mat`. In the combined one, `cars_annos.mat` lists 1..16,185 of `car_ims/` in another order
with a flag `test`. Classes are 1-based there. Boxes are not used; a few images are grey. The original host is gone.
Metric: top-1 (SimCLR B.8.1); 1,650 of train for choosing C (BYOL, App. D).
"""

from pathlib import Path

import numpy as np

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import matlab, paths_source, whole_number
from dinoreg.runtime.errors import UserError

NAME, DEVKIT, TEST_LABELS = "cars", "car_devkit.tgz", "cars_test_annos_withlabels.mat"
META, TRAIN_LIST, COMBINED = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_annos.mat"


def read(folder: Path, options: Options) -> Data:
    """Both splits, in the order of the annotations."""
    if (folder / META).exists():
        names = _names(matlab(folder / META, ("class_names",), NAME, DEVKIT)["class_names"])
        splits = {}
        for split, listed, archive in (("train", TRAIN_LIST, DEVKIT), ("test", TEST_LABELS, TEST_LABELS)):
            path = folder / listed
            records = matlab(path, ("annotations",), NAME, archive)["annotations"]
            splits[split] = _labelled(folder / f"cars_{split}", records, "fname", path, len(names))
        return Data(splits, names)
    path = folder / COMBINED
    variables = matlab(path, ("annotations", "class_names"), NAME, COMBINED)
    names, records = _names(variables["class_names"]), variables["annotations"].ravel()
    flags = np.array([whole_number(text, "test", path, 0, 1) for text in _column(records, "test", path)])
    splits = {
        split: _labelled(folder, records[flags == flag], "relative_im_path", path, len(names))
        for split, flag in (("train", 0), ("test", 1))
    }
    return Data(splits, names)


def _names(cells: np.ndarray) -> list[str]:
    return ["".join(str(part) for part in np.asarray(name).ravel()) for name in cells.ravel()]


def _column(records: np.ndarray, field: str, path: Path) -> list[str]:
    """One field of a struct array, (1, n) also for a single record, as text."""
    if records.dtype.names is None or field not in records.dtype.names:
        raise UserError(f"{NAME}: the annotations of {path} have no field {field!r}; expected those with labels")
    cells = [np.asarray(cell).ravel() for cell in records[field].ravel()]
    if any(len(cell) != 1 for cell in cells):
        raise UserError(f"{NAME}: {path}: a record's {field!r} is not one value")
    return [str(cell[0]) for cell in cells]


def _labelled(folder: Path, records: np.ndarray, file_field: str, path: Path, count: int) -> Labelled:
    source = paths_source(folder, _column(records, file_field, path), NAME)
    classes = [whole_number(text, "class", path, 1, count) for text in _column(records, "class", path)]
    return Labelled(source, np.array(classes) - 1, count)


BENCHMARK = Benchmark(
    name=NAME,
    title="Stanford Cars",
    classes=196,
    folders=("stanford_cars", "stanford-cars", "cars"),
    layouts=(
        (
            Need("cars_train", "cars_train.tgz"),
            Need("cars_test", "cars_test.tgz"),
            *needs(DEVKIT, META, TRAIN_LIST),
            Need(TEST_LABELS, f"{TEST_LABELS}, a file of its own"),
        ),
        (Need(COMBINED, f"{COMBINED}, a file of its own"), Need("car_ims", "car_ims.tgz")),
    ),
    tasks=classification_tasks(
        read,
        "top-1",
        {"train": 8_144, "test": 8_041},
        fine_grained((81.6, 88.2, 90.1, 91.4), 94.6, (91.5, 10.8, 85.2)),
        validation_images=1_650,
    ),
    download=f"cars_train.tgz, cars_test.tgz, {DEVKIT}, {TEST_LABELS}; or car_ims.tgz, {COMBINED}",
    licence="research use implied; the original host is gone",
    aliases=("stanford_cars", "stanford-cars"),
)

if __name__ == "__main__":
    script(BENCHMARK)
