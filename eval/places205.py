"""Places205 (Zhou et al., NeurIPS 2014): 205 kinds of scenes, 2,448,873 training images with a short side of 256.

`trainvalsplit_places205/{train,val}_places205.csv` list `a/abbey/gsun_<hash>.jpg 0`: separated by a space whatever
the name says, classes from 0, categories sometimes one folder deeper. The test set has no public labels, so papers
report on val (100 images of each class), which is the split "test" here. These are not the classes or images of
Places365. Protocol: DINOv2's linear grid (App. B.3), weighted k-NN besides.
"""

from pathlib import Path

from dinoreg.config.option import option
from dinoreg.data.declared import Pretraining
from dinoreg.data.source import Source
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, linear_tasks
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import BASELINE, DINOV2, released, single_tokens
from dinoreg.evaluation.readers import files
from dinoreg.runtime.errors import UserError

NAME, IMAGES, LISTS = "places205", "imagesPlaces205_resize.tar.gz", "trainvalsplit_places205.tar.gz"
FOUND = f"{IMAGES} (elsewhere: {NAME}.images=FOLDER)"
CLASSES = 205
NEEDS = {split: Need(f"trainvalsplit_places205/{split}_places205.csv", LISTS) for split in ("train", "val")}
CATEGORIES = "trainvalsplit_places205/categoryIndex_places205.csv"
UNPACKED = ("data/vision/torralba/deeplearning/images256", "images256")  # where the archive puts the images
TOKEN = "no registers; logistic regression instead of the grid"


def read(folder: Path, options: Options) -> Data:
    """The training set, and the published validation set as "test"; classes as numbered in the lists.

    raises  UserError for a list or image that is missing, or a list of another form
    """
    names = _categories(folder)
    splits = {}
    for split, name in (("train", "train"), ("test", "val")):
        path = folder / NEEDS[name].path
        rows = _rows(path)
        base = _base(folder, rows, options["images"])
        splits[split] = files.labelled(base, rows, range(len(names)), path, NAME)
        files.present(splits[split].source, NAME, FOUND)
    return Data(splits, class_names=names)


def _rows(path: Path) -> list[tuple[str, str]]:
    """(class as it is written, file) of every row of a list."""
    found = files.matched(path, r"(.+) (\S+)", "a file, a space and the number of its class", NAME, LISTS)
    return [(number, file) for file, number in found]


def _categories(folder: Path) -> list[str]:
    """Names of the classes in the order of their numbers: "/a/abbey 0" is "abbey". Plain numbers without the file."""
    path = folder / CATEGORIES
    if not path.is_file():
        return [f"class {number}" for number in range(CLASSES)]
    rows = _rows(path)
    if [number for number, _ in rows] != [str(number) for number in range(len(rows))]:
        raise UserError(f"{NAME}: {path}: its {len(rows)} classes are not numbered 0..{len(rows) - 1}")
    return [name.strip("/").partition("/")[2] or name for _, name in rows]


def _base(folder: Path, rows: list[tuple[str, str]], given: str) -> Path:
    """The folder of images: the given one, or where the archive unpacks to."""
    if not given:
        return folder if (folder / rows[0][1]).exists() else files.first_existing(folder, UNPACKED)
    base = folder / Path(given).expanduser()
    if not base.is_dir():
        raise UserError(f"{NAME}.images={given}: {base} is not a folder; expected the one with the images of {IMAGES}")
    return base


def images(root: Path, split: str, options: Options, index_dir: str | None) -> Source:
    """The images of a published split, "train" or "val", without labels; `root` is the folder of all datasets.

    raises  UserError for a list or image that is missing
    """
    folder = BENCHMARK.find(root, ((NEEDS[split],),))
    rows = _rows(folder / NEEDS[split].path)
    source = files.paths_source(_base(folder, rows, options["images"]), (file for _, file in rows), NAME)
    return files.present(source, NAME, FOUND)


PUBLISHED = (
    *released((62.9, 66.2, 67.3, 67.5), f"{DINOV2}, Table 7"),
    Published("DINOv2 ViT-g/14", 68.2, BASELINE, "448 px; DINOv3's linear protocol"),
    *single_tokens("DINOv2 ViT-g/14", (66.4, 53.1, 55.1), TOKEN),
)

PRETRAINING = Pretraining(images, splits=("train", "val"), options=("images",))
BENCHMARK = Benchmark(
    name=NAME,
    title="Places205",
    classes=CLASSES,
    splits="2,448,873 / 20,500 (the published validation set)",
    folders=("places205", "Places205", "places"),
    layouts=((NEEDS["train"], NEEDS["val"]),),
    tasks=linear_tasks(read, {"train": 2_448_873, "test": 20_500}, PUBLISHED),
    download="imagesPlaces205_resize.tar.gz and trainvalsplit_places205.tar.gz",
    licence="registration with MIT CSAIL's terms; images not redistributable (unverified)",
    options={"images": option("", "folder of the images; by default where the archive unpacks to")},
    aliases=("places",),
)

if __name__ == "__main__":
    BENCHMARK.script()
