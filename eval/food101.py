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

from dinoreg.cli import script
from dinoreg.errors import UserError
from dinoreg.eval.data import Data, Labelled
from dinoreg.eval.declare import Benchmark, Need, Published, Task
from dinoreg.eval.reading import lines, missing, numbered, paths_source

NAME, ARCHIVE = "food101", "food-101.tar.gz"
REG, D2 = "DINOv2 with registers, arXiv 2309.16588v2, Table 1", "DINOv2, arXiv 2304.07193v2, Table 8"
D3 = "DINOv3, arXiv 2508.10104, Table 22"
ONE_TOKEN = "no registers; called accuracy"
DISTILLED = "no registers, distilled from ViT-g on LVD-142M; called accuracy"


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
            published=(
                Published("DINOv2 ViT-g/14, class token", 94.7, REG, ONE_TOKEN),
                Published("DINOv2 ViT-g/14, a normal patch", 74.2, REG, f"{ONE_TOKEN}; a patch token"),
                Published("DINOv2 ViT-g/14, an outlier patch", 93.5, REG, f"{ONE_TOKEN}; a patch token"),
                Published("DINOv2 ViT-S/14 (distilled)", 89.1, D2, DISTILLED),
                Published("DINOv2 ViT-B/14 (distilled)", 92.8, D2, DISTILLED),
                Published("DINOv2 ViT-L/14 (distilled)", 94.3, D2, DISTILLED),
                Published("DINOv2 ViT-g/14", 94.7, D2, "no registers; called accuracy"),
                Published("DINOv2 ViT-g/14", 95.6, D3, "448 px"),
            ),
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
