"""SUN397 (Xiao et al., CVPR 2010): 108,754 photographs of 397 kinds of scene, with ten splits of 50 + 50 per class.

`ClassName.txt` lists the classes as `/a/abbey`, some of them nested (`/c/church/indoor`); a class's number is its row.
`Training_01.txt` … `Testing_10.txt` list images as `/a/abbey/sun_….jpg` and lie inside `SUN397/` or beside it, as they
were unpacked. Some files hold PNG or GIF under `.jpg`. The papers use the first split only. Metric: top-1 (SimCLR
B.8.1); 10 images of each class are held out of train for choosing C (BYOL, App. D: 15,880 / 3,970).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Option, Task
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.published import fine_grained
from dinoreg.evaluation.readers.text import lines, missing, numbered, paths_source
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE, PARTITIONS = "sun397", "SUN397.tar.gz", "Partitions.zip"
SPLITS = 10
PLACES = ("", "..", "Partitions", "../Partitions")  # of the lists, from the dataset's folder
COUNTS = {"train": 19_850, "test": 19_850}


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """Both halves of one of the ten splits, in the order of their files."""
    split = int(options.get("split", 1))
    if not 1 <= split <= SPLITS:
        raise UserError(f"{NAME}.split={split}: expected 1..{SPLITS}")
    path = folder / "ClassName.txt"
    names = [_tidy(line) for line in lines(path, NAME, ARCHIVE)]
    number = {name: index for index, name in enumerate(names)}
    if len(number) != len(names):
        raise UserError(f"{NAME}: {path} lists a class twice")
    halves = {
        half: _half(folder, f"{prefix}_{split:02d}.txt", number)
        for half, prefix in (("train", "Training"), ("test", "Testing"))
    }
    # The archive sorts the classes into folders by their first letter, which says nothing.
    return Data(halves, class_names=[name.split("/", 1)[-1] for name in names], variant=f"split {split}")


def _half(folder: Path, file: str, number: Mapping[str, int]) -> Labelled:
    found = [folder / place / file for place in PLACES]
    path = next((each for each in found if each.is_file()), None)
    if path is None:
        raise missing(found[0], NAME, f"{PARTITIONS} (unpack it inside {folder.name} or beside it)")
    images = [_tidy(line) for line in lines(path, NAME, PARTITIONS)]
    labels = numbered((image.rpartition("/")[0] for image in images), number, path, NAME)
    return Labelled(paths_source(folder, images, NAME), np.array(labels), len(number))


def _tidy(line: str) -> str:
    return line.strip().removeprefix("/")


BENCHMARK = Benchmark(
    name=NAME,
    title="SUN397",
    task="classification",
    classes=397,
    splits="19,850 / 19,850 (split 1 of 10)",
    folders=("SUN397", "sun397"),
    layouts=tuple(
        (
            Need("ClassName.txt", ARCHIVE),
            Need(str(Path(place) / "Training_01.txt"), PARTITIONS),
            Need(str(Path(place) / "Testing_01.txt"), PARTITIONS),
        )
        for place in PLACES
    ),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="top-1",
            counts=COUNTS,
            published=fine_grained(
                (74.4, 77.3, 78.7, 78.7), 78.9, (78.6, 37.7, 78.5), "DINOv2's data drew on this training split"
            ),
            options={"validation_share": 0.2},  # 3,970 of 19,850
        ),
        Task(protocol="knn", read=read, metric="top-1", counts=COUNTS),
    ),
    download="SUN397.tar.gz and Partitions.zip (inside SUN397/ or beside it)",
    licence="research use; no licence text found",
    options=(Option("split", 1, "which of the ten official splits, 1..10"),),
    aliases=("sun", "sun-397"),
)

if __name__ == "__main__":
    script(BENCHMARK)
