"""FGVC-Aircraft 2013b (Maji et al., 2013): 100 variants of aircraft, 100 photographs each.

`data/images/<7 digits>.jpg`; rows `1025794 707-320` in `data/images_variant_{train,val,test}.txt`, where the class is
all that follows the first space ("Cessna 172", "F/A-18"). Classes are numbered by their lines in `data/variants.txt`.
The lowest 20 rows of every image are a copyright banner that the authors say to cut off before use; papers do not say
whether they did. We do, and every row says so. Metric: mean per class (SimCLR B.8.1). The archive's README still speaks
of an earlier edition's 10,200 images and 102 variants.
"""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from dinoreg.config.option import option
from dinoreg.data.value_range import BadImage
from dinoreg.evaluation.benchmark import Benchmark, Options, classification_tasks, needs
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.published import REGISTERS, fine_grained, single_tokens
from dinoreg.evaluation.readers.files import CroppedSource, labelled, lines, matched

NAME, ARCHIVE = "aircraft", "fgvc-aircraft-2013b.tar.gz"
BANNER_ROWS = 20  # pixels
SPLITS = ("train", "val", "test")
TABLE_4, SIZE = f"{REGISTERS}, Table 4", "DINOv2 (size not restated)"
BANNER_UNKNOWN = "banner cut off or not: not stated"


def without_banner(_index: int, image: Image.Image) -> Image.Image:
    """The image without its lowest BANNER_ROWS rows of pixels; BadImage for one that has no more."""
    if image.height <= BANNER_ROWS:
        raise BadImage(f"{image.height} rows of pixels, of which the lowest {BANNER_ROWS} are to be cut off")
    return image.crop((0, 0, image.width, image.height - BANNER_ROWS))


def read(folder: Path, options: Options) -> Data:
    """The three official splits, in the order of their files.

    raises  UserError for a list that is missing or of another form
    """
    below = folder / "data" if (folder / "data").is_dir() else folder
    names = lines(below / "variants.txt", NAME, ARCHIVE)
    splits = {}
    for split in SPLITS:
        path = below / f"images_variant_{split}.txt"
        rows = matched(path, r"(\S+) (.+)", "a number, a space and a variant", NAME, ARCHIVE)
        part = labelled(below / "images", [(variant, f"{image}.jpg") for image, variant in rows], names, path, NAME)
        cropped = CroppedSource(part.source, without_banner, f"without the lowest {BANNER_ROWS} rows")
        splits[split] = replace(part, source=cropped) if options["crop_banner"] else part
    return Data(splits, names, variant="banner cut off" if options["crop_banner"] else "banner left in")


FILES = ("images", "variants.txt", *(f"images_variant_{split}.txt" for split in SPLITS))
PUBLISHED = (
    *fine_grained((74.0, 79.4, 81.5, 87.2), 88.5, (87.3, 17.1, 79.1), BANNER_UNKNOWN),
    *single_tokens(f"{SIZE}, 0 registers", (84.6, 15.5, 73.3), BANNER_UNKNOWN, TABLE_4),
    *single_tokens(f"{SIZE}, 1 register", (85.2, 14.5, 71.1), BANNER_UNKNOWN, TABLE_4, last="register token"),
)

BENCHMARK = Benchmark(
    name=NAME,
    title="FGVC-Aircraft",
    classes=100,
    folders=("fgvc-aircraft-2013b", "fgvc-aircraft", "aircraft"),
    layouts=(needs(ARCHIVE, *(f"data/{path}" for path in FILES)), needs(ARCHIVE, *FILES)),
    tasks=classification_tasks(read, "mean per class", {"train": 3_334, "val": 3_333, "test": 3_333}, PUBLISHED),
    licence="non-commercial research only",
    options={"crop_banner": option(True, "cut off the 20 rows of pixels at the bottom that hold a copyright banner")},
    aliases=("fgvc-aircraft", "fgvc_aircraft"),
)

if __name__ == "__main__":
    BENCHMARK.script()
