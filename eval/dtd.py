"""Describable Textures Dataset r1.0.1 (Cimpoi et al., CVPR 2014): 47 textures, 120 images each.

`images/<class>/<class>_<n>.jpg` with rows `banded/banded_0002.jpg` in `labels/{train,val,test}{1..10}.txt`: ten
official splits of 40 / 40 / 40 images per class, of which papers report the first (SimCLR B.8.1). Classes are numbered
in the order of their names over all three lists. torchvision unpacks the archive, which holds `dtd/`, into a `dtd/`.
Metric: top-1; C is chosen on val and the final fit takes train and val.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Option, Task
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.published import fine_grained
from dinoreg.evaluation.readers.text import lines, numbered, paths_source
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "dtd", "dtd-r1.0.1.tar.gz"
SPLITS, PARTITIONS = ("train", "val", "test"), 10
COUNTS = {"train": 1_880, "val": 1_880, "test": 1_880}


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """The three parts of one of the ten official splits, in the order of their files."""
    partition = options["split"]
    if not 1 <= partition <= PARTITIONS:
        raise UserError(f"{NAME}.split={partition}: expected 1..{PARTITIONS}")
    where = {split: folder / "labels" / f"{split}{partition}.txt" for split in SPLITS}
    rows = {split: [line.strip() for line in lines(path, NAME, ARCHIVE)] for split, path in where.items()}
    classes = {split: [_class(row, where[split]) for row in rows[split]] for split in SPLITS}
    names = sorted(set().union(*classes.values()))
    numbers = {name: number for number, name in enumerate(names)}
    splits = {
        split: Labelled(
            paths_source(folder / "images", rows[split], NAME),
            numbered(classes[split], numbers, where[split], NAME),
            len(names),
        )
        for split in SPLITS
    }
    return Data(splits, names, variant=f"split {partition}")


def _class(row: str, where: Path) -> str:
    name, slash, file = row.partition("/")
    if not (name and slash and file):
        raise UserError(f"{NAME}: {where}: {row!r}, expected class/file")
    return name


BENCHMARK = Benchmark(
    name=NAME,
    title="DTD",
    task="classification",
    classes=47,
    splits="1,880 / 1,880 / 1,880",
    folders=("dtd/dtd", "dtd", "dtd-r1.0.1/dtd"),
    layouts=((Need("images", ARCHIVE), *(Need(f"labels/{split}1.txt", ARCHIVE) for split in SPLITS)),),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="top-1",
            counts=COUNTS,
            published=fine_grained((80.6, 83.3, 84.0, 84.5), 86.8, (85.2, 63.1, 84.9)),
        ),
        Task(protocol="knn", read=read, metric="top-1", counts=COUNTS),
    ),
    download="dtd-r1.0.1.tar.gz",
    licence="research use; no licence text found",
    options=(Option("split", 1, "which of the ten official splits, 1..10"),),
    aliases=("textures",),
)

if __name__ == "__main__":
    script(BENCHMARK)
