"""ImageNet-1k (ILSVRC 2012; Russakovsky et al., IJCV 2015): 1,000 classes, 1,281,167 training images.

Folders of classes, `train/<wnid>/` and `val/<wnid>/`, as torchvision lays them out, with its `meta.bin` or without; a
flat `val/` is read where `meta.bin` says which image is of which class. DINOv2's `extra/entries-{TRAIN,VAL}.npy`
spare the listing of folders where they are there. A class is the rank of its wnid in sorted order, never its name:
two of the names occur twice. The published validation set is what papers report on, so it is the split "test" here.
Protocols: DINOv2's linear grid (App. B.3) and weighted k-NN. Some files are CMYK, grey, or PNG under `.JPEG`; all are
believed by their content.
"""

import os
import warnings
from pathlib import Path

import numpy as np

from dinoreg.commands.main import script
from dinoreg.config.option import option
from dinoreg.data.declared import Pretraining
from dinoreg.data.folder_index import index_folder
from dinoreg.data.labelled_folder import class_folders
from dinoreg.data.source import PathSource, Source
from dinoreg.evaluation import published
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, linear_tasks
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.files import lines, paths_source, present
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.regular_files import load_array

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

Meta = tuple[dict[str, tuple[str, ...]], list[str]]  # names of each wnid; wnids of the validation images in their order


def read(folder: Path, options: Options) -> Data:
    """The training set, and the published validation set as "test"; a class's label is the rank of its wnid.

    raises  UserError for lists that are missing or damaged, and for classes of "test" that "train" does not have
    """
    meta = _meta(folder)
    train, train_wnids = _listed(folder, "train", options["extra"], meta)
    test, test_wnids = _listed(folder, "val", options["extra"], meta)
    wnids, train_labels = np.unique(train_wnids, return_inverse=True)  # sorted: a class is its rank
    unknown = np.setdiff1d(test_wnids, wnids)
    if len(unknown):
        raise UserError(f"{NAME}: {folder / 'val'} has images of {unknown[0]}, of which {folder / 'train'} has none")
    splits = {
        "train": Labelled(train, train_labels, len(wnids)),
        "test": Labelled(test, np.searchsorted(wnids, test_wnids), len(wnids)),
    }
    names = _names(folder, meta)
    found = wnids.tolist()
    return Data(splits, class_names=[names.get(wnid, wnid) for wnid in found], extra={"wnids": found})


def _listed(folder: Path, split: str, extra: str, meta: Meta | None) -> tuple[Source, np.ndarray]:
    """The images of a published split, and the wnid of each."""
    entries = _entries(folder, split, extra)
    if entries.is_file():
        return _from_entries(folder, split, entries)
    if extra:
        raise UserError(f"{NAME}: {entries} is missing; it comes from DINOv2's ImageNet.dump_extra")
    below = folder / split
    with os.scandir(below) as entries_below:
        sorted_out = any(entry.is_dir() for entry in entries_below)
    if sorted_out:
        source, labels, wnids = class_folders(below)
        return source, np.array(wnids)[labels]
    if split != "val" or meta is None:
        how = f", or torchvision's meta.bin in {folder}" if split == "val" else ""
        raise UserError(f"{NAME}: {below} has no folders of classes; expected {below}/<wnid>/<image>.JPEG{how}")
    source = PathSource(str(below), index_folder(below))
    wnid_of = {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(meta[1], 1)}
    stems = [Path(source.name(index)).stem for index in range(len(source))]
    if unknown := [place for place, stem in enumerate(stems) if stem not in wnid_of]:
        path, count = source.name(unknown[0]), len(wnid_of)
        raise UserError(f"{NAME}: {path} is not one of the {count} images that meta.bin has classes for")
    return source, np.array([wnid_of[stem] for stem in stems])


def _entries(folder: Path, split: str, extra: str) -> Path:
    return folder / Path(extra or "extra").expanduser() / f"entries-{split.upper()}.npy"


def _from_entries(folder: Path, split: str, entries: Path) -> tuple[Source, np.ndarray]:
    """From DINOv2's table: the number in the file's name, and the wnid."""
    with reworded(f"{NAME}: {entries} is not a readable array", OSError, ValueError):
        table = load_array(entries)
    if table.ndim != 1 or not {"actual_index", "class_id"} <= set(table.dtype.names or ()):
        raise UserError(f"{NAME}: {entries} has no columns actual_index and class_id")
    wnids, numbers = table["class_id"], table["actual_index"]
    form = "train/{0}/{0}_{1}.JPEG" if split == "train" else "val/{0}/ILSVRC2012_val_{1:08d}.JPEG"
    paths = [form.format(wnid, number) for wnid, number in zip(wnids, numbers)]
    return present(paths_source(folder, paths, NAME), NAME, NEEDS[split].archive), wnids


def _meta(folder: Path) -> Meta | None:
    """torchvision's meta.bin, if it exists: a pickle, of which only plain containers of text are accepted."""
    path = folder / "meta.bin"
    if not path.is_file():
        return None
    import torch  # here, so that the table of datasets does not wait for it

    # A pickle can be broken, or forbidden, in many ways.
    with reworded(f"{NAME}: {path} is not the file that torchvision writes and may be deleted", Exception):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings on other kinds of pickles, which do not apply
            names, wnids = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(text, str) for text in (*names, *wnids, *sum(names.values(), ()))):
            raise TypeError("expected names of wnids and a list of wnids")
    return names, wnids


def _names(folder: Path, meta: Meta | None) -> dict[str, str]:
    """What each wnid is called, from meta.bin or labels.txt; for show only."""
    if meta is not None:
        return {wnid: names[0] for wnid, names in meta[0].items() if names}
    path = folder / "labels.txt"
    if not path.is_file():
        return {}
    rows = (line.partition(",") for line in lines(path, NAME, "DINOv2's labels.txt"))
    return {wnid.strip(): name.strip().strip('"') for wnid, _, name in rows}


def images(root: Path, split: str, options: Options, index_dir: str | None) -> Source:
    """The images of a published split, without labels.

    root       the folder of all datasets
    split      "train" or "val"
    index_dir  where the index of a folder is kept; None: the default place
    raises     UserError for a folder or list that is missing or damaged
    """
    folder = BENCHMARK.find(root, ((NEEDS[split],),))
    if options["extra"] or _entries(folder, split, "").is_file():
        return _listed(folder, split, options["extra"], None)[0]
    return PathSource(str(folder / split), index_folder(folder / split, index_dir))


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

PRETRAINING = Pretraining(images, splits=("train", "val"), options=("extra",))
BENCHMARK = Benchmark(
    name=NAME,
    title="ImageNet-1k (ILSVRC 2012)",
    classes=1000,
    splits="1,281,167 / 50,000 (the published validation set)",
    folders=("imagenet1k", "imagenet-1k", "imagenet", "ImageNet", "ILSVRC2012", "in1k"),
    layouts=((NEEDS["train"], NEEDS["val"]),),
    tasks=linear_tasks(read, {"train": 1_281_167, "test": 50_000}, LINEAR, KNN, ATTENTION),
    download="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (ILSVRC2012_devkit_t12.tar.gz for a flat val/)",
    licence="account and terms of access: non-commercial research",
    options={"extra": option("", "folder of DINOv2's entries-*.npy; by default `extra`, where there is one")},
    aliases=("imagenet", "in1k", "imagenet-1k", "ilsvrc2012"),
)

if __name__ == "__main__":
    script(BENCHMARK)
