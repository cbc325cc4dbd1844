"""CIFAR-10 (Krizhevsky, 2009): 60,000 images of 32 x 32 pixels in ten classes.

The "python version": `data_batch_1..5`, `test_batch` and `batches.meta` are dictionaries pickled by Python 2, which are
read without running them. Images go bicubically from 32 pixels straight to the crop's size; the near-duplicates between
train and test are known and left in. Metric: top-1 (SimCLR B.8.1); 5,000 of train for choosing C (BYOL, App. D).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Task
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.readers.cifar import read_batches, read_names
from dinoreg.evaluation.readers.published import fine_grained

NAME, ARCHIVE = "cifar10", "cifar-10-python.tar.gz"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
META = "batches.meta"
COUNTS = {"train": 50_000, "test": 10_000}


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """Both splits, in memory."""
    names = read_names(folder / META, "label_names", NAME, ARCHIVE)
    splits = {
        split: read_batches(folder, files, "labels", len(names), NAME, ARCHIVE)
        for split, files in (("train", TRAIN), ("test", TEST))
    }
    return Data(splits, names)


BENCHMARK = Benchmark(
    name=NAME,
    title="CIFAR-10",
    task="classification",
    classes=10,
    splits="50,000 / 10,000",
    folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar-10", "cifar10"),
    layouts=(tuple(Need(path, ARCHIVE) for path in (*TRAIN, *TEST, META)),),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="top-1",
            counts=COUNTS,
            published=fine_grained((97.7, 98.7, 99.3, 99.5), 99.5, (99.4, 97.1, 99.3)),
            options={"validation_share": 5_000 / 50_000},
        ),
        Task(protocol="knn", read=read, metric="top-1", counts=COUNTS),
    ),
    download="cifar-10-python.tar.gz",
    licence="no licence text found",
    aliases=("cifar-10",),
)

if __name__ == "__main__":
    script(BENCHMARK)
