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

from dinoreg.commands.main import script
from dinoreg.data.declared import Pretraining
from dinoreg.data.source import PathSource, Source
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, linear_tasks
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import BASELINE, CARD, DINOV2, released
from dinoreg.evaluation.readers.files import paths_source, present, read_json
from dinoreg.runtime.errors import UserError

NAME, IMAGES = "inat2018", "train_val2018.tar.gz"
NEEDS = {split: Need(f"{split}2018.json", f"{split}2018.json.tar.gz") for split in ("train", "val")}


def read(folder: Path, options: Options) -> Data:
    """The training set, and the published validation set as "test"."""
    content = _content(folder, "train")
    path = folder / NEEDS["train"].path
    try:
        names = {int(each["id"]): str(each["name"]) for each in content["categories"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{NAME}: {path} has no list of categories with id and name") from None
    ids = sorted(names)  # 0..8141 in the official file, which makes the ids the labels
    ranks = {category: rank for rank, category in enumerate(ids)}
    train = _split(folder, "train", content, ranks)
    test = _split(folder, "val", _content(folder, "val"), ranks)
    return Data({"train": train, "test": test}, class_names=[names[category] for category in ids])


def _split(folder: Path, split: str, content: dict[str, Any], ranks: dict[int, int]) -> Labelled:
    """The images in the file's order, each with its label."""
    path = folder / NEEDS[split].path
    try:
        category = {int(each["image_id"]): int(each["category_id"]) for each in content["annotations"]}
        count = len(content["annotations"])
        images = [int(each["id"]) for each in content["images"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{NAME}: {path} has no annotations with image_id and category_id") from None
    if len(category) != count or len(set(images)) != len(images):
        raise UserError(f"{NAME}: {path} has two annotations of one image, or two images of one id")
    labels = np.empty(len(images), dtype=np.int64)
    for position, image in enumerate(images):
        if image not in category:
            raise UserError(f"{NAME}: {path}: image {image} has no annotation")
        if category[image] not in ranks:
            raise UserError(
                f"{NAME}: {path}: image {image} is of category {category[image]}, which is out of range: "
                f"{NEEDS['train'].path} has {len(ranks)} categories"
            )
        labels[position] = ranks[category[image]]
    return Labelled(_source(folder, split, content), labels, len(ranks))


def _source(folder: Path, split: str, content: dict[str, Any]) -> PathSource:
    path = folder / NEEDS[split].path
    try:
        files = [str(each["file_name"]) for each in content["images"]]
    except (KeyError, TypeError):
        raise UserError(f"{NAME}: {path} has no images with id and file_name") from None
    return present(paths_source(folder, files, NAME), NAME, IMAGES)


def _content(folder: Path, split: str) -> dict[str, Any]:
    path, archive = folder / NEEDS[split].path, NEEDS[split].archive
    content = read_json(path, NAME, archive)
    if not isinstance(content, dict):
        raise UserError(f"{NAME}: {path} is not the object with images and annotations that {archive} holds")
    return content


def images(root: Path, split: str, options: Options, index_dir: str | None) -> Source:
    """The images of a published split, without labels."""
    folder = BENCHMARK.find(root, ((NEEDS[split],),))
    return _source(folder, split, _content(folder, split))


PRETRAINING = Pretraining(images, splits=("train", "val"))
BENCHMARK = Benchmark(
    name=NAME,
    title="iNaturalist 2018",
    classes=8142,
    splits="437,513 / 24,426 (the published validation set)",
    folders=("inat2018", "inaturalist2018", "iNaturalist2018", "inat", "inaturalist"),
    layouts=((NEEDS["train"], NEEDS["val"], Need("train_val2018", IMAGES)),),
    tasks=linear_tasks(
        read,
        {"train": 437_513, "test": 24_426},
        linear=(
            *released((69.0, 76.4, 80.4, 81.6), f"{DINOV2}, Table 7"),
            *released((69.5, 76.3, 79.8, 81.6), CARD),
            *released((67.6, 73.8, 80.9, 81.5), CARD, registers=4),
            Published("DINOv2 ViT-g/14", 80.7, BASELINE, "448 px; DINOv3's linear protocol"),
        ),
    ),
    download="train_val2018.tar.gz, train2018.json.tar.gz and val2018.json.tar.gz (visipedia/inat_comp, 2018)",
    licence="non-commercial research, no redistribution; a licence per image in the json",
    aliases=("inaturalist2018", "inat", "inaturalist"),
)

if __name__ == "__main__":
    script(BENCHMARK)
