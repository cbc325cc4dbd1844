"""Caltech-UCSD Birds-200-2011 (Wah et al., 2011): 200 species, which stands for SimCLR's Birdsnap in DINOv2's tables.

Four lists are joined by id, never by position: `images.txt` (id path), `image_class_labels.txt` (id class, 1-based),
`train_test_split.txt` (id 1|0, 1 = train) and `classes.txt` (class name). Boxes and parts are not used. Some images are
grey, and some are in ImageNet too. Metric: top-1 (Birdsnap's in SimCLR B.8.1); no validation split is official.
"""

from pathlib import Path

import numpy as np

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import lines, paths_source, whole_number
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "cub", "CUB_200_2011.tgz"
IMAGES, LABELS, SPLIT, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"


def read(folder: Path, options: Options) -> Data:
    """Both splits, in the order of images.txt."""
    paths, labels, flags = (_by_id(folder / name) for name in (IMAGES, LABELS, SPLIT))
    for name, rows in ((LABELS, labels), (SPLIT, flags)):
        odd = sorted(paths.keys() ^ rows.keys())
        if odd:
            raise UserError(f"{NAME}: image {odd[0]} is in only one of {folder / IMAGES} and {name}")
    named = _by_id(folder / CLASSES)
    if sorted(named) != list(range(1, len(named) + 1)):
        raise UserError(f"{NAME}: {folder / CLASSES} does not number its classes 1..{len(named)}")
    numbers = {
        image: whole_number(text, f"the class of image {image}", folder / LABELS, 1, len(named)) - 1
        for image, text in labels.items()
    }
    in_train = {
        image: whole_number(text, f"the flag of image {image}", folder / SPLIT, 0, 1) for image, text in flags.items()
    }
    splits = {}
    for split, flag in (("train", 1), ("test", 0)):
        images = [image for image in paths if in_train[image] == flag]
        source = paths_source(folder / "images", (paths[image] for image in images), NAME)
        splits[split] = Labelled(source, np.array([numbers[image] for image in images]), len(named))
    return Data(splits, [named[number + 1] for number in range(len(named))])


def _by_id(path: Path) -> dict[int, str]:
    """The rest of each line by the number before it."""
    rows: dict[int, str] = {}
    for line in lines(path, NAME, ARCHIVE):
        number, _, rest = line.partition(" ")
        key = whole_number(number, "an id", path, 0, 10**9)
        if not rest or key in rows:
            raise UserError(f"{NAME}: {path}: {line!r}: {'listed twice' if rest else 'nothing after the id'}")
        rows[key] = rest
    return rows


BENCHMARK = Benchmark(
    name=NAME,
    title="CUB-200-2011",
    classes=200,
    folders=("CUB_200_2011", "cub", "cub200"),
    layouts=(needs(ARCHIVE, "images", IMAGES, LABELS, SPLIT, CLASSES),),
    tasks=classification_tasks(
        read,
        "top-1",
        {"train": 5_994, "test": 5_794},
        fine_grained((88.1, 89.6, 90.5, 91.6), 91.6, (91.3, 18.6, 84.9)),
    ),
    download=ARCHIVE,
    licence="image copyrights vary; no licence text found",
    aliases=("cub200", "cub-200-2011", "cub_200_2011"),
)

if __name__ == "__main__":
    script(BENCHMARK)
