"""Anybody's own data as a benchmark: `dinoreg eval PATH weights=…`, PATH being a folder or a table.

- a folder with a subfolder for each class, or `train/`, `val/`, `test/` with such subfolders
- a CSV, TSV or parquet file of paths and labels (`tables`), one or several labels an image
- `images/` with `masks/` or `depth/` (`pairs`)

Where no split is given, a seeded share of every class is held out, and the result says so.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.config.bundled import bundled
from dinoreg.config.option import option
from dinoreg.data.copies import MOST_COMPARED, find_copies
from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.source import ChosenSource, PathSource
from dinoreg.evaluation.benchmark import Benchmark, Reader, Task, counts_in_words
from dinoreg.evaluation.custom.pairs import depths, find_pairs, kinds_of_pairs, segmented
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, copies_across, parts
from dinoreg.evaluation.custom.tables import SUFFIXES, Table, read_table
from dinoreg.evaluation.data import Data, Labelled, MultiLabelled
from dinoreg.runtime.errors import UserError

NAME = "own"
SHARE = "a share between 0 and 1"
OPTIONS = {
    "test_share": option(0.2, "of each class, held out where no split is given", above=0, below=1, expected=SHARE),
    "seed": option(0, "of that hold-out", low=0),
    "labels": option("", "of a table: the columns that hold labels, with commas between; empty: label, or all others"),
    "root": option("", "of a table: the folder that its paths begin at and must stay in; empty: the table's own"),
}
BLANK = Benchmark(NAME, "", None, (), (), tasks=(), download="", licence="your own", options=OPTIONS, aliases=(NAME,))
EPOCH_STEPS = (100, 1250)  # fewest and most steps in one of the linear protocol's ten epochs
PAIRS = {"masks": ("segmentation", "mIoU", segmented), "depth": ("depth", "RMSE", depths)}


def own_benchmark(path: Path, options: Mapping[str, Any]) -> Benchmark:
    """The data at a path as a benchmark, ready to be read; its lists are read once, here.

    options  the values given as own.KEY=VALUE (OPTIONS)

    Raises UserError, in one line, for a path that is none of the kinds above and for anything wrong with its lists.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path}: does not exist, expected a folder or a {', '.join(SUFFIXES)} file")
    values = BLANK.option_values(options)
    # The given values become the defaults, so that a reader called without options uses them as well.
    given = {name: field(default=values[name], metadata=each.metadata) for name, each in OPTIONS.items()}
    blank = replace(BLANK, name=_name(path), title=path.name, folders=(str(path),), options=given)
    if path.is_dir() and (kinds := kinds_of_pairs(path)):
        return _of_pairs(blank, path, kinds, values["test_share"], values["seed"])
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: is a file, expected a folder or a {', '.join(SUFFIXES)} file")
    if path.is_dir():
        table = _read_folder(path)
    else:
        root, labels = values["root"], [name.strip() for name in values["labels"].split(",") if name.strip()]
        if root and not Path(root).expanduser().is_dir():
            raise UserError(f"own.root={root}: is not a folder")
        table = read_table(path, Path(root).expanduser() if root else path.parent, labels)
    return _of_labels(blank, _split(table, path, values["test_share"], values["seed"]))


def _of_pairs(blank: Benchmark, path: Path, kinds: list[str], share: float, seed: int) -> Benchmark:
    tasks = []
    for kind in kinds:
        protocol, metric, read = PAIRS[kind]
        pairs, variant = find_pairs(path, kind, share, seed)
        tasks.append(Task(protocol, _reader(read, path, pairs, variant), metric))
    splits = counts_in_words({split: len(images) for split, (images, _) in pairs.items()})
    return replace(blank, task=" and ".join(task.protocol for task in tasks), splits=splits, tasks=tuple(tasks))


