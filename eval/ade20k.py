"""ADE20K scene parsing (SceneParse150): a class out of 150 for every pixel, in photographs of all sizes.

Masks hold 0 for "other", which is ignored, and 1..150 for the classes of `objectInfo150.txt`.
The folders are the official split; there are no public labels for the test images, so validation is what is reported.
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Options, Published, Task, needs
from dinoreg.evaluation.data import Data, Segmented
from dinoreg.evaluation.published import BASELINE, DINOV2, at_test_time, capi, denoised, released, with_registers
from dinoreg.evaluation.readers.files import lines, missing, segmented
from dinoreg.runtime.errors import UserError

NAME = "ade20k"
ARCHIVE = "ADEChallengeData2016.zip"
NUM_CLASSES = 150
SPLITS = {"train": "training", "test": "validation"}
KINDS = ("images", "annotations")
NAMES_FILE = "objectInfo150.txt"


def read(folder: Path, options: Options) -> Data:
    """ "train" is the official training split, "test" the official validation split; 150 classes from 0, 255 ignored.

    raises  UserError for a missing image or mask, and for a list of classes that is missing or of another form; masks
            are
            checked on access, as in `read_mask`
    """
    splits = {split: _split(folder, part) for split, part in SPLITS.items()}
    return Data(splits=splits, class_names=_names(folder / NAMES_FILE))


def _split(folder: Path, part: str) -> Segmented:
    images, masks = folder / "images" / part, folder / "annotations" / part
    names = {path.stem for path in images.glob("[!.]*.jpg")}
    drawn = {path.stem for path in masks.glob("[!.]*.png")}
    if not names:
        raise UserError(f"{NAME}: {images} has no .jpg images; they come from {ARCHIVE}")
    for stem in sorted(names ^ drawn):
        raise missing(masks / f"{stem}.png" if stem in names else images / f"{stem}.jpg", NAME, ARCHIVE)
    return segmented(images, masks, sorted(names), range(1, NUM_CLASSES + 1), 0, NAME)


def _names(path: Path) -> list[str]:
    """The last column of 150 rows that are numbered from 1, below one row of titles."""
    rows = [line.split("\t") for line in lines(path, NAME, ARCHIVE)][1:]
    if [row[0].strip() for row in rows] != [str(number) for number in range(1, NUM_CLASSES + 1)]:
        expected = f"{NUM_CLASSES} with tabs between columns, numbered from 1"
        raise UserError(f"{NAME}: {path} has {len(rows)} rows below its titles, expected {expected}")
    return [row[-1].strip() for row in rows]


UNSTATED = "the head's settings are not stated; position tables interpolated with antialiasing"
MS = "+ms: last 4 blocks, 640 px windows, test at several scales"
D2 = f"{DINOV2}, Table 10"
SWEPT = "best of lr {1e-4, 3e-4, 1e-3} x weight decay {1e-4, 1e-3}; that the model has registers is inferred"
DVT = "Denoising ViT's code and settings"
PUBLISHED = (
    *with_registers((46.6, 47.9, 38.9, 39.1, 26.6, 26.7), "Table 2a", (UNSTATED,) * 3),
    *released((44.3, 47.3, 47.7, 49.0), D2),
    *released((47.2, 51.3, 53.1, 53.0), D2, MS, ending=", +ms"),
    Published("DINOv2 ViT-g/14, 4 registers", 49.5, BASELINE, SWEPT),
    *denoised((47.29, 48.22), (DVT, DVT)),
    *at_test_time((48.27, 49.07, 49.13, 40.14), f"{DVT}; "),
)

KNN = capi((35.2, 32.1, 29.7, 29.2), "neighbours and memory of its own code")
COUNTS = {"train": 20_210, "test": 2_000}

BENCHMARK = Benchmark(
    name=NAME,
    title="ADE20K (SceneParse150)",
    task="segmentation",
    classes=NUM_CLASSES,
    folders=("ADEChallengeData2016", "ade20k", "ADE20K", "ade/ADEChallengeData2016"),
    layouts=(needs(ARCHIVE, *(f"{kind}/{part}" for kind in KINDS for part in SPLITS.values()), NAMES_FILE),),
    tasks=(
        Task("segmentation", read, "mIoU", COUNTS, PUBLISHED),
        Task("knn_segmentation", read, "mIoU", COUNTS, KNN),
    ),
    download=f"{ARCHIVE} of the MIT Scene Parsing Benchmark (not the full ADE20K release, whose layout is another)",
    licence="BSD-3-Clause by a secondary source for the annotations; terms of the images were not verified",
)

if __name__ == "__main__":
    BENCHMARK.script()
