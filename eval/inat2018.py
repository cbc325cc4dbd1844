"""iNaturalist 2018 (Van Horn et al., CVPR 2018): 8,142 species with a long tail, 437,513 training images.

`train2018.json` and `val2018.json` (COCO-like) list the images below `train_val2018/`; an image and its category are
joined by `image_id`, never by position. The test set has no public labels, so papers report on val, which is the
split "test" here: three images of every class, so that micro and macro accuracy are one. Protocol: DINOv2's linear
grid (App. B.3), weighted k-NN besides. torchvision's reader does not look at the json and so mixes both splits; it is
not used.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.data.declared import Pretraining
from dinoreg.data.source import PathSource, Source
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, linear_tasks
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import BASELINE, CARD, DINOV2, released
from dinoreg.evaluation.readers.coco import category_name, converted, image_file, positions, read_lists
from dinoreg.evaluation.readers.files import paths_source, present
from dinoreg.runtime.errors import UserError

NAME, IMAGES = "inat2018", "train_val2018.tar.gz"
NEEDS = {split: Need(f"{split}2018.json", f"{split}2018.json.tar.gz") for split in ("train", "val")}


def read(folder: Path, options: Options) -> Data:
    """The training set, and the published validation set as "test"; 8,142 classes in the order of their ids.

    raises  UserError for a JSON file or image that is missing, or annotations that do not fit
    """
    where, elements = _lists(folder, "train", "categories")
    names = dict(converted(elements, category_name, "a category without id and name", where))
    ids = np.array(sorted(names))  # 0..8141 in the official file, which makes the ids the labels
    splits = {"train": _split(folder, "train", ids), "test": _split(folder, "val", ids)}
    return Data(splits, class_names=[names[category] for category in sorted(names)])


def _split(folder: Path, split: str, ids: np.ndarray) -> Labelled:
    """The images in the file's order, each with the rank of its category among the ids."""
    where, elements, annotations = _lists(folder, split, "images", "annotations")
    source, images = _source(folder, where, elements)
    lacking = "an annotation without image_id and category_id"
    category_of = dict(
        converted(annotations, lambda each: (int(each["image_id"]), int(each["category_id"])), lacking, where)
    )
    if len(category_of) != len(annotations) or len(set(images)) != len(images) or not category_of.keys() >= {*images}:
        raise UserError(f"{where}: expected each image once, and one annotation of each")
    categories = np.array([category_of[image] for image in images])
    return Labelled(source, positions(ids, categories, "an image is of category", where), len(ids))


def _source(folder: Path, where: str, elements: list[Any]) -> tuple[PathSource, list[int]]:
    """The images in the file's order, and their ids."""
    files = list(converted(elements, image_file, "an image without id and file_name", where))
    return present(paths_source(folder, (file for _, file in files), NAME), NAME, IMAGES), [each for each, _ in files]


def _lists(folder: Path, split: str, *names: str) -> tuple[Any, ...]:
    """The name of a split's file in messages, and its lists of these names."""
    path = folder / NEEDS[split].path
    return f"{NAME}: {path}", *read_lists(path, names, NAME, NEEDS[split].archive)


def images(root: Path, split: str, options: Options, index_dir: str | None) -> Source:
    """The images of a published split, "train" or "val", without labels; `root` is the folder of all datasets.

    raises  UserError for a JSON file or image that is missing
    """
    folder = BENCHMARK.find(root, ((NEEDS[split],),))
    return _source(folder, *_lists(folder, split, "images"))[0]


PUBLISHED = (
    *released((69.0, 76.4, 80.4, 81.6), f"{DINOV2}, Table 7"),
    *released((69.5, 76.3, 79.8, 81.6), CARD),
    *released((67.6, 73.8, 80.9, 81.5), CARD, registers=4),
    Published("DINOv2 ViT-g/14", 80.7, BASELINE, "448 px; DINOv3's linear protocol"),
)

PRETRAINING = Pretraining(images, splits=("train", "val"))
BENCHMARK = Benchmark(
    name=NAME,
    title="iNaturalist 2018",
    classes=8142,
    splits="437,513 / 24,426 (the published validation set)",
    folders=("inat2018", "inaturalist2018", "iNaturalist2018", "inat", "inaturalist"),
    layouts=((NEEDS["train"], NEEDS["val"], Need("train_val2018", IMAGES)),),
    tasks=linear_tasks(read, {"train": 437_513, "test": 24_426}, PUBLISHED),
    download="train_val2018.tar.gz, train2018.json.tar.gz and val2018.json.tar.gz (visipedia/inat_comp, 2018)",
    licence="non-commercial research, no redistribution; a licence per image in the json",
    aliases=("inaturalist2018", "inat", "inaturalist"),
)

if __name__ == "__main__":
    BENCHMARK.script()
