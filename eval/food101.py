"""Food-101 (Bossard et al., ECCV 2014): 101 dishes, 1,000 photographs each, from Foodspotting.

`food-101/images/<class>/<id>.jpg`, listed without the extension in `meta/{train,test}.json` (class -> ids). Classes are
numbered in the order of their names. Training labels were never cleaned, by design. Metric: top-1 (SimCLR B.8.1);
68,175 / 7,575 of train for choosing C (BYOL, App. D).
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import labelled, read_json
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "food101", "food-101.tar.gz"


def read(folder: Path, options: Options) -> Data:
    """Both splits, in the order of their files; UserError for a list that is missing or of another form."""
    rows = {split: _rows(folder / "meta", split) for split in ("train", "test")}
    names = sorted({name for name, _ in rows["train"]})
    splits = {split: labelled(folder / "images", rows[split], names, folder / "meta", NAME) for split in rows}
    return Data(splits, class_names=[name.replace("_", " ") for name in names])


def _rows(meta: Path, split: str) -> list[tuple[str, str]]:
    """(class, path below images/) of a split."""
    path = meta / f"{split}.json"
    classes = read_json(path, NAME, ARCHIVE)
    if not isinstance(classes, dict) or not all(isinstance(rows, list) for rows in classes.values()):
        raise UserError(f'{NAME}: {path}: expected {{"class": ["class/id", …], …}}')
    entries = [(name, str(row)) for name, rows in classes.items() for row in rows]
    for name, row in entries:
        if not row.startswith(f"{name}/"):
            raise UserError(f"{NAME}: {path}: {row!r} is listed under the class {name!r}, expected class/id")
    return [(name, f"{row}.jpg") for name, row in entries]


PUBLISHED = fine_grained((89.1, 92.8, 94.3, 94.7), 95.6, (94.7, 74.2, 93.5))

BENCHMARK = Benchmark(
    name=NAME,
    title="Food-101",
    classes=101,
    folders=("food-101", "food101", "Food-101"),
    layouts=(needs(ARCHIVE, "images", "meta/train.json", "meta/test.json"),),
    tasks=classification_tasks(read, "top-1", {"train": 75_750, "test": 25_250}, PUBLISHED, validation_images=7_575),
    licence="research use; photographs from Foodspotting; no licence text found",
    aliases=("food-101", "food"),
)

if __name__ == "__main__":
    BENCHMARK.script()
