"""Caltech-101 (Fei-Fei et al., 2004): 8,677 images of 101 kinds of objects, 31 to 800 each.

`101_ObjectCategories/<category>/image_%04d.jpg`. The folder BACKGROUND_Google (467 images and a stray file `tmp`) is no
class, though several published codes count it as the 102nd. There is no official split: the protocol draws 30 images
per class for training and tests on all others (SimCLR B.8.1), and which ones the papers drew is unknown. Ours come from
a hash of seed, category and file name, so that a seed means the same images everywhere. Some images are grey.
Metric: mean per class, since the classes are very unequal; 5 of the 30 for choosing C (BYOL, App. D).
"""

import hashlib
from functools import partial
from pathlib import Path

from dinoreg.config.option import option
from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import labelled
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "caltech101", "101_ObjectCategories.tar.gz, in caltech-101.zip"
IMAGES = "101_ObjectCategories"
BACKGROUND = "BACKGROUND_Google"


def read(folder: Path, options: Options) -> Data:
    """A seeded draw of `train_per_class` images per class without replacement as "train", and all the rest as "test".

    raises  UserError for a folder without classes, and for a class with too few images
    """
    count, seed = options["train_per_class"], options["seed"]
    images = folder / IMAGES
    folders = {path.name for path in images.iterdir() if path.is_dir() and path.name[0] != "."}
    names = sorted(folders - {BACKGROUND})
    if not names:
        raise UserError(f"{NAME}: {images} has no category folders; they come from {ARCHIVE}")
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name in names:
        files = [path.name for path in (images / name).iterdir() if path.suffix.lower() == ".jpg"]
        if len(files) <= count:
            expected = f"more than train_per_class={count}"
            raise UserError(f"{NAME}: {images / name} has {len(files)} images, expected {expected}")
        ranked = sorted(files, key=partial(_rank, seed, name))
        for split, drawn in (("train", ranked[:count]), ("test", ranked[count:])):
            rows[split] += [(name, f"{name}/{file}") for file in sorted(drawn)]
    splits = {split: labelled(images, rows[split], names, images, NAME) for split in rows}
    return Data(splits, names, variant=f"{count} per class, seed {seed}")


def _rank(seed: int, category: str, file: str) -> bytes:
    return hashlib.sha256(f"{seed}/{category}/{file}".encode()).digest()


COUNTS = {"train": 3_030, "test": 5_647}
PUBLISHED = fine_grained(
    (97.0, 96.1, 97.5, 97.6), 95.9, (96.9, 73.2, 97.6), "another draw of the split, not stated which"
)

BENCHMARK = Benchmark(
    name=NAME,
    title="Caltech-101",
    classes=101,
    splits="30 per class / rest",
    folders=("caltech101", "caltech-101", "Caltech101"),
    layouts=(needs(ARCHIVE, IMAGES),),
    # 5 of 30 of each class are held out.
    tasks=classification_tasks(read, "mean per class", COUNTS, PUBLISHED, validation_images=505),
    download="caltech-101.zip (101_ObjectCategories.tar.gz in it)",
    licence="image copyrights vary; no licence text found",
    options={
        "train_per_class": option(30, "images of each class to learn from; all others are the test", low=1),
        "seed": option(0, "of the draw", low=0),
    },
    aliases=("caltech-101", "caltech"),
)

if __name__ == "__main__":
    BENCHMARK.script()
