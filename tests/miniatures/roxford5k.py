"""Revisited Oxford in small: pictures of four things, some small and in a corner, and gnd_roxford5k.pkl of Python 2."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures import python2
from tests.miniatures.pictures import COLOURS, pattern, save

THINGS = 4


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """root/roxford5k with per_class pictures of each thing in the database, and two queries of each."""
    return write_set(root, "roxford5k", per_class=per_class, shuffled=shuffled, seed=seed)


def write_set(root: Path, name: str, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """Easy are pictures of a thing, hard those where something else covers half, junk those of which a corner is left.

    A query's picture is mostly of another thing: only its box shows what is searched for. Truths are lists, or arrays
    as NumPy writes them, and one query has none; `shuffled` ones are of another thing than the pictures show.
    """
    folder, rng = root / name, np.random.default_rng(seed)
    per_class = max(per_class, 3)
    images = [f"thing_{number:06d}" for number in range(per_class * THINGS)]
    kinds = [("easy", "hard", "junk")[(number // THINGS) % 3] for number in range(len(images))]
    for number, image in enumerate(images):
        picture = pattern(number % THINGS, seed + number, 40, 56)
        covered = {"easy": 0, "hard": 20, "junk": 48}[kinds[number]]
        picture.paste((120, 120, 120), (56 - covered, 0, 56, 40))
        save(picture, folder / "jpg" / f"{image}.jpg")
    queries, truths = [], []
    for number in range(2 * THINGS):
        thing = number % THINGS
        picture = Image.new("RGB", (72, 60), tuple(COLOURS[(thing + 1) % THINGS].astype(int)))
        picture.paste(pattern(thing, seed + 500 + number, 30, 40), (30, 8))
        queries.append(f"query_{number:06d}")
        save(picture, folder / "jpg" / f"{queries[-1]}.jpg")
        told = int(rng.integers(THINGS)) if shuffled else thing
        truth = {kind: [at for at, of in enumerate(kinds) if of == kind and at % THINGS == told] for kind in set(kinds)}
        truths.append({"bbx": [30.2, 8.0, 69.9, 37.6], **truth})
    truths[-1] |= {"easy": np.array([], dtype=np.int64), "hard": np.array([], dtype=np.int64)}
    content = {"imlist": images, "qimlist": queries, "gnd": truths}
    (folder / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol=2) if seed % 2 else python2.dumps(content))
    return folder
