"""ImageNet-R (Hendrycks et al., ICCV 2021, arXiv 2006.16241): 30,000 renditions: art, cartoons, toys, tattoos.

They are of 200 of ImageNet-1k's classes, `imagenet-r/<wnid>/`; not the 200 of ImageNet-A. What is learnt from all of
ImageNet-1k's training images (DINOv2's linear grid) answers with one of the 200, as the authors' code has it; for k-NN
only images of these vote.
"""

from dinoreg.evaluation.readers.imagenet_sets import imagenet_set, table_6

PUBLISHED = table_6((53.7, 63.3, 74.4, 78.8))
BENCHMARK = imagenet_set("imagenet_r", "ImageNet-R", 30_000, "imagenet-r.tar", PUBLISHED, classes=200)

if __name__ == "__main__":
    BENCHMARK.script()
