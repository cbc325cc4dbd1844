"""ImageNet-V2, matched frequency (Recht et al., ICML 2019): 10,000 new photographs, collected as ImageNet-1k's were.

Folders are numbers: the ranks, from 0, of the sorted wnids of ImageNet-1k, though folders sort "10" before "2". What is
learnt from ImageNet-1k's training images (DINOv2's linear grid, and weighted k-NN) is tested on them.
"""

from dinoreg.evaluation.published import CARD, DINOV2, released
from dinoreg.evaluation.readers.imagenet_sets import imagenet_set

TITLE, ARCHIVE = "ImageNet-V2 (matched frequency)", "imagenetv2-matched-frequency.tar.gz"
UNPACKED = ("imagenetv2-matched-frequency-format-val",)
PUBLISHED = (
    *released((70.9, 75.1, 78.0, 78.4), f"{DINOV2}, Table 4"),
    *released((71.0, 75.6, 78.5, 78.8), CARD, registers=4),
)
BENCHMARK = imagenet_set("imagenet_v2", TITLE, 10_000, ARCHIVE, PUBLISHED, layouts=(("[0-9]/",),), folders=UNPACKED)

if __name__ == "__main__":
    BENCHMARK.script()
