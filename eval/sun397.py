"""SUN397 (Xiao et al., CVPR 2010): 108,754 photographs of 397 kinds of scene, with ten splits of 50 + 50 per class.

`ClassName.txt` lists the classes as `/a/abbey`, some of them nested (`/c/church/indoor`); a class's number is its row.
`Training_01.txt` … `Testing_10.txt` list images as `/a/abbey/sun_….jpg` and lie inside `SUN397/` or beside it, as they
were unpacked. Some files hold PNG or GIF under `.jpg`. The papers use the first split only. Metric: top-1 (SimCLR
B.8.1); 10 images of each class are held out of train for choosing C (BYOL, App. D: 15,880 / 3,970).
"""

from pathlib import Path

from dinoreg.config.option import option
from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.published import fine_grained
from dinoreg.evaluation.readers.files import first_existing, labelled, lines, matched, require_distinct

NAME, ARCHIVE, PARTITIONS = "sun397", "SUN397.tar.gz", "Partitions.zip"
# Of the lists; ../.. where SUN397/ lies in another SUN397/.
PLACES = (".", "..", "../..", "Partitions", "../Partitions")


def read(folder: Path, options: Options) -> Data:
    """Both halves of one of the ten splits, in the order of their files.

    raises  UserError for a list that is missing or of another form
    """
    split = options["split"]
    path = folder / "ClassName.txt"
    names = [line.removeprefix("/") for line in lines(path, NAME, ARCHIVE)]
    require_distinct(names, "class", f"{NAME}: {path}")
    halves = {
        half: _half(folder, f"{prefix}_{split:02d}.txt", names)
        for half, prefix in (("train", "Training"), ("test", "Testing"))
    }
    # The archive sorts the classes into folders by their first letter, which says nothing.
    return Data(halves, class_names=[name.split("/", 1)[-1] for name in names], variant=f"split {split}")


def _half(folder: Path, file: str, names: list[str]) -> Labelled:
    path = first_existing(folder, [f"{place}/{file}" for place in PLACES])
    archive = f"{PARTITIONS} (unpack it inside {folder.name} or beside it)"
    rows = matched(path, r"/?((.*)/.*)", "/class/image", NAME, archive)
    return labelled(folder, [(name, image) for image, name in rows], names, path, NAME)


PUBLISHED = fine_grained(
    (74.4, 77.3, 78.7, 78.7), 78.9, (78.6, 37.7, 78.5), "DINOv2's data drew on this training split"
)

BENCHMARK = Benchmark(
    name=NAME,
    title="SUN397",
    classes=397,
    splits="19,850 / 19,850 (split 1 of 10)",
    folders=("SUN397", "sun397"),
    layouts=tuple(
        (
            *needs(ARCHIVE, "ClassName.txt"),
            *needs(PARTITIONS, *(str(Path(place) / f"{half}_01.txt") for half in ("Training", "Testing"))),
        )
        for place in PLACES
    ),
    tasks=classification_tasks(read, "top-1", {"train": 19_850, "test": 19_850}, PUBLISHED, validation_images=3_970),
    download="SUN397.tar.gz and Partitions.zip (inside SUN397/ or beside it)",
    licence="research use; no licence text found",
    options={"split": option(1, "which of the ten official splits", low=1, high=10)},
    aliases=("sun", "sun-397"),
)

if __name__ == "__main__":
    BENCHMARK.script()
