"""Describable Textures Dataset r1.0.1 (Cimpoi et al., CVPR 2014): 47 textures, 120 images each.

`images/<class>/<class>_<n>.jpg` with rows `banded/banded_0002.jpg` in `labels/{train,val,test}{1..10}.txt`: ten
official splits of 40 / 40 / 40 images per class, of which papers report the first (SimCLR B.8.1). Classes are numbered
in the order of their names over all three lists. torchvision unpacks the archive, which holds `dtd/`, into a `dtd/`.
Metric: top-1; C is chosen on val and the final fit takes train and val.
"""

from pathlib import Path

from dinoreg.config.option import option
from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import labelled, matched

NAME, ARCHIVE = "dtd", "dtd-r1.0.1.tar.gz"
SPLITS = ("train", "val", "test")


def read(folder: Path, options: Options) -> Data:
    """The three parts of one of the ten official splits, in the order of their files.

    raises  UserError for a list that is missing or of another form
    """
    partition = options["split"]
    rows = {}
    for split in SPLITS:
        path = folder / "labels" / f"{split}{partition}.txt"
        rows[split] = [(name, file) for file, name in matched(path, r"(([^/]+)/.+)", "class/file", NAME, ARCHIVE)]
    names = sorted({name for split in SPLITS for name, _ in rows[split]})
    splits = {split: labelled(folder / "images", rows[split], names, folder / "labels", NAME) for split in SPLITS}
    return Data(splits, names, variant=f"split {partition}")


PUBLISHED = fine_grained((80.6, 83.3, 84.0, 84.5), 86.8, (85.2, 63.1, 84.9))

BENCHMARK = Benchmark(
    name=NAME,
    title="DTD",
    classes=47,
    folders=("dtd/dtd", "dtd", "dtd-r1.0.1/dtd"),
    layouts=(needs(ARCHIVE, "images", *(f"labels/{split}1.txt" for split in SPLITS)),),
    tasks=classification_tasks(read, "top-1", {"train": 1_880, "val": 1_880, "test": 1_880}, PUBLISHED),
    licence="research use; no licence text found",
    options={"split": option(1, "which of the ten official splits", low=1, high=10)},
    aliases=("textures",),
)

if __name__ == "__main__":
    BENCHMARK.script()
