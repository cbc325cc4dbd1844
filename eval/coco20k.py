"""COCO-20k: the 19,817 images of train2014 that object discovery is measured on, without crowds.

`coco_20k_filenames.txt` of LOST's repository names them as `train2014/COCO_train2014_%012d.jpg`. train2017 holds the
same images under `%012d.jpg` with the same ids, so that either year's files serve; whether a box changed between the
two years' annotations was not verified; those of 2014 are read where both are there, and the result says which were.
"""

from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Task
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import corloc
from dinoreg.evaluation.readers.coco import positions, read_instances
from dinoreg.evaluation.readers.files import first_existing, matched, paths_source, require_distinct

NAME = "coco20k"
LIST = "LOST's repository (valeoai/LOST, datasets/coco_20k_filenames.txt)"
LISTS = tuple(f"{folder}coco_20k_filenames.txt" for folder in ("", "annotations/", "datasets/", "coco_20k/"))
YEARS = ("2014", "2017")
FILES = {"2014": "COCO_train2014_{:012d}.jpg", "2017": "{:012d}.jpg"}
FOLDERS = {year: (f"train{year}", f"images/train{year}") for year in YEARS}
JSON = "annotations/instances_train{}.json"


def read(folder: Path, options: Options) -> Data:
    """The listed images, in the list's order, called "test": discovery reports on all of them.

    raises  UserError for a list or annotations that are missing or of another form
    """
    list_file = first_existing(folder, LISTS)
    form = "train2014/COCO_train2014_<id>.jpg"
    ids = [int(number) for (number,) in matched(list_file, r"(?:.*_)?(\d{1,12})\.jpg", form, NAME, LIST)]
    require_distinct(ids, "image", f"{NAME}: {list_file}")
    path = first_existing(folder, [JSON.format(year) for year in YEARS])
    instances = read_instances(path, NAME, f"annotations_trainval{path.stem[-4:]}.zip", empty=False)
    places = positions(instances.ids, ids, f"{list_file} names image", f"{NAME}: {path}")
    images = first_existing(folder, [name for each in YEARS for name in FOLDERS[each]])
    source = paths_source(images, (FILES[images.name[-4:]].format(number) for number in ids), NAME)
    variant = f"boxes of {path.name}, images of {images.name}"
    split = instances.boxed(source, places)
    return Data({"test": split}, class_names=instances.categories, variant=variant, extra={"rule": "coco"})


PUBLISHED = corloc(
    registers=(26.9, 42.0, 10.7, 25.1, 31.0, 27.9),
    dino=(50.7, 50.0, 49.5),
    test_time=(25.4, 42.3, 41.9, 23.4),
    denoising=(23.4, 26.9),
    token_cut=45.4,
)

BENCHMARK = Benchmark(
    name=NAME,
    title="COCO-20k",
    task="discovery",
    classes=80,
    folders=("coco", "coco20k", "coco2014", "coco2017", "COCO", "mscoco"),
    layouts=tuple(
        (
            Need(list_file, LIST),
            Need(JSON.format(boxes), f"annotations_trainval{boxes}.zip"),
            Need(images, f"train{of_images}.zip"),
        )
        for list_file in LISTS
        for boxes in YEARS
        for of_images in sorted(YEARS, key=lambda year: year != boxes)
        for images in FOLDERS[of_images]
    ),
    tasks=(Task("discovery", read, "CorLoc", {"test": 19_817}, PUBLISHED),),
    download=f"the list of {LIST}; train2014.zip with annotations_trainval2014.zip, or those of 2017",
    licence="photographs of Flickr under Flickr's terms; annotations CC BY 4.0 as commonly stated, unverified",
    aliases=("coco-20k", "coco_20k"),
)

if __name__ == "__main__":
    BENCHMARK.script()
