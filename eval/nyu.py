"""NYU Depth V2 (Silberman et al., ECCV 2012): indoor Kinect frames with depth in metres, 480 x 640.

Two layouts, whose results are not interchangeable. `sync`, what DINOv2 used (BTS and the depth toolbox after it):
24,231 synchronised frames to train on and 654 to test, listed as `/scene/rgb_00045.jpg /scene/sync_depth_00045.png
518.8579` (the slash is not the file system's root; the third column, the focal length, is not used), depths as 16-bit
millimetres. `labelled`, the authors' file of 1,449 frames in HDF5 with all axes reversed, split 795 / 654 by
`splits.mat` (numbered from 1): the same 654 test frames, but a far weaker head, called NYU-795 here.

The test truth of `sync` was made from the file's `rawDepths`, 0 where the sensor saw nothing; `labelled` uses the same
and not the in-painted ones. The white frame around the pictures was blackened in `sync`; it is blackened here in
`labelled` too, so that both show a backbone the same. Pixels count inside Eigen's crop. For pictures
of other sizes the crops shrink in proportion.

Of public ViT-B/14 models DVT (arXiv 2401.02957) publishes no RMSE but delta1 86.88 without and 87.88 with registers,
AbsRel .1238 and .1190. No published number was found for NYU-795.
"""

import hashlib
from pathlib import Path
from threading import Lock

import numpy as np

from dinoreg.data.source import ChosenSource, Source, stamp_of_files
from dinoreg.evaluation.benchmark import Benchmark, Options, Published, Task, needs
from dinoreg.evaluation.data import Data, DepthMaps
from dinoreg.evaluation.metrics.depth import Crop, scaled_crop
from dinoreg.evaluation.published import DINOV2, DINOV3, at_test_time, released, with_registers
from dinoreg.evaluation.readers.files import matched, matlab_numbers, missing, paths_source, present
from dinoreg.evaluation.readers.pixel_maps import read_millimetres
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError, reworded

NAME = "nyu"
SIZE = (480, 640)  # height, width that the crops are stated for
EIGEN_CROP: Crop = ((45, 471, 41, 601), SIZE)  # top, bottom, left, right, ends exclusive
TRAIN_CROP: Crop = ((45, 472, 43, 608), SIZE)
FRAME: Crop = ((7, 474, 7, 632), SIZE)  # what lies inside the white frame

LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
DEPTHS = "rawDepths"  # in LABELLED
LABELLED_ARCHIVE = "the labelled dataset of the NYU Depth V2 page (2.8 GB)"
SPLITS_ARCHIVE = "indoor_seg_sup of the same authors, or the dataset's page"
# (train list, test list, folders that the rows of each may be relative to): BTS's names, then the depth toolbox's.
LISTS = (("nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt"), ("nyu_train.txt", "nyu_test.txt"))
BASES = {"train": ("sync", "train", "."), "test": ("official_splits/test", "test", ".")}
LIST_ARCHIVE = "train_test_inputs of BTS, or the lists of the Monocular-Depth-Estimation-Toolbox"
FRAMES_ARCHIVE = {"train": "sync.zip of BTS", "test": "official_splits of BTS, made from the labelled file"}


def read(folder: Path, options: Options) -> Data:
    """The splits of `sync` where its lists are there, to which the published numbers belong, else of `labelled`.

    extra["eigen_crop"] is the part of an image that is scored, extra["train_crop"] the part that is trained on.

    raises  UserError for a file that is missing or of another form
    """
    complete = [pair for pair in LISTS if all((folder / name).is_file() for name in pair)]
    if complete:
        splits = {split: _listed(folder, name, split) for split, name in zip(BASES, complete[0])}
    else:
        splits = _labelled(folder)
    variant = f"{'synced frames' if complete else 'NYU-795'}, raw depths"
    return Data(splits, variant=variant, extra={"eigen_crop": EIGEN_CROP, "train_crop": TRAIN_CROP})


def _listed(folder: Path, name: str, split: str) -> DepthMaps:
    """The frames of a list file."""
    rows = matched(folder / name, r"/*(\S+)\s+/*(\S+).*", "an image and its depth", NAME, LIST_ARCHIVE)
    base = folder / next((each for each in BASES[split] if (folder / each / rows[0][0]).is_file()), BASES[split][0])
    images = present(paths_source(base, (image for image, _ in rows), NAME), NAME, FRAMES_ARCHIVE[split])
    maps = paths_source(base, (depth for _, depth in rows), NAME)
    return DepthMaps(images, lambda index: read_millimetres(Path(maps.name(index))), maps.stamp())


