"""Anybody's own data as a benchmark: `dinoreg eval PATH weights=…`, PATH being a folder or a table.

- a folder with a subfolder for each class, or `train/`, `val/`, `test/` with such subfolders
- a CSV, TSV or parquet file of paths and labels (`own_lists`), one or several labels an image
- `images/` with `masks/` or `depth/` (`own_pairs`)

Where no split is given, a seeded share of every class is held out, and the result says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.config.bundled import bundled
from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.open import labelled_folder
from dinoreg.data.sources import PathSource
from dinoreg.evaluation.benchmark import Benchmark, Option, Task
from dinoreg.evaluation.custom.pairs import Pairs, depths, find_pairs, kinds_of_pairs, segmented
from dinoreg.evaluation.custom.splits import SPLIT_WORDS, parts
from dinoreg.evaluation.custom.tables import SUFFIXES, Table, read_table
from dinoreg.evaluation.data import Data, Labelled, MultiLabelled
from dinoreg.runtime.errors import UserError

NAME = "own"
OPTIONS = (
    Option("test_share", 0.2, "share of each class that is held out for testing where no split is given"),
    Option("seed", 0, "of that hold-out"),
    Option("labels", "", "of a table: the columns that hold labels, with commas between; empty: label, or all others"),
    Option("root", "", "of a table: the folder that its paths begin at and must stay in; empty: the table's own"),
)
EPOCH_STEPS = (100, 1250)  # fewest and most steps in one of the linear protocol's ten epochs


@dataclass(frozen=True)
class _Choices:
    test_share: float
    seed: int
    labels: str
    root: str

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.labels.split(",") if name.strip())


def own_benchmark(path: Path, options: Mapping[str, Any]) -> Benchmark:
    """The data at a path as a benchmark, ready to be read; its lists are read once, here.

    options  what was given as own.KEY=VALUE (OPTIONS)

    Raises UserError, in one line, for a path that is none of the kinds above and for anything wrong with its lists.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path}: does not exist, expected a folder or a {', '.join(SUFFIXES)} file")
    blank = Benchmark(
        name=NAME,
        title=path.name,
        task="",
        classes=None,
        splits="",
        folders=(str(path),),
        layouts=(),
        tasks=(),
        download="",
        licence="your own",
        options=OPTIONS,
        aliases=(NAME,),
    )
    values = blank.option_values(options)
    # What was given is the default from here on, whether or not the reader is told again.
    blank = replace(
        blank,
        name=_name(path),
        options=tuple(replace(option, default=values[option.name]) for option in OPTIONS),
    )
    if path.is_dir() and (kinds := kinds_of_pairs(path)):
        return _of_pairs(blank, path, kinds, values)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: is a file, expected a folder or a {', '.join(SUFFIXES)} file")
    return _of_labels(blank, _cached(partial(_read, path)), values)


def _of_pairs(blank: Benchmark, path: Path, kinds: list[str], values: Mapping[str, Any]) -> Benchmark:
    readers = {"masks": ("segmentation", "mIoU", segmented), "depth": ("depth", "RMSE", depths)}
    tasks: list[Task] = []
    counts = ""
    for kind in kinds:
        protocol, metric, reader = readers[kind]
        pairs = find_pairs(path, kind)
        rows, _ = pairs.split(values["test_share"], values["seed"])
        counts = _counts({name: len(part) for name, part in rows.items()})
        tasks.append(Task(protocol=protocol, read=_cached(partial(_read_pairs, reader, pairs)), metric=metric))
    titles = " and ".join({"masks": "segmentation", "depth": "depth"}[kind] for kind in kinds)
    return replace(blank, task=titles, splits=counts, tasks=tuple(tasks))


def _read_pairs(reader: Callable[[Pairs, float, int], Data], pairs: Pairs, choices: _Choices) -> Data:
    return reader(pairs, choices.test_share, choices.seed)


