"""PASCAL VOC 2007 (Everingham et al.): twenty classes in photographs, with a test set that is public in full.

`VOCdevkit/VOC2007`; the test archive unpacks over the same folder. Classification reads the class lists
(`ImageSets/Main/<class>_<split>.txt`: 1, -1, or 0 where all instances are difficult), discovery and detection the
annotations. The "VOC" column of the DINOv2 tables is the classification.
"""

from dinoreg.evaluation.benchmark import Benchmark, Task, needs
from dinoreg.evaluation.published import corloc, denoised, fine_grained
from dinoreg.evaluation.readers.pascal import CLASSES, Devkit, voc_folders, voc_reader

NAME = "voc2007"
TRAINVAL, TEST = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"


ARCHIVES = {"train": TRAINVAL, "val": TRAINVAL, "trainval": TRAINVAL, "test": TEST}
VITDET = "a ViTDet detector on the frozen backbone, learnt on VOC 2007 and 2012: not comparable"

CORLOC = corloc(
    registers=(35.3, 55.4, 11.7, 27.1, 38.8, 37.1),
    dino=(61.9, 60.1, 55.5),
    test_time=(32.2, 56.2, 53.8, 30.8),
    denoising=(30.8, 38.0),
    token_cut=55.6,
)
MAP = fine_grained((87.8, 88.2, 88.3, 89.0), 88.4, (89.1, 70.8, 89.7), "11-point or not is not stated")
AP50 = denoised((81.4, 80.9), (VITDET, VITDET))

CLASS_LISTS = voc_reader(NAME, ARCHIVES, Devkit.labelled, {"train": "train", "val": "val", "test": "test"})
TRAINVAL_BOXES = voc_reader(NAME, ARCHIVES, Devkit.boxed, {"test": "trainval"}, variant="trainval")
BOXES = voc_reader(NAME, ARCHIVES, Devkit.boxed, {"train": "trainval", "test": "test"})

BENCHMARK = Benchmark(
    name=NAME,
    title="PASCAL VOC 2007",
    task="multi-label classification, discovery, detection",
    classes=len(CLASSES),
    folders=voc_folders("2007"),
    layouts=(needs(TRAINVAL, "ImageSets/Main/trainval.txt", "Annotations", "JPEGImages"),),
    tasks=(
        Task("multilabel", CLASS_LISTS, "11-point mAP", {"train": 2_501, "val": 2_510, "test": 4_952}, MAP),
        Task("discovery", TRAINVAL_BOXES, "CorLoc", {"test": 5_011}, CORLOC),  # of trainval: nothing is learnt
        Task("detection", BOXES, "AP50", {"train": 5_011, "test": 4_952}, AP50),
    ),
    download=f"{TRAINVAL} and {TEST} of the VOC 2007 challenge, unpacked over each other",
    licence="photographs of Flickr under Flickr's terms",
    aliases=("voc07", "voc", "pascal-voc-2007"),
)

if __name__ == "__main__":
    BENCHMARK.script()
