"""Revisited Oxford and Paris (Radenovic et al., CVPR 2018, arXiv 1803.11285): `jpg/*.jpg` and `gnd_NAME.pkl`.

The pickle is a dictionary: "imlist" and "qimlist", names of images and queries; "gnd", of each query "bbx", the box
that is searched for, and "easy", "hard" and "junk", places in "imlist". It is read without running what it names.
"""

from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, Task
from dinoreg.evaluation.data import Data, Searched
from dinoreg.evaluation.published import DINOV2, Family, released
from dinoreg.evaluation.readers.files import CroppedSource, paths_source, present
from dinoreg.evaluation.readers.python2_pickle import read_dictionary
from dinoreg.runtime.errors import reworded

SIZE = "the size of pictures is not stated"
QUERIES = 70  # of either
RELEVANCE = MappingProxyType({"easy": 1, "hard": 2, "junk": -1})  # as `Searched` has it


def revisited(
    name: str, title: str, images: int, archive: str, medium: Family, hard: Family, others: tuple[Published, ...] = ()
) -> Benchmark:
    """The declaration of one of the two.

    images        of the database, queries not counted
    archive       the images come from
    medium, hard  figures of DINOv2's four models (Table 9)
    others        figures, whose variant is "Medium" or "Hard"
    """
    figures = ((medium, "Medium"), (hard, "Hard"))
    truth = Need(f"gnd_{name}.pkl", f"gnd_{name}.pkl of the revisited annotation")

    def read(folder: Path, options: Options) -> Data:
        path = folder / truth.path
        values = read_dictionary(path, name, truth.archive)
        form = "expected imlist, qimlist and gnd with bbx, easy, hard and junk"
        with reworded(f"{name}: {path} is of another form, {form}", KeyError, TypeError, ValueError, IndexError):
            database, queries = ([f"{each.strip()}.jpg" for each in values[key]] for key in ("imlist", "qimlist"))
            relevance = np.zeros((len(queries), len(database)), dtype=np.int8)
            for row, query in zip(relevance, values["gnd"], strict=True):
                for kind, value in RELEVANCE.items():
                    places = np.isin(np.arange(len(database)), query[kind])
                    if places.sum() != len(query[kind]):
                        raise ValueError(f"{kind} has places that are not in imlist")
                    row[places] = value
            boxes = np.array([query["bbx"] for query in values["gnd"]], dtype=np.float64).reshape(len(queries), 4)
            if not (boxes[:, :2] < boxes[:, 2:]).all():
                raise ValueError("a box is empty")
        below = folder / "jpg"
        searched, asked = (present(paths_source(below, each, name), name, archive) for each in (database, queries))

        def cropped(index: int, image: Image.Image) -> Image.Image:
            return image.crop(tuple(np.rint(boxes[index]).astype(int)))  # type: ignore[arg-type]

        query_source = CroppedSource(asked, cropped, f"cropped to {boxes.tolist()}")
        return Data({"database": Searched(searched), "test": Searched(query_source, relevance)})

    table_9 = (released(values, f"{DINOV2}, Table 9", SIZE, variant=level) for values, level in figures)
    return Benchmark(
        name=name,
        title=title,
        task="retrieval",
        classes=None,
        splits=f"{images:,} / {QUERIES} queries",
        folders=(name, name[1:]),
        layouts=((truth, Need("jpg", archive)),),
        tasks=(Task("retrieval", read, "mAP", {"database": images, "test": QUERIES}, (*chain(*table_9), *others)),),
        licence="photographs of Flickr under Flickr's terms",
    )
