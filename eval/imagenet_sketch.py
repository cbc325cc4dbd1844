"""ImageNet-Sketch (Wang et al., NeurIPS 2019): 50,889 black and white drawings of ImageNet-1k's classes.

`ImageNet-Sketch.zip` unpacks to `sketch/<wnid>/`. What is learnt from ImageNet-1k's training images (DINOv2's linear
grid, and weighted k-NN) is tested on them.
"""

from dinoreg.evaluation.readers.imagenet_sets import imagenet_set, table_6

PUBLISHED = table_6((41.2, 50.6, 59.3, 62.5))
BENCHMARK = imagenet_set(
    "imagenet_sketch", "ImageNet-Sketch", 50_889, "ImageNet-Sketch.zip", PUBLISHED, layouts=(("sketch",),)
)

if __name__ == "__main__":
    BENCHMARK.script()
