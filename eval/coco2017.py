"""COCO 2017 (Lin et al., ECCV 2014; the 2017 split): boxes of 80 classes, their ids 1..90 with gaps.

`train2017/`, `val2017/` (also below `images/`) and `annotations/instances_{train,val}2017.json`. Images without any
object stay: false detections in them count. Boxes without width or height are dropped from training only. The test
labels are withheld: val is what is reported.
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Task, needs
from dinoreg.evaluation.data import Boxed, Data
from dinoreg.evaluation.readers.coco import read_instances
from dinoreg.evaluation.readers.files import paths_source
from dinoreg.runtime.errors import UserError

NAME = "coco2017"
BOXES = "annotations_trainval2017.zip"
SPLITS = {"train": "train2017", "test": "val2017"}


def read(folder: Path, options: Options) -> Data:
    """train2017 to learn from, and val2017, called "test", to report on.

    raises  UserError for annotations that are missing or of another form
    """
    splits: dict[str, Boxed] = {}
    categories: list[str] = []
    for split, name in SPLITS.items():
        path = folder / "annotations" / f"instances_{name}.json"
        instances = read_instances(path, NAME, BOXES, empty=split != "train")
        if categories and instances.categories != categories:
            raise UserError(f"{NAME}: {path} has other categories than those of {SPLITS['train']}")
        categories = instances.categories
        images = folder / name if (folder / name).is_dir() else folder / "images" / name
        splits[split] = instances.boxed(paths_source(images, instances.files, NAME))
    return Data(splits, class_names=categories, variant="val2017", extra={"rule": "coco"})


BENCHMARK = Benchmark(
    name=NAME,
    title="COCO 2017",
    task="detection",
    classes=80,
    folders=("coco", "coco2017", "COCO", "COCO2017", "mscoco"),
    layouts=tuple(
        (
            *needs(BOXES, *(f"annotations/instances_{name}.json" for name in SPLITS.values())),
            *(Need(f"{below}{name}", f"{name}.zip") for name in SPLITS.values()),
        )
        for below in ("", "images/")
    ),
    tasks=(Task("detection", read, "AP", {"train": 118_287, "test": 5_000}),),
    download=f"train2017.zip, val2017.zip and {BOXES}",
    licence="photographs of Flickr under Flickr's terms; annotations CC BY 4.0 as commonly stated, unverified",
    aliases=("coco",),
)

if __name__ == "__main__":
    BENCHMARK.script()
