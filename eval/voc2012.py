"""PASCAL VOC 2012 (Everingham et al.): the tree of 2007 with more photographs; the test labels are withheld.

`VOCdevkit/VOC2012`. What is reported is val, learnt from train alone. `JPEGImages` holds more files than the lists
name, so the lists count. Masks are palette pictures: 0 the ground, 1..20 the classes, 255 void. Segmentation is
learnt from the 1,464 official masks, not from the 10,582 that include the SBD.
"""

from dinoreg.evaluation.benchmark import Benchmark, Published, Task, needs
from dinoreg.evaluation.published import BASELINE, DINOV2, corloc, denoised, released
from dinoreg.evaluation.readers.pascal import CLASSES, WITH_GROUND, Devkit, voc_folders, voc_reader

NAME = "voc2012"
TRAINVAL = "VOCtrainval_11-May-2012.tar"
D2 = f"{DINOV2}, Table 10"
LISTS = "which training list (1,464 images, or 10,582 with the SBD) is not stated"
MS = f"last 4 blocks, 640 px windows, several test scales; {LISTS}"


ARCHIVES = {"train": TRAINVAL, "val": TRAINVAL, "trainval": TRAINVAL}
LEARNT = {"train": "train", "test": "val"}  # val is what is reported

CORLOC = corloc(
    registers=(40.2, 60.0, 13.1, 32.7, 44.3, 42.0),
    dino=(64.0, 63.3, 57.0),
    test_time=(36.8, 60.2, 57.9, 35.9),
    denoising=(35.9, 41.5),
    token_cut=60.4,
)
MIOU = (
    *released((81.1, 82.5, 82.1, 83.0), D2, LISTS),
    *released((82.6, 84.9, 86.0, 86.2), D2, MS, ending=", +ms"),
    Published("DINOv2 ViT-g/14", 83.1, BASELINE, f"rates swept, 448 px, registers inferred; {LISTS}"),
    *denoised((83.60, 83.64), (f"its own settings; {LISTS}",) * 2),
)
HUMMINGBIRD = "open-hummingbird-eval's README"
KNN = released((74.9, 74.6, 71.7, 69.9), HUMMINGBIRD, f"approximate search, 2 augmented passes, 504 px; {LISTS}")
COUNTS = {"train": 1_464, "test": 1_449}

TRAINVAL_BOXES = voc_reader(NAME, ARCHIVES, Devkit.boxed, {"test": "trainval"}, variant="trainval")
MASKS = voc_reader(NAME, ARCHIVES, Devkit.segmented, LEARNT, WITH_GROUND, variant="val")
BOXES = voc_reader(NAME, ARCHIVES, Devkit.boxed, LEARNT, variant="val")
MASK_FILES = needs(TRAINVAL, "SegmentationClass")

BENCHMARK = Benchmark(
    name=NAME,
    title="PASCAL VOC 2012",
    task="discovery, detection, segmentation",
    classes=len(CLASSES),
    splits="5,717 / 5,823; masks 1,464 / 1,449",
    folders=voc_folders("2012"),
    layouts=(needs(TRAINVAL, "ImageSets/Main/trainval.txt", "Annotations", "JPEGImages"),),
    tasks=(
        Task("discovery", TRAINVAL_BOXES, "CorLoc", {"test": 11_540}, CORLOC),  # of trainval: nothing is learnt
        Task("segmentation", MASKS, "mIoU", COUNTS, MIOU, needs=MASK_FILES),
        Task("knn_segmentation", MASKS, "mIoU", COUNTS, KNN, needs=MASK_FILES),
        Task("detection", BOXES, "AP50", {"train": 5_717, "test": 5_823}),
    ),
    download=f"{TRAINVAL} of the VOC 2012 challenge",
    licence="photographs of Flickr under Flickr's terms",
    aliases=("voc12", "pascal-voc-2012"),
)

if __name__ == "__main__":
    BENCHMARK.script()
