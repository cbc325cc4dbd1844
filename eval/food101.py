"""Food-101 (Bossard et al., ECCV 2014): 101 dishes, 1,000 photographs each, from Foodspotting.

`food-101/images/<class>/<id>.jpg`, listed without the extension in `meta/{train,test}.json` (class -> ids), and the
same as lines of `meta/{train,test}.txt`. Classes are numbered in the order of their names. Training labels were never
cleaned, by design. Metric: top-1 (SimCLR B.8.1); 68,175 / 7,575 of train for choosing C (BYOL, App. D).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Task
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.published import fine_grained
from dinoreg.evaluation.readers.text import lines, missing, numbered, paths_source
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "food101", "food-101.tar.gz"


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """Both splits, in the order of their files."""
    listed = {split: _listed(folder, split) for split in ("train", "test")}
    names = sorted({name for name, _ in listed["train"]})
    number = {name: index for index, name in enumerate(names)}
    splits = {}
    for split, rows in listed.items():
        labels = numbered((name for name, _ in rows), number, folder / "meta", NAME)
        source = paths_source(folder / "images", (f"{path}.jpg" for _, path in rows), NAME)
        splits[split] = Labelled(source, np.array(labels), len(names))
    return Data(splits, class_names=[name.replace("_", " ") for name in names])


def _listed(folder: Path, split: str) -> list[tuple[str, str]]:
    """(class, path below images/ without extension) of a split, of its JSON file or else of its text file."""
    path = folder / "meta" / f"{split}.json"
    if not path.exists():
        text = folder / "meta" / f"{split}.txt"
        if not text.exists():
            raise missing(path, NAME, ARCHIVE)
        return [_row(line.strip(), text) for line in lines(text, NAME, ARCHIVE)]
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{NAME}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(classes, dict) or not all(isinstance(rows, list) for rows in classes.values()):
        raise UserError(f'{NAME}: {path}: expected {{"class": ["class/id", …], …}}')
    found = []
    for name, rows in classes.items():
        for row in rows:
            entry = _row(str(row), path)
            if entry[0] != name:
                raise UserError(f"{NAME}: {path}: {row!r} is listed under the class {name!r}")
            found.append(entry)
    return found


def _row(text: str, where: Path) -> tuple[str, str]:
    name, slash, number = text.partition("/")
    if not (name and slash and number):
        raise UserError(f"{NAME}: {where}: {text!r}, expected class/id")
    return name, text


IMAGES = Need("images", ARCHIVE)
BENCHMARK = Benchmark(
    name=NAME,
    title="Food-101",
    task="classification",
    classes=101,
    splits="75,750 / 25,250",
    folders=("food-101", "food101", "Food-101"),
    layouts=(
        (IMAGES, Need("meta/train.json", ARCHIVE), Need("meta/test.json", ARCHIVE)),
        (IMAGES, Need("meta/train.txt", ARCHIVE), Need("meta/test.txt", ARCHIVE)),
    ),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="top-1",
            counts={"train": 75_750, "test": 25_250},
            published=fine_grained((89.1, 92.8, 94.3, 94.7), 95.6, (94.7, 74.2, 93.5)),
            options={"validation_share": 0.1},  # 7,575 of 75,750
        ),
        Task(protocol="knn", read=read, metric="top-1", counts={"train": 75_750, "test": 25_250}),
    ),
    download="food-101.tar.gz",
    licence="research use; photographs from Foodspotting; no licence text found",
    aliases=("food-101", "food"),
)

if __name__ == "__main__":
    script(BENCHMARK)