def _of_labels(blank: Benchmark, data: Data) -> Benchmark:
    read = _reader(lambda: data)
    train = data.splits["train"]
    if isinstance(train, MultiLabelled):
        kind, tasks = "multi-label classification", [Task("multilabel", read, "all-points mAP")]
    else:
        # On cached features a step costs next to nothing, and few images need few of them; the head is chosen on
        # held-out training images, so that the reported ones stay unseen.
        steps = int(np.clip(-(-len(train) // 1024), *EPOCH_STEPS))
        options = {"linear": {"augment": False, "choose_on": "train", "epoch_steps": steps}}
        protocols = ("logistic", "linear", "knn", "few_shot")
        kind, tasks = "classification", [Task(each, read, "top-1", options=options.get(each, {})) for each in protocols]
    splits = counts_in_words({name: len(part) for name, part in data.splits.items()})
    return replace(blank, task=kind, classes=train.num_classes, splits=splits, tasks=tuple(tasks))


def _reader(read: Callable[..., Data], *arguments: Any) -> Reader:
    """A reader that knows its folder and options already."""
    return lambda _folder, _options: read(*arguments)


def _read_folder(path: Path) -> Table:
    """Folders of classes, or of splits that hold such folders."""
    index = index_folder(path)
    files = [name for name in (index[number] for number in range(len(index))) if os.sep in name]
    in_splits = _has_split_folders(path, files)
    for file in files:
        if in_splits and file.count(os.sep) < 2:
            raise UserError(f"{path / file}: lies in a split but in no class, expected SPLIT/CLASS/IMAGE")
    names, labels = np.unique([file.split(os.sep)[in_splits] for file in files], return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{path}: has images in {len(names)} folder(s), expected one per class, at least two")
    words = [SPLIT_WORDS[file.split(os.sep)[0].lower()] for file in files] if in_splits else None
    return Table(path, files, labels, names.tolist(), words)


def _has_split_folders(path: Path, files: list[str]) -> bool:
    """Whether the subfolders that hold images are splits, not classes: `train` is one, and all are called so."""
    folders = sorted({file.split(os.sep)[0] for file in files})
    words = {SPLIT_WORDS.get(name.lower()) for name in folders}
    if None in words and {"train", "test"} <= words:
        other = next(name for name in folders if name.lower() not in SPLIT_WORDS)
        raise UserError(f"{path}: holds {other}/ beside train and test, expected folders of splits or of classes")
    return "train" in words and None not in words


def _split(table: Table, path: Path, share: float, seed: int) -> Data:
    """The images of each split, with one label or several."""
    labels, names = table.labels, table.class_names
    several = labels.ndim == 2
    everything = PathSource(str(table.root), PathBlock.of(list(table.paths)))
    copies = find_copies(everything) if len(everything) <= MOST_COMPARED else None
    rows, variant = parts(table.words, _rarest(labels) if several else labels, share, seed, path, copies=copies)
    warnings = copies_across(rows, copies) if copies is not None else []
    if not several:
        for split, part in rows.items():
            unseen = np.setdiff1d(labels[part], labels[rows["train"]])
            if len(unseen):
                raise UserError(f"{path}: the class {names[unseen[0]]!r} is in {split} but not in train")
    kind = MultiLabelled if several else Labelled
    splits = {}
    for split, part in rows.items():
        source = ChosenSource(everything, part)
        source.as_trained = True
        splits[split] = kind(source, labels[part], len(names))
    return Data(splits, names, variant, {"warnings": warnings})


def _rarest(labels: np.ndarray) -> np.ndarray:
    """The rarest label of each image, (n, K) -> (n,), K for an image without any: the groups of a balanced hold-out."""
    present = labels == 1
    count = np.where(present.any(axis=0), present.sum(axis=0), len(labels) + 1)
    rank = np.where(present, count[None], len(labels) + 1)
    return np.where(present.any(axis=1), rank.argmin(axis=1), labels.shape[1])


def _name(path: Path) -> str:
    """What results are called: the folder's name, and of a table also its own; never that of a shipped dataset."""
    text = f"{path.parent.name}_{path.stem}" if path.is_file() else path.name
    name = re.sub(r"[^\w.-]+", "_", text).strip("._") or NAME
    return f"{NAME}_{name}" if (bundled("eval") / f"{name}.py").exists() else name
