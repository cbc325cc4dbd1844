"""ImageNet-1k (ILSVRC 2012; Russakovsky et al., IJCV 2015): 1,000 classes, 1,281,167 training images.

Folders of classes, `train/<wnid>/` and `val/<wnid>/`, as torchvision lays them out; its `meta.bin`, where it is there,
has the classes' names. A class is the rank of its wnid in sorted order, never its name: two of the names occur twice.
The published validation set is what papers report on, so it is the split "test" here.
Protocols: DINOv2's linear grid (App. B.3) and weighted k-NN. Some files are CMYK, grey, or PNG under `.JPEG`; all are
believed by their content.
"""

import warnings
from pathlib import Path

import numpy as np

from dinoreg.data.declared import Pretraining
from dinoreg.data.folder_index import index_folder
from dinoreg.data.labelled_folder import class_folders
from dinoreg.data.source import PathSource, Source
from dinoreg.evaluation import published
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, linear_tasks
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.runtime.errors import UserError, reworded

NAME = "imagenet1k"
NEEDS = {
    "train": Need("train", "ILSVRC2012_img_train.tar, each of whose 1,000 tars becomes a folder train/<wnid>"),
    "val": Need("val", "ILSVRC2012_img_val.tar, sorted into folders val/<wnid>"),
}
TRAINED = ("", "supervised backbone", "image and text (Shutterstock)")
D2 = f"{published.DINOV2}, Table 4"
TOKEN = "no registers; logistic regression instead of the grid"
ANY_K = "which k is quoted is not stated"
HEAD = "released head on 1 block"


def read(folder: Path, options: Options) -> Data:
    """The training set, and the published validation set as "test"; a class's label is the rank of its wnid.

    raises  UserError for lists that are missing or damaged, and for classes of "test" that "train" does not have
    """
    train, train_labels, wnids = class_folders(folder / "train")  # in sorted order: a class is its rank
    test, test_labels, test_wnids = class_folders(folder / "val")
    unknown = sorted(set(test_wnids) - set(wnids))
    if unknown:
        raise UserError(f"{NAME}: {folder / 'val'} has images of {unknown[0]}, of which {folder / 'train'} has none")
    splits = {
        "train": Labelled(train, train_labels, len(wnids)),
        "test": Labelled(test, np.searchsorted(wnids, test_wnids)[test_labels], len(wnids)),
    }
    names = _names(folder)
    return Data(splits, class_names=[names.get(wnid, wnid) for wnid in wnids], extra={"wnids": wnids})


def _names(folder: Path) -> dict[str, str]:
    """What each wnid is called, of torchvision's meta.bin: a pickle, of which only containers of text are accepted."""
    path = folder / "meta.bin"
    if not path.is_file():
        return {}
    import torch  # here, so that the table of datasets does not wait for it

    # A pickle can be broken, or forbidden, in many ways.
    with reworded(f"{NAME}: {path} is not the file that torchvision writes and may be deleted", Exception):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings on other kinds of pickles, which do not apply
            names, wnids = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(text, str) for text in (*names, *wnids, *sum(names.values(), ()))):
            raise TypeError("expected names of wnids and a list of wnids")
        return {wnid: several[0] for wnid, several in names.items() if several}


def images(root: Path, split: str, options: Options, index_dir: str | None) -> Source:
    """The images of a published split, without labels.

    root       the folder of all datasets
    split      "train" or "val"
    index_dir  where the index of a folder is kept; None: the default place
    raises     UserError for a folder or list that is missing or damaged
    """
    folder = BENCHMARK.find(root, ((NEEDS[split],),)) / split
    return PathSource(str(folder), index_folder(folder, index_dir))


LINEAR = (
    *published.with_registers((84.3, 84.8, 84.7, 84.7, 78.2, 78.1), "Table 2a", TRAINED),
    *published.single_tokens("DINOv2 ViT-g/14", (86.0, 65.8, 69.0), TOKEN),
    *published.released((81.1, 84.5, 86.3, 86.5), D2),
    Published("DINOv2 ViT-g/14", 86.7, D2, "no registers, LVD-142M; 448 px"),
    *published.released((80.9, 84.6, 86.7, 87.1), published.CARD, registers=4),
    *published.released((80.8, 84.4, 86.5, 87.0), published.CARD, HEAD, registers=4),
    Published("DINOv2 ViT-g/14", 87.3, published.BASELINE, "448 px; DINOv3's linear protocol"),
    *published.at_test_time((86.36, 86.69, 86.38), "", (", ± 0.11", ", ± 0.09", ", ± 0.10")),
    Published("OpenCLIP ViT-B/16", 77.42, published.TEST_TIME, "image and text; no registers"),
)
KNN = (
    *published.released((79.0, 82.1, 83.5, 83.5), D2, ANY_K),
    *published.released((79.1, 82.0, 83.8, 83.7), published.CARD, ANY_K, registers=4),
)
ATTENTION = published.capi((79.2, 83.8, 83.6, 82.9), "its own head and settings")

PRETRAINING = Pretraining(images, splits=("train", "val"))
BENCHMARK = Benchmark(
    name=NAME,
    title="ImageNet-1k (ILSVRC 2012)",
    classes=1000,
    splits="1,281,167 / 50,000 (the published validation set)",
    folders=("imagenet1k", "imagenet-1k", "imagenet", "ImageNet", "ILSVRC2012", "in1k"),
    layouts=((NEEDS["train"], NEEDS["val"]),),
    tasks=linear_tasks(read, {"train": 1_281_167, "test": 50_000}, LINEAR, KNN, ATTENTION),
    download="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
    licence="account and terms of access: non-commercial research",
    aliases=("imagenet", "in1k", "imagenet-1k", "ilsvrc2012"),
)

if __name__ == "__main__":
    BENCHMARK.script()
