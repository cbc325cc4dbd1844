"""CIFAR-100 (Krizhevsky, 2009): 60,000 images of 32 x 32 pixels in 100 classes, those called fine.

The "python version": `train`, `test` and `meta` are dictionaries pickled by Python 2, which are read without running
them. The twenty coarse classes beside the fine ones are not used, as in every paper. Images go bicubically from 32
pixels straight to the crop's size. Metric: top-1 (SimCLR B.8.1); 5,067 of train for choosing C (BYOL, App. D).
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

NAME, ARCHIVE = "cifar100", "cifar-100-python.tar.gz"
META = "meta"
COUNTS = {"train": 50_000, "test": 10_000}


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """Both splits, in memory."""
    names = read_names(folder / META, "fine_label_names", NAME, ARCHIVE)
    splits = {
        split: read_batches(folder, (split,), "fine_labels", len(names), NAME, ARCHIVE) for split in ("train", "test")
    }
    return Data(splits, names)


BENCHMARK = Benchmark(
    name=NAME,
    title="CIFAR-100",
    task="classification",
    classes=100,
    splits="50,000 / 10,000",
    folders=("cifar-100-python", "cifar100/cifar-100-python", "cifar-100", "cifar100"),
    layouts=(tuple(Need(path, ARCHIVE) for path in ("train", "test", META)),),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="top-1",
            counts=COUNTS,
            published=fine_grained((87.5, 91.3, 93.4, 94.4), 94.5, (94.5, 81.3, 93.7)),
            options={"validation_share": 5_067 / 50_000},
        ),
        Task(protocol="knn", read=read, metric="top-1", counts=COUNTS),
    ),
    download="cifar-100-python.tar.gz",
    licence="no licence text found",
    aliases=("cifar-100",),
)

if __name__ == "__main__":
    script(BENCHMARK)
