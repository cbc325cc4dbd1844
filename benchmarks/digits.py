"""Write scikit-learn's handwritten digits as a labelled folder, for an evaluation on real data without a download.

python benchmarks/digits.py FOLDER
dinoreg eval FOLDER weights=runs/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48  # pixels; the digits themselves have 8


def write_digits(folder: Path) -> list[Path]:
    """1,797 grey PNG files, one subfolder per digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    written = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.uint8(pixels * (255 / 16))).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(path)
        written.append(path)
    return written


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    given = options.parse_args()
    print(f"{len(write_digits(given.folder))} images in {given.folder}")


if __name__ == "__main__":
    main()
