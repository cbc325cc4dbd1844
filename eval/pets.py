"""Oxford-IIIT Pets (Parkhi et al., CVPR 2012): 37 breeds of cats and dogs, about 200 photographs each.

`images/<Breed>_<number>.jpg`, listed in `annotations/{trainval,test}.txt` as `name class species breed`, all counted
from 1; only the class is used. Some files hold PNG or GIF under `.jpg`, some have palettes or alpha, and stray `.mat`
files lie among them: the lists say what counts, and the bytes say what a file is. Metric: mean per class (SimCLR
B.8.1); 20 images of each class are held out of trainval for choosing C (BYOL, App. D: 2,940 / 740).
"""

from dataclasses import replace
from pathlib import Path

from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import labelled, matched
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "pets", "annotations.tar.gz"
CLASSES = 37
ROW = r"#.*|(\S+)\s+(\S+)\s+\S+\s+\S+"  # or a comment


def read(folder: Path, options: Options) -> Data:
    """trainval as "train", and "test", in the order of their files.

    raises  UserError for a list that is missing or of another form, or that gives two breeds one class
    """
    splits, breeds = {}, dict[int, str]()
    for split, file in (("train", "trainval"), ("test", "test")):
        path = folder / "annotations" / f"{file}.txt"
        found = matched(path, ROW, "name, class, species and breed", NAME, ARCHIVE)
        rows = [(number, f"{name}.jpg") for name, number in found if name]
        splits[split] = labelled(folder / "images", rows, range(1, CLASSES + 1), path, NAME)
        for (_, name), label in zip(rows, splits[split].labels.tolist(), strict=True):
            breed = name.rsplit("_", 1)[0]
            if breeds.setdefault(label, breed) != breed:
                raise UserError(f"{NAME}: {folder / 'annotations'}: class {label + 1} is {breeds[label]} and {breed}")
    names = [breeds.get(label, f"class {label + 1}") for label in range(max(breeds) + 1)]
    splits = {split: replace(part, num_classes=len(names)) for split, part in splits.items()}
    return Data(splits, class_names=[name.replace("_", " ").title() for name in names])


COUNTS = {"train": 3_680, "test": 3_669}
PUBLISHED = fine_grained((95.1, 96.2, 96.6, 96.7), 96.8, (96.9, 47.8, 94.1))

BENCHMARK = Benchmark(
    name=NAME,
    title="Oxford-IIIT Pets",
    classes=CLASSES,
    folders=("oxford-iiit-pet", "oxford_iiit_pet", "pets", "Pets"),
    layouts=((*needs("images.tar.gz", "images"), *needs(ARCHIVE, "annotations/trainval.txt", "annotations/test.txt")),),
    tasks=classification_tasks(
        read, "mean per class", COUNTS, PUBLISHED, validation_images=740, knn_metric="mean per class"
    ),
    licence="CC BY-SA 4.0 as commonly stated; unverified",
    aliases=("oxford-iiit-pet", "oxford-iiit-pets", "pet"),
)

if __name__ == "__main__":
    BENCHMARK.script()
