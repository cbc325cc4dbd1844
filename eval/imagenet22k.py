"""ImageNet-22k (fall 2011; Deng et al., CVPR 2009): 21,841 WordNet nodes, about 14.2 million images, for pretraining.

One archive per class, `<wnid>.tar`, as they are handed out and as DINOv2 reads them (the archives are indexed here,
once; DINOv2's own tables of them are not needed), or one folder per class. There is no official validation split: the
probe holds some images of each class out, chosen by a hash of their names, so that every copy and layout holds out the
same ones. Classes nest (a tench is a fish too) and contain ImageNet-1k's, images included; no published number exists
for this probe.
"""

import os
import re
import zlib
from pathlib import Path

import numpy as np

from dinoreg.config.option import option
from dinoreg.data.declared import Pretraining
from dinoreg.data.folder_index import PathBlock
from dinoreg.data.labelled_folder import class_folders
from dinoreg.data.rng import philox
from dinoreg.data.shards import Shards
from dinoreg.data.source import ChosenSource, Source
from dinoreg.data.tar_index import index_tars
from dinoreg.evaluation.benchmark import Benchmark, Options, linear_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.runtime.errors import UserError

NAME = "imagenet22k"
ARCHIVE = "fall11_whole.tar, a tar of one tar per class (unpacking the inner ones into folders is allowed, not needed)"
WNID = re.compile(r"n\d{8}")
RANKS = 1 << 20  # drawn together
UNREADABLE = b"n06470073_47249.JPEG"  # no image at all, in every copy; DINOv2 leaves it out too


def read(folder: Path, options: Options) -> Data:
    """A seeded choice of training images, and of held-out images as "test", each at most so many per class.

    raises  UserError for a folder without classes, and where no class has two images
    """
    source, names, labels, wnids = _images(folder, None)
    usable = np.flatnonzero(labels >= 0)
    most_held, most_train, seed = (options[key] for key in ("holdout_per_class", "train_per_class", "seed"))
    ranks = _ranks(names, seed)[usable]
    order = usable[np.lexsort((ranks, labels[usable]))]  # by class, at random within it
    counts = np.bincount(labels[usable], minlength=len(wnids))
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
    held = np.minimum(most_held, counts // 2)[labels[order]]
    most = most_train or len(order)
    chosen = {"train": np.sort(order[(place >= held) & (place < held + most)]), "test": np.sort(order[place < held])}
    if not len(chosen["test"]):
        raise UserError(f"{NAME}: {folder} has no class of two images or more, so none can be held out")
    splits = {
        split: Labelled(ChosenSource(source, indices), labels[indices], len(wnids)) for split, indices in chosen.items()
    }
    learnt = f"{most_train:,}" if most_train else "all other"
    variant = f"{most_held} images per class held out, {learnt} per class to train on, seed {seed}"
    return Data(splits, class_names=wnids, variant=variant)


def _images(folder: Path, index_dir: str | None) -> tuple[Source, PathBlock, np.ndarray, list[str]]:
    """Every file: (source, names, labels (n,) int64, wnids); a label is the rank of the wnid, -1 where left out."""
    source: Source
    if any(folder.glob(f"n{'[0-9]' * 8}.tar")):
        archives = sorted(path.name for path in folder.glob("[!.]*.tar"))
        source = index_tars(Shards(os.path.abspath(folder), archives, ".tar"), index_dir)
        stems = [archive.removesuffix(".tar") for archive in source.archives]
        names, labels = source.names, source.archive.astype(np.int64)
    else:
        source, labels, stems = class_folders(folder, index_dir)
        names = source.paths
    # Folders and archives of other names lie beside the classes: they are not classes.
    wnids = sorted(stem for stem in stems if WNID.fullmatch(stem))
    ranks = {wnid: rank for rank, wnid in enumerate(wnids)}
    labels = np.array([ranks.get(stem, -1) for stem in stems], dtype=np.int64)[labels]
    if (place := names.block.find(UNREADABLE + b"\0")) >= 0:
        labels[names.block.count(b"\0", 0, place)] = -1
    if not (labels >= 0).any():
        raise UserError(f"{NAME}: {folder} has no image in a tar or folder named like a class (n01440764)")
    return source, names, labels, wnids


def _ranks(names: PathBlock, seed: int) -> np.ndarray:
    """(n,) uint64 that depend on a file's own name and the seed alone."""
    own_names = (os.fsencode(os.path.basename(name)) for name in names)
    sums = np.fromiter(map(zlib.crc32, own_names), dtype=np.uint64, count=len(names))
    ranks = []
    for some in np.split(sums, range(RANKS, len(sums), RANKS)):
        counters = np.zeros((len(some), 4), dtype=np.uint64)
        counters[:, 0] = some
        words = philox(seed, counters).astype(np.uint64)
        ranks.append(words[:, 0] << np.uint64(32) | words[:, 1])
    return np.concatenate(ranks)


def images(root: Path, split: str, options: Options, index_dir: str | None) -> Source:
    """Every readable image, without labels. Any classes will do: many copies hold a part of them.

    root       the folder of all datasets
    index_dir  where the index of a folder or of tars is kept; None: the default place
    raises     UserError for a folder without classes
    """
    source, _, labels, _ = _images(BENCHMARK.find(root), index_dir)
    return source if (labels >= 0).all() else ChosenSource(source, np.flatnonzero(labels >= 0))


PRETRAINING = Pretraining(images)
BENCHMARK = Benchmark(
    name=NAME,
    title="ImageNet-22k (fall 2011)",
    classes=21_841,
    splits="about 14.2 million / none (10 per class held out, seeded)",
    folders=("imagenet22k", "imagenet-22k", "ImageNet22k", "imagenet21k", "fall11_whole", "winter21_whole", "in22k"),
    layouts=(needs(ARCHIVE, "n[0-9]*.tar"), needs(ARCHIVE, "n[0-9]*/")),
    tasks=linear_tasks(read),
    download="fall11_whole.tar (21,841 classes); the 2021 release, winter21_whole.tar.gz, has 19,167 of them",
    licence="account and terms of access: non-commercial research",
    options={
        "holdout_per_class": option(10, "images of each class held out to report on, at most half of it", low=1),
        "train_per_class": option(100, "images of each class to train on, at most; 0: all not held out", low=0),
        "seed": option(0, "of the choice of both", low=0),
    },
    aliases=("in22k", "imagenet-22k", "imagenet21k", "in21k"),
)

if __name__ == "__main__":
    BENCHMARK.script()
