"""Other pictures of ImageNet-1k's classes: what learns from ImageNet-1k's training images is tested on them.

`eval/imagenet1k.py` reads the training images, so that their cached features are the same files, whichever set is
tested. The class of a picture is the folder it lies in: a wnid, or the rank of one in sorted order.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dinoreg.config.option import option
from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.source import PathSource
from dinoreg.evaluation.benchmark import Benchmark, Options, Published, find_benchmark, linear_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import DINOV2, released
from dinoreg.evaluation.readers.files import whole_number
from dinoreg.runtime.errors import UserError

ABOVE = 4  # folders in which ImageNet-1k is looked for, from the one that the set lies in
table_6 = partial(released, source=f"{DINOV2}, Table 6")


def imagenet_set(
    name: str,
    title: str,
    test_images: int,
    archive: str,
    published: tuple[Published, ...],
    *,
    layouts: tuple[tuple[str, ...], ...] = (("n[0-9]*",),),
    folders: tuple[str, ...] = (),
    classes: int = 1000,
    numbered: bool = False,
    finish: Callable[[Data, list[str]], Data] = lambda data, _places: data,
) -> Benchmark:
    """The declaration of a set, with DINOv2's linear grid and weighted k-NN.

    archive    it comes from; ImageNet-1k's are needed besides
    published  figures of the linear grid
    layouts    sets of paths, of which one must exist below its folder
    folders    that it may be besides its name, with underscores or hyphens
    classes    that it has pictures of; where these are not all, an answer is chosen among them, as published
    numbered   its folders are ranks of sorted wnids, from 0
    finish     (data, the folder of each tested picture below the set's) -> data
    """

    def read(folder: Path, options: Options) -> Data:
        data = _learnt(name, folder, options["imagenet"])
        train, wnids = data.splits["train"], data.extra["wnids"]
        pictures = [path for path in index_folder(folder) if os.sep in path]
        places = [os.path.dirname(path) for path in pictures]
        label_of = {place: _label(name, folder / place, wnids, numbered) for place in set(places)}
        labels = np.array([label_of[place] for place in places])
        among = np.unique(labels) if classes < 1000 else None
        test = Labelled(PathSource(str(folder), PathBlock.of(pictures)), labels, len(wnids), among=among)
        return finish(replace(data, splits={"train": replace(train, among=among), "test": test}), places)

    return Benchmark(
        name=name,
        title=title,
        classes=classes,
        folders=(name, name.replace("_", "-"), *folders),
        layouts=tuple(needs(archive, *paths) for paths in layouts),
        tasks=linear_tasks(read, {"train": 1_281_167, "test": test_images}, published),
        download=f"{archive}, and ImageNet-1k's archives",
        licence="pictures of others under their own terms; not verified",
        aliases=(name.replace("_", "-"),),
        options={"imagenet": option("", "folder of ImageNet-1k; by default beside the set's own")},
    )


def _learnt(name: str, folder: Path, given: str) -> Data:
    """ImageNet-1k as its own declaration reads it; UserError where it is neither in the given folder nor beside."""
    imagenet, said = find_benchmark("imagenet1k"), ""
    for place in [folder / Path(given).expanduser()] if given else folder.parents[:ABOVE]:
        try:
            found = imagenet.find(place)
        except UserError as error:
            said = said or str(error)
        else:
            return imagenet.tasks[0].read(found, imagenet.option_values({}))
    raise UserError(f"{name}: learns from ImageNet-1k, which {name}.imagenet=FOLDER says where to find: {said}")


def _label(name: str, place: Path, wnids: list[str], numbered: bool) -> int:
    """The class of the pictures in a folder; UserError for one that is none of ImageNet-1k's."""
    if numbered:
        return whole_number(place.name, "the class of its pictures", place, 0, len(wnids) - 1)
    if place.name not in wnids:
        raise UserError(f"{name}: {place} is named after none of the {len(wnids)} classes of ImageNet-1k")
    return wnids.index(place.name)
