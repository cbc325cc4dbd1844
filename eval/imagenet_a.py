"""ImageNet-A (Hendrycks et al., CVPR 2021, arXiv 1907.07174): 7,500 photographs that a ResNet-50 takes for others.

They are of 200 of ImageNet-1k's classes, `imagenet-a/<wnid>/`. What is learnt from all of its training images (DINOv2's
linear grid) answers with one of the 200, as the authors' code has it; for k-NN only images of these vote.
"""

from dinoreg.evaluation.readers.imagenet_sets import imagenet_set, table_6

PUBLISHED = table_6((33.5, 55.1, 71.3, 75.9))
BENCHMARK = imagenet_set("imagenet_a", "ImageNet-A", 7_500, "imagenet-a.tar", PUBLISHED, classes=200)

if __name__ == "__main__":
    BENCHMARK.script()
