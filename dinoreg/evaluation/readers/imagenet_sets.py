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
    layouts: tuple[tuple[str, ...], ...] = (("n[0-9]*/",),),
    folders: tuple[str, ...] = (),
    classes: int = 1000,
    finish: Callable[[Data, list[str]], Data] = lambda data, _places: data,
) -> Benchmark:
    """The declaration of a set, with DINOv2's linear grid and weighted k-NN.

    archive    it comes from; ImageNet-1k's are needed besides
    published  figures of the linear grid
    layouts    sets of paths, of which one must exist below its folder
    folders    that it may be besides its name, with underscores or hyphens
    classes    that it has pictures of; where these are not all, an answer is chosen among them, as published
    finish     (data, the folder of each tested picture below the set's) -> data
    """

    def read(folder: Path, options: Options) -> Data:
        data = _learnt(name, folder, options["imagenet"])
        train, wnids = data.splits["train"], data.extra["wnids"]
        # Nothing else is looked at: an archive that was unpacked beside other data has its folders among them.
        parts = next((paths for paths in layouts if all((folder / path).is_dir() for path in paths)), (".",))
        bases = {os.path.relpath(folder / part, folder): index_folder(folder / part) for part in parts}
        found = (os.path.normpath(os.path.join(base, path)) for base, paths in bases.items() for path in paths)
        pictures = [path for path in found if os.sep in path]
        places = [os.path.dirname(path) for path in pictures]
        ranks = {wnid: rank for rank, wnid in enumerate(wnids)} | {str(rank): rank for rank in range(len(wnids))}
        for place in sorted(set(places)):
            if os.path.basename(place) not in ranks:
                what = f"neither a class of the {len(wnids)} of ImageNet-1k nor the rank of one"
                raise UserError(f"{name}: {folder / place} is {what}")
        labels = np.array([ranks[os.path.basename(place)] for place in places])
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
    for place in [folder / Path(given).expanduser()] if given else [folder, *folder.parents][:ABOVE]:
        try:
            found = imagenet.find(place)
        except UserError as error:
            said = said or str(error)
        else:
            return imagenet.tasks[0].read(found, imagenet.option_values({}))
    raise UserError(f"{name}: learns from ImageNet-1k, which {name}.imagenet=FOLDER says where to find: {said}")
