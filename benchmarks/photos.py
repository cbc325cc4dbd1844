"""A set of photographs for the benchmarks, cut from those that scikit-image and scikit-learn carry.

    python benchmarks/photos.py FOLDER [--count 300] [--height 375 --width 500] [--quality 90]

Each file is a window of one photograph (or, where the photographs are smaller than the window, of a mosaic of
mirrored ones at their own resolution, so that large files have real detail), as JPEG with 4:2:0 chroma. A file depends
on its number alone. No network: the photographs are inside the two packages.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

# Photographs with natural colour statistics that are part of the wheels; the larger ones of scikit-image would have
# to be downloaded.
FROM_SKIMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
FROM_SKLEARN = ("china.jpg", "flower.jpg")


@lru_cache(maxsize=1)
def photographs() -> tuple[np.ndarray, ...]:
    """The photographs themselves, (H, W, 3) uint8."""
    import skimage
    import sklearn

    folders = {
        Path(skimage.__file__).parent / "data": FROM_SKIMAGE,
        Path(sklearn.__file__).parent / "datasets" / "images": FROM_SKLEARN,
    }
    files = [folder / name for folder, names in folders.items() for name in names]
    return tuple(np.asarray(Image.open(file).convert("RGB")) for file in files)


def photo(number: int, height: int, width: int) -> np.ndarray:
    """Photograph `number` of an endless set, (height, width, 3) uint8."""
    rng = np.random.default_rng(number)
    source = photographs()[number % len(photographs())]
    rows = []
    for _ in range(-(-height // (source.shape[0] - 40)) if height > source.shape[0] else 1):
        row = []
        while sum(part.shape[1] for part in row) < width:
            part = source if not row and not rows else photographs()[rng.integers(len(photographs()))]
            if rng.random() < 0.5:
                part = part[:, ::-1]
            row.append(part)
        lowest = min(part.shape[0] for part in row)
        rows.append(np.concatenate([part[:lowest] for part in row], axis=1)[:, :width])
    while sum(len(row) for row in rows) < height:
        rows.append(rows[rng.integers(len(rows))][::-1])
    mosaic = np.concatenate(rows, axis=0)
    top = rng.integers(mosaic.shape[0] - height + 1)
    return np.ascontiguousarray(mosaic[top : top + height])


def write_photos(folder: Path, count: int = 300, height: int = 375, width: int = 500, quality: int = 90) -> list[Path]:
    """Write the set, unless it is there already, and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{width}x{height}_q{quality}_{number:04d}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        if not file.is_file():
            Image.fromarray(photo(number, height, width)).save(file, quality=quality, subsampling="4:2:0")
    return files


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    for name, default in (("count", 300), ("height", 375), ("width", 500), ("quality", 90)):
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    files = write_photos(given.folder, given.count, given.height, given.width, given.quality)
    sizes = [file.stat().st_size / 1024 for file in files]
    print(f"{len(files)} files of {given.width}x{given.height} in {given.folder}, {np.mean(sizes):.0f} KiB on average")


if __name__ == "__main__":
    main()
