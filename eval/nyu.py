"""NYU Depth V2 (Silberman et al., ECCV 2012): indoor Kinect frames with depth in metres, 480 x 640.

Two layouts, whose results are not interchangeable. `sync`, what DINOv2 used (BTS and the depth toolbox after it):
24,231 synchronised frames to train on and 654 to test, listed as `/scene/rgb_00045.jpg /scene/sync_depth_00045.png
518.8579` (the slash is not the root of the disk; the third column, the focal length, is not used), depths as 16-bit
millimetres. `labelled`, the authors' file of 1,449 frames in HDF5 with all axes reversed, split 795 / 654 by
`splits.mat` (numbered from 1): the same 654 test frames, but a far weaker head, called NYU-795 here.

The test truth of `sync` was made from the file's `rawDepths`, 0 where the sensor saw nothing; `labelled` uses the same
unless `depths=filled` asks for the in-painted ones. The white frame around the pictures was blackened in `sync`; it is
blackened here in `labelled` too, so that both show a backbone the same. Pixels count inside Eigen's crop. For pictures
of other sizes the crops shrink in proportion.

Of public ViT-B/14 models DVT (arXiv 2401.02957) publishes no RMSE but delta1 86.88 without and 87.88 with registers,
AbsRel .1238 and .1190. No published number was found for NYU-795.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dinoreg.commands.main import script
from dinoreg.data.decode import BadImage
from dinoreg.data.source import Source
from dinoreg.evaluation.benchmark import Benchmark, Need, Option, Published, Task
from dinoreg.evaluation.data import Data, DepthMaps
from dinoreg.evaluation.dense.depth_images import read_metres
from dinoreg.evaluation.metrics.depth import Crop, scaled_crop
from dinoreg.evaluation.readers.text import lines, matlab, missing, paths_source
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError

NAME = "nyu"
SIZE = (480, 640)  # height, width that the crops are stated for
EIGEN_CROP: Crop = ((45, 471, 41, 601), SIZE)  # top, bottom, left, right, ends exclusive
TRAIN_CROP: Crop = ((45, 472, 43, 608), SIZE)
FRAME: Crop = ((7, 474, 7, 632), SIZE)  # what lies inside the white frame

LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
LABELLED_ARCHIVE = "the labelled dataset of the NYU Depth V2 page (2.8 GB)"
SPLITS_ARCHIVE = "indoor_seg_sup of the same authors, or the dataset's page"
# (train list, test list, folders that the rows of each may be relative to): BTS's names, then the depth toolbox's.
LISTS = (
    ("nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt"),
    ("nyu_train.txt", "nyu_test.txt"),
)
BASES = {"train": ("sync", "train", "."), "test": ("official_splits/test", "test", ".")}
LIST_ARCHIVE = "train_test_inputs of BTS, or the lists of the Monocular-Depth-Estimation-Toolbox"
FRAMES_ARCHIVE = {"train": "sync.zip of BTS", "test": "official_splits of BTS, made from the labelled file"}


def read(folder: Path, options: Mapping[str, Any]) -> Data:
    """The splits of the chosen layout; of both, `auto` takes `sync`, to which the published numbers belong."""
    layout, depths = options["layout"], options["depths"]
    for key, known in (("layout", ("auto", "labelled", "sync")), ("depths", ("raw", "filled"))):
        if options[key] not in known:
            raise UserError(f"{NAME}.{key}={options[key]}: expected {', '.join(known)}")
    lists = next((pair for pair in LISTS if all((folder / name).is_file() for name in pair)), None)
    if layout == "auto":
        layout = "sync" if lists is not None else "labelled"
    if layout == "labelled":
        splits, variant = _labelled(folder, depths), f"NYU-795, {depths} depths"
        counts = {"train": 795, "test": 654}
    else:
        if depths != "raw":
            raise UserError(f"{NAME}.depths={depths}: the sync layout holds raw depths only; use layout=labelled")
        for name in LISTS[0] if lists is None else ():
            if not (folder / name).is_file():
                raise missing(folder / name, NAME, LIST_ARCHIVE)
        assert lists is not None
        splits = {split: _listed(folder, name, split) for split, name in zip(("train", "test"), lists)}
        variant, counts = "synced frames, raw depths", {"train": 24231, "test": 654}
    return Data(
        splits, variant=variant, extra={"eigen_crop": EIGEN_CROP, "train_crop": TRAIN_CROP, "official_counts": counts}
    )


def _listed(folder: Path, name: str, split: str) -> DepthMaps:
    """The frames of a list file."""
    rows = []
    for number, line in enumerate(lines(folder / name, NAME, LIST_ARCHIVE), 1):
        fields = line.split()
        if len(fields) < 2:
            raise UserError(f"{NAME}: {folder / name} row {number}: {line!r}, expected an image and its depth")
        rows.append((fields[0].lstrip("/"), fields[1].lstrip("/")))
    if not rows:
        raise UserError(f"{NAME}: {folder / name} lists no images")
    tried = [folder / base for base in BASES[split]]
    base = next((each for each in tried if (each / rows[0][0]).is_file()), None)
    if base is None:
        raise missing(tried[0] / rows[0][0], NAME, FRAMES_ARCHIVE[split])
    images = paths_source(base, (image for image, _ in rows), NAME)
    maps = paths_source(base, (depth for _, depth in rows), NAME)
    return DepthMaps(images, lambda index: read_metres(Path(maps.name(index))), maps.stamp())


class LabelledFile:
    """`nyu_depth_v2_labeled.mat`, opened when it is first read; reads may come from many threads.

    h5py sees MATLAB's axes in reverse: images (n, 3, W, H) uint8, depths (n, W, H) float32 metres.
    """

    def __init__(self, path: Path, depths: str) -> None:
        self.path, self.key = path, {"raw": "rawDepths", "filled": "depths"}[depths]
        self._lock = Lock()
        self._file: Any = None
        images, maps = self._shape("images"), self._shape(self.key)
        if len(images) != 4 or images[1] != 3 or maps != (images[0], *images[2:]):
            raise UserError(
                f"{NAME}: {path}: images {images} and {self.key} {maps}, expected (n, 3, width, height) and "
                f"(n, width, height)"
            )
        self.count, self.width, self.height = images[0], images[2], images[3]

    def image(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8 of frame `number`, from 0, black outside FRAME."""
        found = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        inside = scaled_crop(FRAME, self.height, self.width)
        found[inside] = self._read("images", number).transpose(2, 1, 0)[inside]
        return found

    def depth(self, number: int) -> np.ndarray:
        """(H, W) float32 metres of frame `number`, from 0; 0 where unknown."""
        return np.ascontiguousarray(self._read(self.key, number).T, dtype=np.float32)

    def _read(self, key: str, number: int) -> np.ndarray:
        try:
            with self._lock:
                return self._open()[key][number]
        except OSError as error:
            raise BadImage(f"frame {number + 1} of {key} cannot be read: {error}") from error

    def _shape(self, key: str) -> tuple[int, ...]:
        try:
            with self._lock:
                return tuple(self._open()[key].shape)
        except (OSError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{NAME}: {self.path}: {key} cannot be read, expected a MATLAB 7.3 file ({reason})"
            ) from None

    def _open(self) -> Any:
        if self._file is None:
            try:
                import h5py
            except ImportError:
                raise UserError(f"{NAME}: reading {self.path} needs h5py: {install('h5py')}") from None
            self._file = h5py.File(self.path, "r")
        return self._file