def _of_labels(blank: Benchmark, read: Callable[[Path, Mapping[str, Any]], Data], values: dict[str, Any]) -> Benchmark:
    data = read(Path(), values)
    train = data.splits["train"]
    if isinstance(train, MultiLabelled):
        tasks: tuple[Task, ...] = (Task(protocol="multilabel", read=read, metric="all-points mAP"),)
    else:
        # On cached features a step costs next to nothing, and few images need few of them; the head is chosen on
        # held-out training images, so that the reported ones stay unseen.
        steps = int(np.clip(-(-len(train) // 1024), *EPOCH_STEPS))
        linear = {"augment": False, "choose_on": "train", "epoch_steps": steps}
        tasks = (
            Task(protocol="logistic", read=read, metric="top-1"),
            Task(protocol="linear", read=read, metric="top-1", options=linear),
            Task(protocol="knn", read=read, metric="top-1"),
            Task(protocol="few_shot", read=read, metric="top-1"),
        )
    return replace(
        blank,
        task="multi-label classification" if isinstance(train, MultiLabelled) else "classification",
        classes=train.num_classes,
        splits=_counts({name: len(part) for name, part in data.splits.items()}),
        tasks=tasks,
    )


def _cached(read: Callable[[_Choices], Data]) -> Callable[[Path, Mapping[str, Any]], Data]:
    """A reader that reads once for each set of options, however many protocols ask; the folder it knows already."""
    once = lru_cache(maxsize=1)(read)
    return lambda _folder, options: once(_Choices(**options))


def _read(path: Path, choices: _Choices) -> Data:
    if path.is_dir():
        return _from_split_folders(path, choices) if _has_split_folders(path) else _from_folder(path, choices)
    root = Path(choices.root).expanduser().absolute() if choices.root else None
    if root is not None and not root.is_dir():
        raise UserError(f"own.root={choices.root}: is not a folder")
    return _from_table(read_table(path, root, choices.columns), path, choices)


def _from_folder(path: Path, choices: _Choices) -> Data:
    source, labels, names = labelled_folder(path)
    rows, variant = parts(None, labels, choices.test_share, choices.seed, path)
    splits = {name: _labelled(source, part, labels, len(names)) for name, part in rows.items()}
    return Data(splits, class_names=names, variant=variant)


def _has_split_folders(path: Path) -> bool:
    """Whether the subfolders that hold images are splits, not classes: `train` is one, and all are called so."""
    tops = sorted({file.split(os.sep)[0] for file in _files(path)})
    words = {SPLIT_WORDS.get(name.lower()) for name in tops}
    if None in words and {"train", "test"} <= words:
        other = next(name for name in tops if name.lower() not in SPLIT_WORDS)
        raise UserError(f"{path}: holds {other}/ beside train and test, expected folders of splits or of classes")
    return "train" in words and None not in words


def _files(path: Path) -> list[str]:
    """The images below a folder's subfolders, relative to it."""
    found = index_folder(path)
    return [name for name in (found[number] for number in range(len(found))) if os.sep in name]


def _from_split_folders(path: Path, choices: _Choices) -> Data:
    files = _files(path)
    for file in files:
        if file.count(os.sep) < 2:
            raise UserError(f"{path / file}: lies in a split but in no class, expected SPLIT/CLASS/IMAGE")
    classes = [file.split(os.sep)[1] for file in files]
    names = sorted(set(classes))
    if len(names) < 2:
        raise UserError(f"{path}: every image is of the class {names[0]!r}, expected at least two classes")
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([number[name] for name in classes], dtype=np.int64)
    rows, variant = parts(
        [SPLIT_WORDS[file.split(os.sep)[0].lower()] for file in files], labels, choices.test_share, choices.seed, path
    )
    _require_learnt(rows, labels, names, path)
    source = PathSource(str(path), PathBlock.of(files))
    return Data({name: _labelled(source, part, labels, len(names)) for name, part in rows.items()}, names, variant)


def _from_table(table: Table, path: Path, choices: _Choices) -> Data:
    source = PathSource(str(table.root), PathBlock.of(table.paths))
    groups = _rarest(table.labels) if table.several else table.labels
    rows, variant = parts(table.words, groups, choices.test_share, choices.seed, path)
    if not table.several:
        _require_learnt(rows, table.labels, table.class_names, path)
        splits: dict[str, Any] = {
            name: _labelled(source, part, table.labels, len(table.class_names)) for name, part in rows.items()
        }
    else:
        splits = {
            name: MultiLabelled(_subset(source, part), table.labels[part], len(table.class_names))
            for name, part in rows.items()
        }
    return Data(splits, table.class_names, variant)


def _rarest(labels: np.ndarray) -> np.ndarray:
    """What a hold-out of images with several labels balances: the rarest label of each (n, K) -> (n,), K for none."""
    count = np.where((labels == 1).any(axis=0), (labels == 1).sum(axis=0), len(labels) + 1)
    rank = np.where(labels == 1, count[None], len(labels) + 1)
    return np.where((labels == 1).any(axis=1), rank.argmin(axis=1), labels.shape[1])


def _require_learnt(rows: dict[str, np.ndarray], labels: np.ndarray, names: list[str], where: Path) -> None:
    for split, part in rows.items():
        extra = np.setdiff1d(labels[part], labels[rows["train"]])
        if len(extra):
            raise UserError(f"{where}: the class {names[extra[0]]!r} is in {split} but not in train")


def _labelled(source: PathSource, rows: np.ndarray, labels: np.ndarray, num_classes: int) -> Labelled:
    return Labelled(_subset(source, rows), labels[rows], num_classes)


def _subset(source: PathSource, rows: np.ndarray) -> PathSource:
    return PathSource(source.root, PathBlock.of([source.paths[int(row)] for row in rows]))


def _counts(counts: dict[str, int]) -> str:
    return " / ".join(f"{counts[name]:,}" for name in ("train", "val", "test") if name in counts)


def _name(path: Path) -> str:
    """What results are called: the folder's name, and of a table also its own; never that of a shipped dataset."""
    text = f"{path.parent.name}_{path.stem}" if path.is_file() else path.name
    name = re.sub(r"[^\w.-]+", "_", text).strip("._") or NAME
    return f"{NAME}_{name}" if (bundled("eval") / f"{name}.py").exists() else name
