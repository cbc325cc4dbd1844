"""PASCAL VOC 2007 (Everingham et al.): twenty classes in photographs, with a test set that is public in full.

`VOCdevkit/VOC2007`; the test archive unpacks over the same folder. Classification reads the class lists
(`ImageSets/Main/<class>_<split>.txt`: 1, -1, or 0 where only difficult ones are seen), discovery and detection the
annotations. The "VOC" column of the DINOv2 tables is the classification.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Published, Task
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.readers.pascal import CLASSES, Devkit
from dinoreg.evaluation.readers.published import fine_grained
from dinoreg.evaluation.readers.published_discovery import DENOISING, corloc

NAME = "voc2007"
TRAINVAL, TEST = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"


def _devkit(folder: Path) -> Devkit:
    return Devkit(folder, NAME, {"train": TRAINVAL, "val": TRAINVAL, "trainval": TRAINVAL, "test": TEST})


def read_classes(folder: Path, options: Mapping[str, Any]) -> Data:
    """Which classes each image shows: train, val and test as official."""
    kit = _devkit(folder)
    return Data({split: kit.labelled(split) for split in ("train", "val", "test")}, class_names=CLASSES)


def read_discovery(folder: Path, options: Mapping[str, Any]) -> Data:
    """Boxes of trainval, which discovery reports on: nothing is learnt."""
    return Data({"test": _devkit(folder).boxed("trainval")}, class_names=CLASSES, variant="trainval")


def read_detection(folder: Path, options: Mapping[str, Any]) -> Data:
    """Boxes: trainval to learn from, test to report on."""
    kit = _devkit(folder)
    splits = {"train": kit.boxed("trainval"), "test": kit.boxed("test")}
    return Data(splits, class_names=CLASSES, extra={"rule": "voc2007"})


BENCHMARK = Benchmark(
    name=NAME,
    title="PASCAL VOC 2007",
    task="multi-label classification, discovery, detection",
    classes=len(CLASSES),
    splits="2,501 / 2,510 / 4,952",
    folders=("VOCdevkit/VOC2007", "VOC2007", "voc2007", "voc/VOCdevkit/VOC2007", "voc2007/VOCdevkit/VOC2007"),
    layouts=(
        (
            Need("ImageSets/Main/trainval.txt", TRAINVAL),
            Need("Annotations", TRAINVAL),
            Need("JPEGImages", TRAINVAL),
        ),
    ),
    tasks=(
        Task(
            protocol="multilabel",
            read=read_classes,
            metric="11-point mAP",
            counts={"train": 2_501, "val": 2_510, "test": 4_952},
            published=fine_grained((87.8, 88.2, 88.3, 89.0), 88.4, (89.1, 70.8, 89.7), "11-point or not is not stated"),
        ),
        Task(
            protocol="discovery",
            read=read_discovery,
            metric="CorLoc",
            counts={"test": 5_011},
            published=corloc(
                registers=(35.3, 55.4),
                others=(11.7, 27.1, 38.8, 37.1),
                dino=(61.9, 60.1, 55.5),
                test_time=(32.2, 56.2, 53.8, 30.8),
                denoising=(30.8, 38.0),
                token_cut=55.6,
            ),
        ),
        Task(
            protocol="detection",
            read=read_detection,
            metric="AP50",
            counts={"train": 5_011, "test": 4_952},
            published=tuple(
                Published(
                    f"DINOv2 ViT-B/14 (released), {registers} registers",
                    value,
                    DENOISING,
                    "a ViTDet detector on the frozen backbone, learnt on VOC 2007 and 2012: not comparable",
                )
                for registers, value in ((0, 81.4), (4, 80.9))
            ),
        ),
    ),
    download=f"{TRAINVAL} and {TEST} of the VOC 2007 challenge, unpacked over each other",
    licence="photographs of Flickr under Flickr's terms",
    aliases=("voc07", "voc", "pascal-voc-2007"),
)

if __name__ == "__main__":
    script(BENCHMARK)