class LabelledImages(Source):
    """Some frames of a LabelledFile.

    numbers  from 0
    """

    def __init__(self, file: LabelledFile, numbers: Sequence[int]) -> None:
        self.file, self.numbers = file, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> np.ndarray:
        return self.file.image(self.numbers[index])

    def name(self, index: int) -> str:
        return f"{self.file.path}: frame {self.numbers[index] + 1}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{LABELLED} {self.file.count} {self.numbers}".encode()).hexdigest()[:16]

    def stamp(self) -> str:
        found = os.stat(self.file.path)
        text = f"{self.fingerprint()} {found.st_size} {found.st_mtime_ns}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _labelled(folder: Path, depths: str) -> dict[str, DepthMaps]:
    for name, archive in ((LABELLED, LABELLED_ARCHIVE), (SPLITS, SPLITS_ARCHIVE)):
        if not (folder / name).is_file():
            raise missing(folder / name, NAME, archive)
    file = LabelledFile(folder / LABELLED, depths)
    path = folder / SPLITS
    given = matlab(path, ("trainNdxs", "testNdxs"), NAME, SPLITS_ARCHIVE)
    numbers = {"train": given["trainNdxs"].astype(np.int64).ravel(), "test": given["testNdxs"].astype(np.int64).ravel()}
    for split, found in numbers.items():
        if not len(found):
            raise UserError(f"{NAME}: {path}: {split}Ndxs is empty")
        if found.min() < 1 or found.max() > file.count:
            raise UserError(f"{NAME}: {path}: {split}Ndxs holds {found.min()}..{found.max()}, expected 1..{file.count}")
    shared = np.intersect1d(numbers["train"], numbers["test"])
    if len(shared):
        raise UserError(f"{NAME}: {path}: frame {shared[0]} is in both splits")
    return {split: _frames(file, (found - 1).tolist()) for split, found in numbers.items()}


