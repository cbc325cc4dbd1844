"""Caltech-UCSD Birds-200-2011 (Wah et al., 2011): 200 species, which stands for SimCLR's Birdsnap in DINOv2's tables.

Four lists are joined by id, never by position: `images.txt` (id path), `image_class_labels.txt` (id class, 1-based),
`train_test_split.txt` (id 1|0, 1 = train) and `classes.txt` (class name). Boxes and parts are not used. Some images are
grey, and some are in ImageNet too. Metric: top-1 (Birdsnap's in SimCLR B.8.1); no validation split is official.
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import labelled, matched, require_distinct, whole_number
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "cub", "CUB_200_2011.tgz"
IMAGES, LABELS, SPLIT, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"


def read(folder: Path, options: Options) -> Data:
    """Both splits, in the order of images.txt.

    raises  UserError for a list that is missing, of another form or without one of the images
    """
    paths, labels, flags, named = (_by_id(folder / name) for name in (IMAGES, LABELS, SPLIT, CLASSES))
    for name, rows in ((LABELS, labels), (SPLIT, flags)):
        if odd := sorted(paths.keys() ^ rows.keys()):
            raise UserError(f"{NAME}: image {odd[0]} is in only one of {folder / IMAGES} and {name}")
    if sorted(named) != list(range(1, len(named) + 1)):
        raise UserError(f"{NAME}: {folder / CLASSES} does not number its classes 1..{len(named)}")
    of_flag: list[list[tuple[str, str]]] = [[], []]
    for image, path in paths.items():
        flag = whole_number(flags[image], f"the flag of image {image}", folder / SPLIT, 0, 1)
        of_flag[flag].append((labels[image], path))
    test, train = (
        labelled(folder / "images", each, range(1, len(named) + 1), folder / LABELS, NAME) for each in of_flag
    )
    return Data({"train": train, "test": test}, [named[number] for number in sorted(named)])


def _by_id(path: Path) -> dict[int, str]:
    """The rest of each line by the number before it."""
    rows = matched(path, r"(\d+) (.+)", "an id, a space and what has it", NAME, ARCHIVE)
    require_distinct((number for number, _ in rows), "id", f"{NAME}: {path}")
    return {int(number): rest for number, rest in rows}


PUBLISHED = fine_grained((88.1, 89.6, 90.5, 91.6), 91.6, (91.3, 18.6, 84.9))

BENCHMARK = Benchmark(
    name=NAME,
    title="CUB-200-2011",
    classes=200,
    folders=("CUB_200_2011", "cub", "cub200"),
    layouts=(needs(ARCHIVE, "images", IMAGES, LABELS, SPLIT, CLASSES),),
    tasks=classification_tasks(read, "top-1", {"train": 5_994, "test": 5_794}, PUBLISHED),
    licence="image copyrights vary; no licence text found",
    aliases=("cub200", "cub-200-2011", "cub_200_2011"),
)

if __name__ == "__main__":
    BENCHMARK.script()
