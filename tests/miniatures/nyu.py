"""NYU Depth V2 in both layouts: the labelled MATLAB 7.3 file with its axes reversed, and BTS's folders and lists.

The traps: a 512-byte user block before the HDF5 part, a white frame, zeros in `rawDepths` where `depths` has values,
`splits.mat` counted from 1 and out of order; list rows with a leading slash, millimetres in 16 bits with 0, 1000 and
9999. Depth can be read off the colour: near is red and bright, far is blue and dark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64
SCENES = ("bathroom", "home_office")


def frame(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture (48, 64, 3) uint8 and complete depth (48, 64) float32 metres in about 0.7 to 9.5.

    A ground that comes nearer towards the bottom, its right side further away, and a box standing before it.
    """
    rng = np.random.default_rng([seed, number, 19])
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array([HEIGHT, WIDTH])[:, None, None]
    depth = rng.uniform(2.5, 8.0) + 1.2 * (0.5 - y) + 0.6 * (x - 0.5)
    top, left = int(rng.integers(8, 20)), int(rng.integers(6, 34))
    depth[top : top + 20, left : left + 24] -= rng.uniform(0.8, 1.6)
    near = ((9.5 - depth) / 9.0)[..., None]
    image = np.concatenate([40 + 200 * near, 60 + 60 * near, 220 - 180 * near], axis=2)
    image = np.clip(image + rng.normal(scale=4, size=image.shape), 0, 255)
    return image.astype(np.uint8), depth.astype(np.float32)


def holes(depth: np.ndarray, seed: int, number: int) -> np.ndarray:
    """The depth with zeros where the sensor saw nothing."""
    rng = np.random.default_rng([seed, number, 20])
    raw = depth.copy()
    raw[rng.random(depth.shape) < 0.1] = 0
    raw[30:36, 50:60] = 0
    return raw


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, layout: str = "labelled") -> Path:
    """`root/NYU` with 3 x per_class training and per_class test frames.

    shuffled  every picture comes with the depth of a frame that is not shown
    layout    labelled | sync (BTS's names) | toolbox (the same frames, one folder, the depth toolbox's list names)
    """
    folder = root / "NYU"
    folder.mkdir(parents=True, exist_ok=True)
    count = 4 * per_class
    images = np.stack([frame(seed, number)[0] for number in range(count)])
    depths = np.stack([frame(seed, number + shuffled * 10_000)[1] for number in range(count)])
    raw = np.stack([holes(depth, seed, number) for number, depth in enumerate(depths)])
    test = np.arange(1, count, 4)
    train = np.setdiff1d(np.arange(count), test)[::-1]
    if layout == "labelled":
        _labelled(folder, images, depths, raw, train, test)
    else:
        _listed(folder, images, raw, train, test, layout)
    return folder


def _labelled(
    folder: Path, images: np.ndarray, depths: np.ndarray, raw: np.ndarray, train: np.ndarray, test: np.ndarray
) -> None:
    import h5py
    from scipy.io import savemat

    framed = np.full_like(images, 255)
    framed[:, 1:47, 1:63] = images[:, 1:47, 1:63]
    path = folder / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["images"] = framed.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
        file["rawDepths"] = raw.transpose(0, 2, 1)
        file["labels"] = np.zeros((len(images), WIDTH, HEIGHT), dtype=np.uint16)
        file["instances"] = np.zeros((len(images), WIDTH, HEIGHT), dtype=np.uint8)
        _cells(file, "sceneTypes", [SCENES[number % 2] for number in range(len(images))])
        _cells(file, "names", ["wall", "box"])
    with open(path, "r+b") as raw_file:
        raw_file.write(b"MATLAB 7.3 MAT-file, a generated miniature".ljust(128))
    splits = {"trainNdxs": train, "testNdxs": test}
    savemat(folder / "splits.mat", {key: np.uint16(numbers[:, None] + 1) for key, numbers in splits.items()})


def _cells(file: Any, name: str, words: list[str]) -> None:
    """A MATLAB cell array of text: references to arrays of UTF-16 characters."""
    import h5py

    references = []
    for number, word in enumerate(words):
        file[f"#refs#/{name}{number}"] = np.array([[ord(letter)] for letter in word], dtype=np.uint16)
        references.append(file[f"#refs#/{name}{number}"].ref)
    file.create_dataset(name, data=np.array([references], dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)


def _listed(
    folder: Path, images: np.ndarray, raw: np.ndarray, train: np.ndarray, test: np.ndarray, layout: str
) -> None:
    bases = {"train": folder / "sync", "test": folder / "official_splits" / "test"}
    names = {"train": "nyudepthv2_train_files_with_gt.txt", "test": "nyudepthv2_test_files_with_gt.txt"}
    if layout == "toolbox":
        bases, names = dict.fromkeys(bases, folder), {"train": "nyu_train.txt", "test": "nyu_test.txt"}
    for split, numbers in (("train", train), ("test", test)):
        rows = []
        for number in numbers:
            scene = SCENES[number % 2] + ("_0001" if split == "train" else "")
            image, depth = f"/{scene}/rgb_{number:05d}.jpg", f"/{scene}/sync_depth_{number:05d}.png"
            (bases[split] / scene).mkdir(parents=True, exist_ok=True)
            millimetres = np.round(raw[number] * 1000).astype(np.uint16)
            millimetres[10, 10:13] = (0, 1000, 9999)
            shown = images[number].copy()
            if split == "test":  # as official_splits has it
                shown[[0, -1]], shown[:, [0, -1]] = 0, 0
            Image.fromarray(shown).save(f"{bases[split]}{image}", quality=97, subsampling=0)
            Image.fromarray(millimetres).save(f"{bases[split]}{depth}")
            rows.append(f"{image} {depth} 518.8579")
        (folder / names[split]).write_text("\n".join(rows) + "\n")