class LabelledFrames(Source):
    """Frames of `nyu_depth_v2_labeled.mat`; reads may come from many threads.

    h5py sees MATLAB's axes in reverse: images (n, 3, W, H) uint8, depths (n, W, H) float32 metres.

    raises  UserError without h5py, and for a file that is missing or of another form
    """

    def __init__(self, path: Path) -> None:
        with reworded(f"{NAME}: reading {path} needs h5py: {install('h5py')}", ImportError):
            import h5py
        self.path, self._lock = path, Lock()
        if not path.exists():
            raise missing(path, NAME, LABELLED_ARCHIVE)
        what = f"images and {DEPTHS} cannot be read, expected a MATLAB 7.3 file"
        with reworded(f"{NAME}: {path}: {what}", OSError, KeyError, AttributeError):
            self._file = h5py.File(path, "r")
            images, maps = (tuple(self._file[key].shape) for key in ("images", DEPTHS))
        if len(images) != 4 or images[1] != 3 or maps != (images[0], *images[2:]):
            expected = "expected (n, 3, width, height) and (n, width, height)"
            raise UserError(f"{NAME}: {path}: images {images} and {DEPTHS} {maps}, {expected}")
        self.total, _, self.width, self.height = images

    def __len__(self) -> int:
        return self.total

    def read(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8, black outside FRAME."""
        image = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        within = scaled_crop(FRAME, self.height, self.width)
        image[within] = self._read("images", index).transpose(2, 1, 0)[within]
        return image

    def depth(self, index: int) -> np.ndarray:
        """Depth (H, W) float32 metres, 0 where unknown; UserError where it cannot be read."""
        with reworded(f"{NAME}: {self.name(index)}: {DEPTHS} cannot be read", OSError):
            return np.ascontiguousarray(self._read(DEPTHS, index).T, dtype=np.float32)

    def _read(self, key: str, index: int) -> np.ndarray:
        with self._lock:
            return self._file[key][index]

    def name(self, index: int) -> str:
        """The file and the number of the frame, from 1."""
        return f"{self.path}: frame {index + 1}"

    def fingerprint(self) -> str:
        """16 hexadecimal digits over the file's name and its number of frames."""
        return hashlib.sha256(f"{LABELLED} {self.total}".encode()).hexdigest()[:16]

    def stamp(self) -> str:
        """As `fingerprint`, and also over the file's size and time of change."""
        return stamp_of_files(self.fingerprint().encode(), [str(self.path)])


def _labelled(folder: Path) -> dict[str, DepthMaps]:
    frames, path = LabelledFrames(folder / LABELLED), folder / SPLITS
    train, test = matlab_numbers(path, ("trainNdxs", "testNdxs"), frames.total, NAME, SPLITS_ARCHIVE).values()
    shared = np.intersect1d(train, test)
    if len(shared):
        raise UserError(f"{NAME}: {path}: frame {shared[0]} is in both splits")

    def split(chosen: np.ndarray) -> DepthMaps:
        return DepthMaps(ChosenSource(frames, chosen), lambda index: frames.depth(int(chosen[index])))

    return {"train": split(train - 1), "test": split(test - 1)}


DVT_CODE = "head and settings of DVT (final norm, rate 5e-3): compare within this paper"
DPT = "a DPT decoder in place of the linear head"
SWEPT = (
    "batch norm and a linear layer on the last block without class token, SigLoss only, rates and decays swept; "
    "that it is the model with registers was concluded from another column"
)
SCALE = "lin.1 or lin.4 is not stated; by its scale lin.1"
PUBLISHED = (
    *with_registers(
        (0.378, 0.366, 0.511, 0.512, 0.702, 0.661), "Table 2a", (SCALE, SCALE, f"trained on Shutterstock; {SCALE}")
    ),
    *released((0.449, 0.399, 0.384, 0.344), f"{DINOV2}, Table 11", variant="lin.1"),
    *released((0.417, 0.362, 0.333, 0.298), f"{DINOV2}, Table 11", variant="lin.4"),
    *released((0.356, 0.317, 0.293, 0.279), f"{DINOV2}, Table 11", DPT, variant="DPT"),
    Published("DINOv2 ViT-g/14, 4 registers", 0.372, DINOV3, SWEPT),
    *at_test_time((0.3876, 0.3823, 0.3774, 0.6025), f"{DVT_CODE}; ", (", ± .0014", ", ± .0011", ", ± .0013", "")),
)

BENCHMARK = Benchmark(
    name=NAME,
    title="NYU Depth V2",
    task="depth",
    classes=None,
    splits="24,231 / 654 (sync) or 795 / 654 (labelled, NYU-795)",
    folders=("NYU", "nyu", "nyu_depth_v2", "nyudepthv2", "nyud"),
    layouts=(
        (*needs(LABELLED_ARCHIVE, LABELLED), *needs(SPLITS_ARCHIVE, SPLITS)),
        *(needs(LIST_ARCHIVE, *pair) for pair in LISTS),
    ),
    tasks=(Task("depth", read, "RMSE", {"test": 654}, PUBLISHED),),  # how many there are of train hangs on the layout
    download=f"{LABELLED} and {SPLITS}; or, for the published protocol, BTS's sync.zip, official_splits and file lists",
    licence="no licence text found; unverified",
    aliases=("nyud", "nyu_depth_v2"),
)

if __name__ == "__main__":
    BENCHMARK.script()
