"""PASCAL VOC's development kit on disk: image lists, class lists, annotations and masks of any year.

`<year>/{JPEGImages/*.jpg, Annotations/*.xml, SegmentationClass/*.png, ImageSets/{Main,Segmentation}/*.txt}`. Boxes
count pixels from 1 and include both ends; ours are continuous with ends exclusive, (xmin - 1, ymin - 1, xmax, ymax).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from xml.etree.ElementTree import XML, Element, ParseError, TreeBuilder, XMLParser

import numpy as np

from dinoreg.config.option import nearest
from dinoreg.data.source import Source
from dinoreg.evaluation.benchmark import Options, Reader
from dinoreg.evaluation.data import IGNORED, Boxed, Data, MultiLabelled, Segmented, Split
from dinoreg.evaluation.readers.files import matched, missing, paths_source, read_bytes, require_distinct, segmented
from dinoreg.runtime.errors import UserError, reworded

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
NUMBERS = {name: number for number, name in enumerate(CLASSES)}
WITH_GROUND = ("background", *CLASSES)  # of the masks
PRESENCE = MappingProxyType({"1": 1, "+1": 1, "0": -1, "-1": 0})  # in a class list: ours
MOST_BYTES = 1 << 22  # of one annotation; real ones have a few thousand


@dataclass(frozen=True)
class Devkit:
    """The tree of one year, read as one dataset.

    archives  {name of a list: the archive that its files come out of}
    """

    folder: Path
    dataset: str
    archives: dict[str, str]

    def names(self, split: str, kind: str = "Main") -> list[str]:
        """The images of a split in the order of its list.

        kind    "Main" or "Segmentation"
        raises  UserError for a list that is missing, empty, of another form or with an image twice
        """
        path = self.folder / "ImageSets" / kind / f"{split}.txt"
        form = r"([^\s/\\.][^\s/\\]*)(?:\s.*)?"
        rows = matched(path, form, "the name of an image without a folder", self.dataset, self.archives[split])
        names = [name for (name,) in rows]
        require_distinct(names, "image", f"{self.dataset}: {path}")
        return names

    def labelled(self, split: str) -> MultiLabelled:
        """The classes of each image of a split, by the class lists; -1 where all instances are difficult.

        raises  UserError for lists that are missing or of another form, or that lack an image
        """
        names = self.names(split)
        labels = np.stack([self._presence(label, split, names) for label in CLASSES], axis=1)
        return MultiLabelled(self._source(names), labels, len(CLASSES))

    def boxed(self, split: str) -> Boxed:
        """Every object of a split's images, by the annotations; difficult ones are marked, parts are not objects.

        raises  UserError for lists and annotations that are missing or not as expected
        """
        names = self.names(split)
        boxes, labels, difficult = [], [], []
        for name in names:
            rows = objects(self.folder / "Annotations" / f"{name}.xml", self.dataset, self.archives[split])
            boxes.append(np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4))
            labels.append(np.array([row[1] for row in rows], dtype=np.int64))
            difficult.append(np.array([row[2] for row in rows], dtype=bool))
        crowd = [np.zeros_like(each) for each in difficult]
        return Boxed(self._source(names), boxes, labels, len(CLASSES), difficult, crowd)

    def segmented(self, split: str) -> Segmented:
        """Masks of 21 classes, the background first; void outlines are ignored.

        raises  UserError for missing lists or masks; later, on access, as `read_mask`
        """
        names = self.names(split, "Segmentation")
        masks = self.folder / "SegmentationClass"
        if not masks.is_dir():
            raise missing(masks, self.dataset, self.archives[split])
        return segmented(self.folder / "JPEGImages", masks, names, range(len(WITH_GROUND)), IGNORED, self.dataset)

    def _source(self, names: Sequence[str]) -> Source:
        return paths_source(self.folder / "JPEGImages", (f"{name}.jpg" for name in names), self.dataset)

    def _presence(self, label: str, split: str, names: Sequence[str]) -> np.ndarray:
        """(n,) int8 of one class list: 1 present, 0 absent, -1 not counted. The files say 1, -1 and 0."""
        path = self.folder / "ImageSets/Main" / f"{label}_{split}.txt"
        form = r"(\S+)\s+(\+?1|0|-1)"
        rows = matched(path, form, "an image and 1, 0 or -1", self.dataset, self.archives[split])
        presence = {name: PRESENCE[flag] for name, flag in rows}
        for name in names:
            if name not in presence:
                raise UserError(f"{self.dataset}: {path} does not list {name}, which {split}.txt does")
        return np.array([presence[name] for name in names], dtype=np.int8)


def voc_folders(year: str) -> tuple[str, ...]:
    """The places where the tree of a year may lie below `root`, in the order in which they are tried."""
    inside = f"VOCdevkit/VOC{year}"
    return (inside, f"VOC{year}", f"voc{year}", f"voc/{inside}", f"voc{year}/{inside}")


def voc_reader(
    dataset: str,
    archives: dict[str, str],
    read_split: Callable[[Devkit, str], Split],
    splits: Mapping[str, str],
    class_names: Sequence[str] = CLASSES,
    variant: str = "",
) -> Reader:
    """A reader of some splits.

    archives     {name of a list: the archive that its files come out of}
    read_split   a method of Devkit: labelled, boxed or segmented
    splits       {split: name of its list}
    class_names  in the order of their labels
    """

    def read(folder: Path, options: Options) -> Data:
        kit = Devkit(folder, dataset, archives)
        parts = {split: read_split(kit, name) for split, name in splits.items()}
        return Data(parts, class_names, variant, extra={"rule": dataset})

    return read


def objects(path: Path, dataset: str, archive: str) -> list[tuple[tuple[float, float, float, float], int, bool]]:
    """(box, class, difficult) of every object of an annotation, in its order.

    A box is x0, y0, x1, y1 in pixels, ends exclusive; a class is in [0, 20). UserError for an annotation that is
    missing or no XML, and for an unknown class, another flag or an empty box in it.
    """
    rows = []
    for element in parse(path, dataset, archive).iterfind("object"):
        name = (element.findtext("name") or "").strip()
        if name not in NUMBERS:
            raise UserError(f"{dataset}: {path}: unknown class {name!r}{nearest(name, NUMBERS)}")
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise UserError(f"{dataset}: {path}: difficult is {difficult!r}, expected 0 or 1")
        box = element.find("bndbox")  # a direct child, unlike the boxes of parts
        rows.append((_box(box, path, dataset), NUMBERS[name], difficult == "1"))
    return rows


def _box(element: Element | None, path: Path, dataset: str) -> tuple[float, float, float, float]:
    texts = ["" if element is None else element.findtext(key) or "" for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)  # some have decimals
    except ValueError:
        x0 = math.nan
    if not (math.isfinite(x0) and math.isfinite(y0) and x0 - 1 < x1 < math.inf and y0 - 1 < y1 < math.inf):
        raise UserError(f"{dataset}: {path}: the box {' '.join(texts)!r}, expected xmin ymin xmax ymax, not empty")
    return x0 - 1, y0 - 1, x1, y1


class _PlainTree(TreeBuilder):
    """Builds a tree, but refuses a document type: it is where entities that explode are declared."""

    def doctype(self, *_: object) -> None:
        raise UserError("declares a document type, expected a plain annotation")


def parse(path: Path, dataset: str, archive: str) -> Element:
    """The root of an XML file of MOST_BYTES at most and without a document type; UserError for any other."""
    data = read_bytes(path, dataset, archive, MOST_BYTES)
    with reworded(f"{dataset}: {path} is not XML", ParseError):
        try:
            return XML(data, XMLParser(target=_PlainTree()))
        except UserError as error:
            raise UserError(f"{dataset}: {path} {error}") from None
