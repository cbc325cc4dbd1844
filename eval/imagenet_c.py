"""ImageNet-C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261): ImageNet-1k's validation set, corrupted.

`gaussian_noise/1/<wnid>/` and so on, 15 corruptions in 5 severities, beside each other or below folders called after
their archives; the 4 of `extra.tar` are left out, as published. Pictures are crops of 224 pixels already and seen
whole. What is learnt from ImageNet-1k's training images (DINOv2's linear grid, and weighted k-NN) is tested on them:
top-1 over all, and the mean corruption error (mCE), which divides the error of each corruption by AlexNet's. The cached
features take 12 GB for 768 numbers an image; features_dtype=float16 halves that.
"""

import os
from dataclasses import replace

import numpy as np

from dinoreg.data.source import ChosenSource
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.readers.imagenet_sets import imagenet_set, table_6
from dinoreg.runtime.errors import UserError

NAME = "imagenet_c"
# AlexNet's errors, of the authors' repository hendrycks/robustness.
ALEXNET = {
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    **{"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360},
    **{"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    **{"contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500},
}


def corrupted(data: Data, folders: list[str]) -> Data:
    """The pictures of the 15 corruptions, each with the number of its own; UserError where one has none.

    folders  of the tested pictures: corruption/severity/wnid, and what is above
    """
    numbers = {name: number for number, name in enumerate(ALEXNET)}
    corruption = np.array([numbers.get(folder.split(os.sep)[-3:][0], -1) for folder in folders])
    for name, number in numbers.items():
        if number not in corruption:
            raise UserError(f"{NAME}: {data.splits['test'].source.root} has no {name}/SEVERITY/WNID/ with images")
    rows = np.flatnonzero(corruption >= 0)
    test = data.splits["test"]
    source = ChosenSource(test.source, rows)
    source.whole = True
    data.splits["test"] = replace(test, source=source, labels=test.labels[rows])
    return replace(data, extra={**data.extra, "corruption": corruption[rows], "reference_errors": ALEXNET})


PUBLISHED = tuple(replace(each, metric="mCE") for each in table_6((54.4, 42.7, 31.5, 28.2)))
ARCHIVE = "noise.tar, blur.tar, weather.tar and digital.tar"
LAYOUTS = (tuple(ALEXNET), ("noise", "blur", "weather", "digital"))
BENCHMARK = imagenet_set(NAME, "ImageNet-C", 3_750_000, ARCHIVE, PUBLISHED, layouts=LAYOUTS, finish=corrupted)

if __name__ == "__main__":
    BENCHMARK.script()
