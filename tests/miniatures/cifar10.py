"""CIFAR-10 in miniature: six batches pickled as Python 2 did, and names in the text protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.miniatures import python2
from tests.miniatures.pictures import labels_for, pattern

NAMES = ["airplane", "automobile", "bird"]


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0) -> Path:
    """`root/cifar-10-batches-py` with `per_class` images of each class over the training batches and in the test."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    shown, told = labels_for(2 * per_class * len(NAMES), len(NAMES), shuffled, seed)
    train, test = np.split(np.arange(len(told)), 2)
    files = {f"data_batch_{number}": part for number, part in enumerate(np.array_split(train, 5), 1)}
    for name, indices in {**files, "test_batch": test}.items():
        batch = {
            "data": planes([int(shown[index]) for index in indices], [seed * 1000 + int(index) for index in indices]),
            "labels": [int(told[index]) for index in indices],
            "batch_label": f"{name} of a miniature",
            "filenames": [f"{NAMES[told[index]]}_s_{index:06d}.png" for index in indices],
        }
        (folder / name).write_bytes(python2.dumps(batch))
    meta = {"num_cases_per_batch": len(files["data_batch_1"]), "label_names": NAMES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2.dumps_as_text(meta))
    return folder


def planes(labels: list[int], seeds: list[int]) -> np.ndarray:
    """(n, 3072) uint8: each row the red, the green and the blue plane of an image."""
    images = [np.asarray(pattern(label, each, 32, 32)) for label, each in zip(labels, seeds)]
    return np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images])
