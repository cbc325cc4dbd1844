"""CIFAR-10 (Krizhevsky, 2009): 60,000 images of 32 x 32 pixels in ten classes.

The "python version": `data_batch_1..5`, `test_batch` and `batches.meta` are dictionaries pickled by Python 2, which are
read without running them. Images go bicubically from 32 pixels straight to the crop's size; the near-duplicates between
train and test are known and left in. Metric: top-1 (SimCLR B.8.1); 5,000 of train for choosing C (BYOL, App. D).
"""

from dinoreg.evaluation.benchmark import Benchmark, classification_tasks, needs
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.cifar import cifar_reader

NAME, ARCHIVE = "cifar10", "cifar-10-python.tar.gz"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
META = "batches.meta"
READ = cifar_reader(NAME, ARCHIVE, {"train": TRAIN, "test": TEST}, META, "label_names", "labels")

PUBLISHED = fine_grained((97.7, 98.7, 99.3, 99.5), 99.5, (99.4, 97.1, 99.3))

BENCHMARK = Benchmark(
    name=NAME,
    title="CIFAR-10",
    classes=10,
    folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar-10", "cifar10"),
    layouts=(needs(ARCHIVE, *TRAIN, *TEST, META),),
    tasks=classification_tasks(READ, "top-1", {"train": 50_000, "test": 10_000}, PUBLISHED, validation_images=5_000),
    licence="no licence text found",
    aliases=("cifar-10",),
)

if __name__ == "__main__":
    BENCHMARK.script()
