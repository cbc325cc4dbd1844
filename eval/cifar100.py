"""CIFAR-100 (Krizhevsky, 2009): 60,000 images of 32 x 32 pixels in 100 classes, those called fine.

The "python version": `train`, `test` and `meta` are dictionaries pickled by Python 2, which are read without running
them. The twenty coarse classes beside the fine ones are not used, as in every paper. Images go bicubically from 32
pixels straight to the crop's size. Metric: top-1 (SimCLR B.8.1); 5,067 of train for choosing C (BYOL, App. D).
"""

from dinoreg.evaluation.benchmark import Benchmark, classification_tasks, needs
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.cifar import cifar_reader

NAME, ARCHIVE = "cifar100", "cifar-100-python.tar.gz"
READ = cifar_reader(NAME, ARCHIVE, {"train": ("train",), "test": ("test",)}, "meta", "fine_label_names", "fine_labels")

PUBLISHED = fine_grained((87.5, 91.3, 93.4, 94.4), 94.5, (94.5, 81.3, 93.7))

BENCHMARK = Benchmark(
    name=NAME,
    title="CIFAR-100",
    classes=100,
    folders=("cifar-100-python", "cifar100/cifar-100-python", "cifar-100", "cifar100"),
    layouts=(needs(ARCHIVE, "train", "test", "meta"),),
    tasks=classification_tasks(READ, "top-1", {"train": 50_000, "test": 10_000}, PUBLISHED, validation_images=5_067),
    licence="no licence text found",
    aliases=("cifar-100",),
)

if __name__ == "__main__":
    BENCHMARK.script()