def _frames(file: LabelledFile, numbers: list[int]) -> DepthMaps:
    def depth(index: int) -> np.ndarray:
        try:
            return file.depth(numbers[index])
        except BadImage as error:
            raise UserError(f"{NAME}: {file.path}: {error}") from None

    found: Callable[[int], np.ndarray] = depth
    return DepthMaps(LabelledImages(file, numbers), found)


REG = "DINOv2 with registers, arXiv 2309.16588v2, Table 2a"
D2 = "DINOv2, arXiv 2304.07193v2, Table 11"
D3 = "DINOv3, arXiv 2508.10104"
TTR = "Vision Transformers Don't Need Trained Registers, arXiv 2506.08010"
UNSTATED = "lin.1 or lin.4 is not stated; by its scale lin.1"
DISTILLED = "0 registers, LVD-142M, distilled from ViT-g"
DVT_CODE = "head and settings of DVT (final norm, rate 5e-3): compare within this paper; mean of 3 seeds"
DPT_HEAD = "a DPT decoder in place of the linear head"

PUBLISHED = (
    *(
        Published(f"{model}, {registers} registers", value, REG, f"{differs}{UNSTATED}")
        for model, differs, values in (
            ("DINOv2 ViT-L/14 (ImageNet-22k)", "", (0.378, 0.366)),
            ("DeiT-III ViT-B (ImageNet-22k)", "", (0.511, 0.512)),
            ("OpenCLIP ViT-B/16", "trained on Shutterstock; ", (0.702, 0.661)),
        )
        for registers, value in zip((0, 4), values)
    ),
    *(
        Published(model, value, D2, differs, variant)
        for variant, values, note in (
            ("lin.1", (0.449, 0.399, 0.384, 0.344), ""),
            ("lin.4", (0.417, 0.362, 0.333, 0.298), ""),
            ("DPT", (0.356, 0.317, 0.293, 0.279), f"{DPT_HEAD}; "),
        )
        for model, value, differs in zip(
            (*(f"DINOv2 ViT-{size}/14 (distilled)" for size in "SBL"), "DINOv2 ViT-g/14"),
            values,
            (*(f"{note}{DISTILLED}",) * 3, f"{note}0 registers, LVD-142M"),
        )
    ),
    Published(
        "DINOv2 ViT-g/14, 4 registers",
        0.372,
        D3,
        "batch norm and a linear layer on the last block without class token, SigLoss only, rates and decays swept; "
        "that it is the model with registers was concluded from another column",
    ),
    Published("DINOv2 ViT-L/14 (LVD-142M), 0 registers", 0.3876, TTR, f"{DVT_CODE}, +- .0014"),
    Published("DINOv2 ViT-L/14 (LVD-142M), 4 registers", 0.3823, TTR, f"{DVT_CODE}, +- .0011"),
    Published("DINOv2 ViT-L/14 (LVD-142M), one test-time register", 0.3774, TTR, f"{DVT_CODE}, +- .0013"),
    Published("OpenCLIP ViT-B/16", 0.6025, TTR, DVT_CODE),
)

BENCHMARK = Benchmark(
    name=NAME,
    title="NYU Depth V2",
    task="depth",
    classes=None,
    splits="24,231 / 654 (sync) or 795 / 654 (labelled, NYU-795)",
    folders=("NYU", "nyu", "nyu_depth_v2", "nyudepthv2", "nyud"),
    layouts=(
        (Need(LABELLED, LABELLED_ARCHIVE), Need(SPLITS, SPLITS_ARCHIVE)),
        *(tuple(Need(name, LIST_ARCHIVE) for name in pair) for pair in LISTS),
    ),
    tasks=(
        # Training counts hang on the layout: `read` gives them as `official_counts`.
        Task(protocol="depth", read=read, metric="RMSE", counts={"test": 654}, published=PUBLISHED),
    ),
    download=f"{LABELLED} and {SPLITS}; or, for the published protocol, BTS's sync.zip, official_splits and file lists",
    licence="no licence text found; unverified",
    options=(
        Option("layout", "auto", "auto | labelled (the .mat file, NYU-795) | sync (BTS folders and lists)"),
        Option("depths", "raw", "raw | filled (in-painted; labelled layout only)"),
    ),
    aliases=("nyud", "nyu_depth_v2"),
)

if __name__ == "__main__":
    script(BENCHMARK)
