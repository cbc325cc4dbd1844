"""PASCAL VOC 2012 (Everingham et al.): the tree of 2007 with more photographs; the test labels are withheld.

`VOCdevkit/VOC2012`. What is reported is val, learnt from train alone. `JPEGImages` holds more files than the lists
name, so the lists count. Masks are palette pictures: 0 the ground, 1..20 the classes, 255 void. Segmentation is
learnt from the 1,464 official masks, not from the 10,582 that include the SBD.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Published, Task
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.readers.pascal import CLASSES, WITH_GROUND, Devkit
from dinoreg.evaluation.readers.published_discovery import DENOISING, corloc

NAME = "voc2012"
TRAINVAL = "VOCtrainval_11-May-2012.tar"
D2, D3 = "DINOv2, arXiv 2304.07193v2, Table 10", "DINOv3, arXiv 2508.10104, baseline row"
LISTS = "which training list (1,464 images, or 10,582 with the SBD) is not stated"
MS = f"last 4 blocks, 640 px windows, several test scales; {LISTS}"


def _devkit(folder: Path) -> Devkit:
    return Devkit(folder, NAME, {"train": TRAINVAL, "val": TRAINVAL, "trainval": TRAINVAL})


def read_discovery(folder: Path, options: Mapping[str, Any]) -> Data:
    """Boxes of trainval, which discovery reports on: nothing is learnt."""
    return Data({"test": _devkit(folder).boxed("trainval")}, class_names=CLASSES, variant="trainval")


def read_detection(folder: Path, options: Mapping[str, Any]) -> Data:
    """Boxes: train to learn from, and val, called "test", to report on."""
    kit = _devkit(folder)
    splits = {"train": kit.boxed("train"), "test": kit.boxed("val")}
    return Data(splits, class_names=CLASSES, variant="val", extra={"rule": "voc2012"})


def read_segmentation(folder: Path, options: Mapping[str, Any]) -> Data:
    """Masks of 21 classes: train to learn from, and val, called "test", to report on."""
    kit = _devkit(folder)
    splits = {"train": kit.segmented("train"), "test": kit.segmented("val")}
    return Data(splits, class_names=WITH_GROUND, variant="val")


BENCHMARK = Benchmark(
    name=NAME,
    title="PASCAL VOC 2012",
    task="discovery, detection, segmentation",
    classes=len(CLASSES),
    splits="5,717 / 5,823; masks 1,464 / 1,449",
    folders=("VOCdevkit/VOC2012", "VOC2012", "voc2012", "voc/VOCdevkit/VOC2012", "voc2012/VOCdevkit/VOC2012"),
    layouts=(
        (
            Need("ImageSets/Main/trainval.txt", TRAINVAL),
            Need("Annotations", TRAINVAL),
            Need("JPEGImages", TRAINVAL),
        ),
    ),
    tasks=(
        Task(
            protocol="discovery",
            read=read_discovery,
            metric="CorLoc",
            counts={"test": 11_540},
            published=corloc(
                registers=(40.2, 60.0),
                others=(13.1, 32.7, 44.3, 42.0),
                dino=(64.0, 63.3, 57.0),
                test_time=(36.8, 60.2, 57.9, 35.9),
                denoising=(35.9, 41.5),
                token_cut=60.4,
            ),
        ),
        Task(
            protocol="segmentation",
            read=read_segmentation,
            metric="mIoU",
            needs=(Need("SegmentationClass", TRAINVAL),),
            counts={"train": 1_464, "test": 1_449},
            published=(
                Published("DINOv2 ViT-S/14 (distilled)", 81.1, D2, LISTS),
                Published("DINOv2 ViT-B/14 (distilled)", 82.5, D2, LISTS),
                Published("DINOv2 ViT-L/14 (distilled)", 82.1, D2, LISTS),
                Published("DINOv2 ViT-g/14", 83.0, D2, LISTS),
                Published("DINOv2 ViT-S/14 (distilled), +ms", 82.6, D2, MS),
                Published("DINOv2 ViT-B/14 (distilled), +ms", 84.9, D2, MS),
                Published("DINOv2 ViT-L/14 (distilled), +ms", 86.0, D2, MS),
                Published("DINOv2 ViT-g/14, +ms", 86.2, D2, MS),
                Published("DINOv2 ViT-g/14", 83.1, D3, f"rates swept, 448 px, registers inferred; {LISTS}"),
                Published("DINOv2 ViT-B/14 (released), 0 registers", 83.60, DENOISING, f"its own settings; {LISTS}"),
                Published("DINOv2 ViT-B/14 (released), 4 registers", 83.64, DENOISING, f"its own settings; {LISTS}"),
            ),
        ),
        Task(
            protocol="detection",
            read=read_detection,
            metric="AP50",
            counts={"train": 5_717, "test": 5_823},
        ),
    ),
    download=f"{TRAINVAL} of the VOC 2012 challenge",
    licence="photographs of Flickr under Flickr's terms",
    aliases=("voc12", "pascal-voc-2012"),
)

if __name__ == "__main__":
    script(BENCHMARK)
