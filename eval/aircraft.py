"""FGVC-Aircraft 2013b (Maji et al., 2013): 100 variants of aircraft, 100 photographs each.

`data/images/<7 digits>.jpg`; rows `1025794 707-320` in `data/images_variant_{train,val,test}.txt`, where the class is
all that follows the first space ("Cessna 172", "F/A-18"). Classes are numbered by their lines in `data/variants.txt`.
The lowest 20 rows of every image are a copyright banner that the authors say to cut off before use; papers do not say
whether they did. We do, and every row says so. Metric: mean per class (SimCLR B.8.1). The archive's README still speaks
of an earlier edition's 10,200 images and 102 variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.commands.main import script
from dinoreg.evaluation.benchmark import Benchmark, Need, Option, Published, Task
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.arrays import BottomCutSource
from dinoreg.evaluation.readers.published import REGISTERS, fine_grained
from dinoreg.evaluation.readers.text import lines, numbered, paths_source
from dinoreg.runtime.errors import UserError

NAME, ARCHIVE = "aircraft", "fgvc-aircraft-2013b.tar.gz"
BANNER_ROWS = 20  # pixels
COUNTS = {"train": 3_334, "val": 3_333, "test": 3_333}
TABLE_4, MODEL = f"{REGISTERS}, Table 4", "DINOv2 (size not restated)"
BANNER_UNKNOWN = "banner cut off or not: not stated"


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """The three official splits, in the order of their files."""
    inside = folder / "data" if (folder / "data").is_dir() else folder
    names = [line.strip() for line in lines(inside / "variants.txt", NAME, ARCHIVE)]
    numbers = {name: number for number, name in enumerate(names)}
    splits = {}
    for split in ("train", "val", "test"):
        listed = inside / f"images_variant_{split}.txt"
        rows = [line.strip().split(" ", 1) for line in lines(listed, NAME, ARCHIVE)]
        for row in rows:
            if len(row) != 2:
                raise UserError(f"{NAME}: {listed}: {row[0]!r} has no class, expected a number, a space and a variant")
        source = paths_source(inside / "images", (f"{image}.jpg" for image, _ in rows), NAME)
        labels = numbered((name for _, name in rows), numbers, listed, NAME)
        splits[split] = Labelled(
            BottomCutSource(source, BANNER_ROWS) if options["crop_banner"] else source, labels, len(names)
        )
    return Data(splits, names, variant="banner cut off" if options["crop_banner"] else "banner left in")


NEEDS = ("images", "variants.txt", *(f"images_variant_{split}.txt" for split in ("train", "val", "test")))
BENCHMARK = Benchmark(
    name=NAME,
    title="FGVC-Aircraft",
    task="classification",
    classes=100,
    splits="3,334 / 3,333 / 3,333",
    folders=("fgvc-aircraft-2013b", "fgvc-aircraft", "aircraft"),
    layouts=(tuple(Need(f"data/{path}", ARCHIVE) for path in NEEDS), tuple(Need(path, ARCHIVE) for path in NEEDS)),
    tasks=(
        Task(
            protocol="logistic",
            read=read,
            metric="mean per class",
            counts=COUNTS,
            published=(
                *fine_grained((74.0, 79.4, 81.5, 87.2), 88.5, (87.3, 17.1, 79.1), BANNER_UNKNOWN),
                Published(f"{MODEL}, 0 registers", 84.6, TABLE_4, f"the class token; {BANNER_UNKNOWN}"),
                Published(f"{MODEL}, 0 registers", 15.5, TABLE_4, BANNER_UNKNOWN, "normal patch token"),
                Published(f"{MODEL}, 0 registers", 73.3, TABLE_4, BANNER_UNKNOWN, "outlier patch token"),
                Published(f"{MODEL}, 1 register", 85.2, TABLE_4, f"the class token; {BANNER_UNKNOWN}"),
                Published(f"{MODEL}, 1 register", 14.5, TABLE_4, BANNER_UNKNOWN, "normal patch token"),
                Published(f"{MODEL}, 1 register", 71.1, TABLE_4, BANNER_UNKNOWN, "register token"),
            ),
        ),
        Task(protocol="knn", read=read, metric="top-1", counts=COUNTS),
    ),
    download="fgvc-aircraft-2013b.tar.gz",
    licence="non-commercial research only",
    options=(Option("crop_banner", True, "cut off the 20 rows of pixels at the bottom that hold a copyright banner"),),
    aliases=("fgvc-aircraft", "fgvc_aircraft"),
)

if __name__ == "__main__":
    script(BENCHMARK)
