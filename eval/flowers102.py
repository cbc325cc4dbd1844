"""Oxford Flowers-102 (Nilsback and Zisserman, ICVGIP 2008): 102 kinds of flowers; "Flow." in the papers' tables.

`jpg/image_%05d.jpg` with ids 1..8,189. `imagelabels.mat` holds every image's class in the order of ids, `setid.mat` the
ids of the three splits; both count from 1. The official test (`tstid`, 6,149 images) is larger than train (`trnid`,
1,020: ten per class); some published codes swap the two, which is another and easier benchmark.
Metric: mean per class (SimCLR B.8.1); C is chosen on val (`valid`) and the final fit takes train and val.
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Need, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import matlab_numbers, paths_source

NAME, ARCHIVE = "flowers102", "102flowers.tgz"
LABELS, SETS = "imagelabels.mat", "setid.mat"
SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}
NUM_CLASSES = 102


def read(folder: Path, options: Options) -> Data:
    """The three official splits, in the order of their lists of ids; UserError as `matlab_numbers`."""
    labels = matlab_numbers(folder / LABELS, ("labels",), NUM_CLASSES, NAME, LABELS)["labels"]
    sets = matlab_numbers(folder / SETS, SPLITS.values(), len(labels), NAME, SETS)
    splits = {}
    for split, variable in SPLITS.items():
        ids = sets[variable]
        source = paths_source(folder / "jpg", (f"image_{number:05d}.jpg" for number in ids), NAME)
        splits[split] = Labelled(source, labels[ids - 1] - 1, int(labels.max()))
    return Data(splits)


PUBLISHED = fine_grained((99.6, 99.6, 99.7, 99.7), 99.7, (99.7, 59.5, 99.6))

BENCHMARK = Benchmark(
    name=NAME,
    title="Oxford Flowers-102",
    classes=NUM_CLASSES,
    folders=("flowers-102", "flowers102", "oxford-flowers-102"),
    layouts=((*needs(ARCHIVE, "jpg"), *(Need(file, f"{file}, a file of its own") for file in (LABELS, SETS))),),
    tasks=classification_tasks(read, "mean per class", {"train": 1_020, "val": 1_020, "test": 6_149}, PUBLISHED),
    download="102flowers.tgz, imagelabels.mat, setid.mat",
    licence="research use; no licence text found",
    aliases=("flowers", "flowers-102", "oxford-flowers"),
)

if __name__ == "__main__":
    BENCHMARK.script()
