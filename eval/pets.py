"""Oxford-IIIT Pets (Parkhi et al., CVPR 2012): 37 breeds of cats and dogs, about 200 photographs each.

`images/<Breed>_<number>.jpg`, listed in `annotations/{trainval,test}.txt` as `name class species breed`, all counted
from 1; only the class is used. Some files hold PNG or GIF under `.jpg`, some have palettes or alpha, and stray `.mat`
files lie among them: the lists say what counts, and the bytes say what a file is. Metric: mean per class (SimCLR
B.8.1); 20 images of each class are held out of trainval for choosing C (BYOL, App. D: 2,940 / 740).
"""

from pathlib import Path

import numpy as np

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import listed, paths_source, whole_number
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "pets", "annotations.tar.gz"
CLASSES = 37


def read(folder: Path, options: Options) -> Data:
    """trainval as "train", and "test", in the order of their files."""
    rows_of = {"train": _rows(folder, "trainval"), "test": _rows(folder, "test")}
    breeds: dict[int, str] = {}
    for rows in rows_of.values():
        for name, label in rows:
            breed = name.rsplit("_", 1)[0]
            if breeds.setdefault(label, breed) != breed:
                raise UserError(f"{NAME}: {folder / 'annotations'}: class {label + 1} is {breeds[label]} and {breed}")
    num_classes = max(breeds) + 1
    splits = {}
    for split, rows in rows_of.items():
        source = paths_source(folder / "images", (f"{name}.jpg" for name, _ in rows), NAME)
        splits[split] = Labelled(source, np.array([label for _, label in rows]), num_classes)
    names = [breeds.get(label, f"class {label + 1}") for label in range(num_classes)]
    return Data(splits, class_names=[" ".join(word.title() for word in name.split("_")) for name in names])


def _rows(folder: Path, split: str) -> list[tuple[str, int]]:
    """(name, class from 0) of every row of a split file."""
    path = folder / "annotations" / f"{split}.txt"
    rows = []
    for line in listed(path, NAME, ARCHIVE):
        if line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 4:
            raise UserError(f"{NAME}: {path}: {line!r}, expected name, class, species and breed")
        rows.append((fields[0], whole_number(fields[1], f"the class of {fields[0]}", path, 1, CLASSES) - 1))
    return rows


BENCHMARK = Benchmark(
    name=NAME,
    title="Oxford-IIIT Pets",
    classes=CLASSES,
    folders=("oxford-iiit-pet", "oxford_iiit_pet", "pets", "Pets"),
    layouts=((*needs("images.tar.gz", "images"), *needs(ARCHIVE, "annotations/trainval.txt", "annotations/test.txt")),),
    tasks=classification_tasks(
        read,
        "mean per class",
        {"train": 3_680, "test": 3_669},
        fine_grained((95.1, 96.2, 96.6, 96.7), 96.8, (96.9, 47.8, 94.1)),
        validation_images=740,
        knn_metric="mean per class",
    ),
    download="images.tar.gz and annotations.tar.gz",
    licence="CC BY-SA 4.0 as commonly stated; unverified",
    aliases=("oxford-iiit-pet", "oxford-iiit-pets", "pet"),
)

if __name__ == "__main__":
    script(BENCHMARK)
