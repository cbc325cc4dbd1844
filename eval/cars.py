"""Stanford Cars (Krause et al., 2013): 196 makes, models and years.

Two layouts hold the same images. In the original one (torchvision's), `cars_train/` and `cars_test/` come with
`devkit/cars_train_annos.mat`, and the labels of the test, which the devkit's own file lacks, lie beside the devkit in
`cars_test_annos_withlabels.mat`. In the combined one, `cars_annos.mat` lists 1..16,185 of `car_ims/` in another order
with a flag `test`. Classes are 1-based there. Boxes are not used; a few images are grey. The original host is gone.
Metric: top-1 (SimCLR B.8.1); 1,650 of train for choosing C (BYOL, App. D).
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Need, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import labelled, matlab, whole_number
from dinoreg.runtime.errors import reworded

NAME, DEVKIT, TEST_LABELS = "cars", "car_devkit.tgz", "cars_test_annos_withlabels.mat"
META, TRAIN_LIST, COMBINED = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_annos.mat"


def read(folder: Path, options: Options) -> Data:
    """Both splits, in the order of the annotations; UserError for annotations that are missing or of another form."""
    if (folder / META).exists():
        names = _names(folder / META, DEVKIT)
        splits = {}
        for split, listed, archive in (("train", TRAIN_LIST, DEVKIT), ("test", TEST_LABELS, TEST_LABELS)):
            path = folder / listed
            rows = _rows(path, archive, "class", "fname")
            splits[split] = labelled(folder / f"cars_{split}", rows, range(1, len(names) + 1), path, NAME)
        return Data(splits, names)
    path = folder / COMBINED
    names = _names(path, COMBINED)
    of_flag: list[list[tuple[str, ...]]] = [[], []]
    for flag, *row in _rows(path, COMBINED, "test", "class", "relative_im_path"):
        of_flag[whole_number(flag, "test", path, 0, 1)].append(tuple(row))
    train, test = (labelled(folder, rows, range(1, len(names) + 1), path, NAME) for rows in of_flag)
    return Data({"train": train, "test": test}, names)


def _names(path: Path, archive: str) -> list[str]:
    cells = matlab(path, ("class_names",), NAME, archive)["class_names"]
    return ["".join(map(str, cell.ravel())) for cell in cells.ravel()]


def _rows(path: Path, archive: str, *fields: str) -> list[tuple[str, ...]]:
    """Fields of every record, as text; the struct array is (1, n), also for a single record."""
    records = matlab(path, ("annotations",), NAME, archive)["annotations"].ravel()
    expected = f"expected annotations with labels, each with one {', one '.join(fields)}"
    with reworded(f"{NAME}: {path}: {expected}", ValueError, IndexError):
        return [tuple(str(record[field].item()) for field in fields) for record in records]


PUBLISHED = fine_grained((81.6, 88.2, 90.1, 91.4), 94.6, (91.5, 10.8, 85.2))

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
    tasks=classification_tasks(read, "top-1", {"train": 8_144, "test": 8_041}, PUBLISHED, validation_images=1_650),
    download=f"cars_train.tgz, cars_test.tgz, {DEVKIT}, {TEST_LABELS}; or car_ims.tgz, {COMBINED}",
    licence="research use implied; the original host is gone",
    aliases=("stanford_cars", "stanford-cars"),
)

if __name__ == "__main__":
    BENCHMARK.script()
