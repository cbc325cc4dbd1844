"""Anybody's own data as a benchmark: `dinoreg eval PATH weights=…`, PATH being a folder or a table.

- a folder with a subfolder for each class, or `train/`, `val/`, `test/` with such subfolders
- a CSV, TSV or parquet file of paths and labels (`tables`), one or several labels an image
- tar or parquet shards with the pictures and their labels inside
- `images/` with `masks/` or `depth/` (`pairs`)

Where no split is given, the images of a small set are tested in folds, each image once, and of a large set a seeded
share of every class is held out; the result says so.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.config.bundled import bundled
from dinoreg.config.option import option
from dinoreg.data.copies import MOST_COMPARED, Copies, find_copies
from dinoreg.data.labelled import LabelledImages, passed_over_in_words
from dinoreg.data.open import absolute, read_labelled
from dinoreg.data.source import ChosenSource
from dinoreg.data.tables import column_names
from dinoreg.evaluation.benchmark import Benchmark, Reader, Task, counts_in_words
from dinoreg.evaluation.custom.maps import depths, segmented
from dinoreg.evaluation.custom.pairs import find_pairs, kinds_of_pairs
from dinoreg.evaluation.custom.splits import alone, copies_across, deal, parts
from dinoreg.evaluation.data import Data, Labelled, MultiLabelled
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import listed

NAME = "own"
SHARE = "a share between 0 and 1"
FEW, FOLDS = 2000, 5  # labelled images below which every one is tested, and in how many folds
OPTIONS = {
    "folds": option(
        0, f"where no split is given; 1: one hold-out; 0: {FOLDS} below {FEW:,} labelled images, else 1", low=0
    ),
    "test_share": option(0.2, "of each class, in one hold-out", above=0, below=1, expected=SHARE),
    "seed": option(0, "of folds or hold-out", low=0),
    "values": option(
        "", "of masks: the numbers or colours that are classes, as [0,255]; empty: numbers from 0, not 255"
    ),
    "depth_unit": option("", "of depth files: m, cm, mm or 1/256; whole numbers need it, floats are metres"),
    "root": option("", "of a table: the folder that its paths begin at and must stay in; empty: the table's own"),
}
BLANK = Benchmark(NAME, "", None, (), (), tasks=(), download="", licence="your own", options=OPTIONS, aliases=(NAME,))
EPOCH_STEPS = (100, 1250)  # fewest, shared by all folds, and most steps in each of the linear protocol's ten epochs
PAIRS = {
    "masks": (("segmentation", "knn_segmentation"), "mIoU", segmented),
    "depth": (("depth",), "RMSE", depths),
}


def own_benchmark(place: str | Path, options: Mapping[str, Any], columns: str = "") -> Benchmark:
    """The data at a path as a benchmark, ready to be read; its lists are read once, here.

    options  the values given as own.KEY=VALUE (OPTIONS)
    columns  of a table: what they are called, "path:FILE,label:BREED,split:SET"

    Raises UserError, in one line, for a path that is none of the kinds above and for anything wrong with its lists.
    """
    path = Path(place := absolute(place))
    as_text = ("values", "depth_unit")  # which Python gives as a list or number
    values = BLANK.option_values({key: str(each) if key in as_text else each for key, each in options.items()})
    # The given values become the defaults, so that a reader called without options uses them as well.
    given = {name: field(default=values[name], metadata=each.metadata) for name, each in OPTIONS.items()}
    name, above = _name(path), path.parent.parent if path.is_file() else path.parent
    title, longer = f"{path.parent.name}/{path.name}".lstrip("/"), _safe(f"{above.name}_{name}")
    blank = replace(BLANK, name=name, title=title, folders=(place,), options=given, place=place, longer=longer)
    kinds = kinds_of_pairs(path) if path.is_dir() else []
    for name, kind in (("values", "masks"), ("depth_unit", "depth")):
        if values[name] and kind not in kinds:
            raise UserError(f"own.{name}={values[name]}: {path} has no images/ with {kind}/ beside it")
    if kinds:
        if values["folds"] > 1:
            raise UserError(f"own.folds={values['folds']}: folds are for labelled images, {path} holds {kinds[0]}")
        return _of_pairs(blank, path, kinds, values)
    if "weight" in column_names(columns, "columns"):
        raise UserError(f"columns={columns}: an evaluation counts every image once, weight: is for training")
    table = read_labelled(place, root=values["root"] or None, columns=columns)
    folds = values["folds"] or (FOLDS if len(table.labels) < FEW and "test_share" not in options else 1)
    if folds > 1 and "test_share" in options:
        raise UserError(f"own.folds={folds} and own.test_share exclude each other: folds test every image")
    return _of_labels(blank, _split(table, path, values["test_share"], values["seed"], folds))


def _of_pairs(blank: Benchmark, path: Path, kinds: list[str], values: Mapping[str, Any]) -> Benchmark:
    tasks = []
    for kind in kinds:
        protocols, metric, read = PAIRS[kind]
        pairs, variant, warnings = find_pairs(path, kind, values["test_share"], values["seed"])
        reader = _reader(read, path, pairs, variant, values, warnings)
        tasks += [Task(protocol, reader, metric) for protocol in protocols]
    splits = counts_in_words({split: len(images) for split, (images, _) in pairs.items()})
    return replace(blank, task=" and ".join(PAIRS[kind][0][0] for kind in kinds), splits=splits, tasks=tuple(tasks))


def _of_labels(blank: Benchmark, data: Data) -> Benchmark:
    read = _reader(lambda: data)
    folds = 1 if data.folds is None else int(data.folds.max()) + 1
    train = data.splits["train" if folds == 1 else "test"]
    if isinstance(train, MultiLabelled):
        kind, tasks = "multi-label classification", [Task("multilabel", read, "all-points mAP")]
    else:
        # Few images need few steps; the head is chosen on held-out training images: the reported ones stay unseen.
        steps = int(np.clip(-(-len(train) // 1024), max(EPOCH_STEPS[0] // folds, 5), EPOCH_STEPS[1]))
        options = {"augment": False, "choose_on": "train", "epoch_steps": steps}
        kind, tasks = "classification", [Task(each, read, "top-1") for each in ("logistic", "knn", "few_shot")]
        tasks.insert(1, Task("linear", read, "top-1", options=options))
        tasks.append(Task("attention", read, "top-1", options=options, asked=True))
    counts = counts_in_words({name: len(part) for name, part in data.splits.items()})
    splits = counts if folds == 1 else f"{counts} in {folds} folds"
    return replace(blank, task=kind, classes=train.num_classes, splits=splits, tasks=tuple(tasks))


def _reader(read: Callable[..., Data], *arguments: Any) -> Reader:
    """A reader that knows its folder and options already."""
    return lambda _folder, _options: read(*arguments)


def _split(table: LabelledImages, path: Path, share: float, seed: int, folds: int) -> Data:
    """The images of each split with one label or several; all in several folds, where no split is given."""
    labels, names, everything = table.labels, table.class_names, table.source
    several = labels.ndim == 2
    groups, kind = (_rarest(labels), MultiLabelled) if several else (labels, Labelled)
    everything.as_trained = True
    copies = find_copies(everything) if len(everything) <= MOST_COMPARED else None
    two = _two_labels(table, copies) if copies is not None and not several else ""
    where = f"{path}: {two}{'; ' * bool(two)}"
    warnings = [*table.warnings, *passed_over_in_words(everything.passed_over), *filter(None, [two])]

    def part(rows: np.ndarray) -> Labelled | MultiLabelled:
        return kind(
            ChosenSource(everything, rows), labels[rows], len(names), None if copies is None else copies.groups[rows]
        )

    if folds > 1 and not {"val", "test"} & set(table.words or ()):
        known = copies or alone(len(labels))
        fold_of, said = _folds(table, groups, folds, seed, known, where)
        order = known.order()  # a folder and a table of the same images are one
        variant = f"{fold_of.max() + 1} folds, seed {seed}"
        return Data({"test": part(order)}, names, variant, {"warnings": warnings + said}, fold_of[order])
    rows, variant = parts(table.words, groups, share, seed, path, copies)
    warnings += copies_across(rows, copies) if copies is not None else []
    warnings += _one_sided(table, rows, where)
    return Data({split: part(each) for split, each in rows.items()}, names, variant, {"warnings": warnings})


def _folds(
    table: LabelledImages, groups: np.ndarray, count: int, seed: int, copies: Copies, where: str
) -> tuple[np.ndarray, list[str]]:
    """The fold of each image, (n,) int64, and warnings on classes that are too small and on copies in several folds.

    where   what messages begin with
    raises  UserError where fewer than two classes can be both learnt and tested
    """
    names, single, n = np.array(table.class_names), table.labels.ndim == 1, len(groups)
    has = table.has()

    def spread(fold_of: np.ndarray) -> np.ndarray:
        """In how many folds each class is, (K,)."""
        return np.array([has[fold_of == fold].any(axis=0) for fold in range(fold_of.max() + 1)]).sum(axis=0)

    fold_of, warnings = deal(groups, count, seed, copies), []
    if single and ((lone := spread(fold_of) == 1).sum() and (spread(fold_of) > 1).sum() < 2):
        # Classes of one picture and its copies: better tested on copies, which is said, than not at all.
        parted = copies._replace(groups=np.where(lone[groups], np.arange(n), copies.groups))
        fold_of = deal(groups, count, seed, parted)
        warnings.append(f"copies lie in several folds, as these classes are one picture only: {listed(names[lone])}")
    folds, found = int(fold_of.max()) + 1, spread(fold_of)
    if folds < 2 or (single and (found > 1).sum() < 2):
        raise UserError(f"{where}{n} image(s) are too few to test some: expected two pictures each of two classes")
    few, lone = names[(found > 1) & (found < folds)], names[found == 1]
    if len(few):
        warnings.append(f"classes of fewer pictures than the {folds} folds, which not every fold tests: {listed(few)}")
    if len(lone):
        tested = int(has[:, found == 1].any(axis=1).sum())
        which = f"classes of a single picture, which is not learnt when it is tested: {listed(lone)}"
        warnings.append(f"{tested:,} of {n:,} images are of {which}")
    return fold_of, warnings


def _two_labels(table: LabelledImages, copies: Copies) -> str:
    """In words how many pictures have several labels, the first of them with its labels; "" for none."""
    order = np.lexsort((table.labels, copies.groups))
    same = copies.groups[order][1:] == copies.groups[order][:-1]
    differ = np.flatnonzero(same & (table.labels[order][1:] != table.labels[order][:-1]))
    if not len(differ):
        return ""
    one, other = (order[differ[0] + step] for step in (0, 1))
    names = (table.class_names[table.labels[row]] for row in (one, other))
    count = len(np.unique(copies.groups[order][differ]))
    shown = " and ".join(map(table.source.name, (one, other)))
    return f"{count:,} pictures are of several classes, as {shown}: {listed(names)}"


def _one_sided(table: LabelledImages, rows: Mapping[str, np.ndarray], where: str) -> list[str]:
    """Warnings on classes that are tested but not learnt, or learnt but not tested.

    where   what messages begin with
    raises  UserError where one class is all that a split has, or where no image of one can be right
    """
    names, single, warnings = np.array(table.class_names), table.labels.ndim == 1, []
    has = table.has()
    present = {split: has[part].any(axis=0) for split, part in rows.items()}
    for split, there in present.items():
        if single and there.sum() == 1:
            raise UserError(f"{where}every image of {split} is of the class '{names[there][0]}', expected two or more")
        unseen = there & ~present["train"]
        count = int(has[rows[split]][:, unseen].any(axis=1).sum())
        if single and count == len(rows[split]):
            raise UserError(f"{where}no class of {split}, as '{names[unseen][0]}', is in train")
        if count:
            which = f"classes that are not in train, and cannot be right: {listed(names[unseen])}"
            warnings.append(f"{count:,} of {len(rows[split]):,} images of {split} are of {which}")
    if len(untested := names[present["train"] & ~present["test"]]):
        warnings.append(f"nothing is said about classes without an image in test: {listed(untested)}")
    return warnings


def _rarest(labels: np.ndarray) -> np.ndarray:
    """The rarest label of each image, (n, K) -> (n,), K for an image without any: the groups of a balanced hold-out."""
    present = labels == 1
    count = np.where(present.any(axis=0), present.sum(axis=0), len(labels) + 1)
    rank = np.where(present, count[None], len(labels) + 1)
    return np.where(present.any(axis=1), rank.argmin(axis=1), labels.shape[1])


def _name(path: Path) -> str:
    """What results are called: the folder's name, and of a table also its own; never that of a shipped dataset."""
    text = f"{path.parent.name}_{path.stem}" if path.is_file() else path.name
    name = _safe(text)
    return f"{NAME}_{name}" if (bundled("eval") / f"{name}.py").exists() else name


def _safe(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or NAME
