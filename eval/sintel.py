"""MPI Sintel (Butler et al. 2012): optical flow of a rendered film, in a clean and a final pass.

Pairs are consecutive frames of a scene; the flow file of frame k leads from k to k + 1, and the last frame has none.
Occlusion masks come one for each pair, masks of invalid pixels one for each frame.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from dinoreg.config.option import option
from dinoreg.data.source import PathSource
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, Task
from dinoreg.evaluation.data import Data, FlowPairs
from dinoreg.evaluation.readers.files import missing, paths_source, read_bytes
from dinoreg.evaluation.readers.pixel_maps import UNREADABLE, read_pixels
from dinoreg.runtime.errors import UserError, reworded

NAME = "sintel"
PASSES = ("clean", "final")
TEST_SCENES = ("temple_2", "temple_3")  # CroCo's validation scenes; the official test set's flow is not public
IMAGES = "MPI-Sintel-complete.zip or MPI-Sintel-training_images.zip"
EXTRAS = "MPI-Sintel-complete.zip or MPI-Sintel-training_extras.zip"
ARCHIVES = {"clean": IMAGES, "final": IMAGES, "flow": EXTRAS, "occlusions": EXTRAS, "invalid": EXTRAS}
UNKNOWN_FLOW = 1e9  # components beyond it are unknown, by the convention of .flo files
LARGEST_FLOW = 1000.0  # pixels; flow of this length or more counts as invalid, as in RAFT
LARGEST_SIDE = 100_000  # pixels; beyond it a .flo header is damaged
HEADER = 12  # bytes of a .flo file before its data


def read(folder: Path, options: Options) -> Data:
    """Pairs of temple_2 and temple_3 as "test", those of the other scenes as "train"; by default of both passes.

    The splits are those of the first pass; all passes are extra["passes"] = {pass: splits}, with one source of frames.

    raises  UserError for a folder or file that is missing, for gaps between frames, and without scenes of either split
    """
    wanted = PASSES if options["pass"] == "both" else (options["pass"],)
    root = folder / "training"
    for part in (*wanted, "flow", "occlusions", "invalid"):
        if not (root / part).is_dir():
            raise missing(root / part, NAME, ARCHIVES[part])
    # Sorted, because the order of a folder's entries depends on the file system.
    names = sorted(path.name for path in (root / wanted[0]).iterdir() if path.is_dir() and path.name[0] != ".")
    scenes = {name: _frames(root, wanted, name) for name in names}
    scored = [name for name in TEST_SCENES if name in scenes]
    if not scored or len(scored) == len(scenes):
        expected = f"expected one of {' and '.join(TEST_SCENES)} to score on and others to fit on"
        known = ", ".join(scenes) or "(none)"
        raise UserError(f"{NAME}: {root / wanted[0]} has the scenes {known}, {expected}; they come from {IMAGES}")
    paths = [f"{each}/{frame}.png" for each in wanted for frames in scenes.values() for frame in frames]
    source = paths_source(root, paths, NAME)
    passes: dict[str, dict[str, FlowPairs]] = {each: {} for each in wanted}
    for each, splits in passes.items():
        for split in ("train", "test"):
            chosen = [frames for name, frames in scenes.items() if (name in scored) == (split == "test")]
            pairs = [pair for frames in chosen for pair in pairwise(frames)]
            splits[split] = _flow_pairs(root, source, {path: number for number, path in enumerate(paths)}, each, pairs)
    return Data(passes[wanted[0]], variant=" and ".join(scored), extra={"passes": passes})


def _frames(root: Path, wanted: tuple[str, ...], scene: str) -> list[str]:
    """A scene's frames in order, as "alley_1/frame_0001"; UserError for a gap, or for what a frame lacks."""
    paths = [path for each in wanted for path in (root / each / scene).glob(f"frame_{'[0-9]' * 4}.png")]
    numbers = {int(path.stem[-4:]) for path in paths}
    if len(numbers) < 2:
        where = root / wanted[0] / scene
        raise UserError(f"{NAME}: {where} has {len(numbers)} frames, expected frame_0001.png and more")
    frames = [f"{scene}/frame_{number:04d}" for number in range(min(numbers), max(numbers) + 1)]
    needed = [(each, f"{frame}.png") for each in wanted for frame in frames]
    needed += [(each, f"{frame}.png") for each in ("occlusions", "invalid") for frame in frames[:-1]]
    needed += [("flow", f"{frame}.flo") for frame in frames[:-1]]
    for part, file in needed:
        if not (root / part / file).is_file():
            raise missing(root / part / file, NAME, ARCHIVES[part])
    return frames


def _flow_pairs(
    root: Path, source: PathSource, positions: Mapping[str, int], rendering: str, pairs: list[tuple[str, str]]
) -> FlowPairs:
    """Pairs of frames of one pass, by the positions of their files in the source."""

    def flow(index: int) -> np.ndarray:
        return read_flo(root / "flow" / f"{pairs[index][0]}.flo")

    def occluded(index: int) -> np.ndarray:
        return _mask(root / "occlusions" / f"{pairs[index][0]}.png")

    def valid(index: int) -> np.ndarray:
        """(H, W) bool: not marked invalid in the first frame of the pair, known, and shorter than LARGEST_FLOW."""
        path = root / "invalid" / f"{pairs[index][0]}.png"
        motion, invalid = flow(index), _mask(path)
        if motion.shape[:2] != invalid.shape:
            sizes = ["x".join(map(str, each.shape[:2])) for each in (invalid, motion)]
            raise UserError(f"{NAME}: {path} is {sizes[0]}, its flow {sizes[1]}")
        known = (np.abs(motion) <= UNKNOWN_FLOW).all(axis=-1)  # False for NaN, too
        length = np.linalg.norm(np.where(known[..., None], motion, 0), axis=-1)
        return ~invalid & known & (length < LARGEST_FLOW)

    first, second = (np.array([positions[f"{rendering}/{frame}.png"] for frame in column]) for column in zip(*pairs))
    return FlowPairs(source, first, second, [frame.split("/")[0] for frame, _ in pairs], flow, valid, occluded)


def read_flo(path: Path) -> np.ndarray:
    """Flow (H, W, 2) float32 in pixels, (u, v) = (right, down), of a .flo file.

    Little-endian: PIEH, width and height as int32, then u and v of every pixel as float32, row by row. UserError for a
    file that is missing, of another kind or cut off.
    """
    data = read_bytes(path, NAME, EXTRAS)
    if data[:4] != b"PIEH" or len(data) < HEADER:
        raise UserError(f"{NAME}: {path} is not a .flo file, expected it to begin with PIEH, a width and a height")
    width, height = np.frombuffer(data, "<i4", 2, offset=4).tolist()
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE) or len(data) != HEADER + 8 * width * height:
        raise UserError(
            f"{NAME}: {path} has {len(data)} bytes for {height}x{width} pixels, expected {HEADER} + 8 a pixel"
        )
    return np.frombuffer(data, "<f4", offset=HEADER).reshape(height, width, 2).astype(np.float32)


def _mask(path: Path) -> np.ndarray:
    """(H, W) bool of a grey PNG: where it is not 0."""
    with reworded(f"{NAME}: {path} cannot be read as a mask", *UNREADABLE):
        return read_pixels(path, "L").values != 0


DINOFLOW = "DinoFlow (paper not at hand)"
LEARNED = (
    "an upper bound and no probe: a network is trained on the frozen features to refine the flow; "
    "quoted from a secondary source, training data and scored scenes not verified"
)
# No number of DINOv2, with registers or without, was found for matching or a linear probe on Sintel.
PUBLISHED = (
    Published("trained matcher on frozen DINOv2 (upper bound)", 2.81, "arXiv 2605.08000", LEARNED, "final"),
    Published("DinoFlow, learned head on frozen DINOv3-S (upper bound)", 3.97, DINOFLOW, LEARNED, "clean"),
)

BENCHMARK = Benchmark(
    name=NAME,
    title="MPI Sintel",
    task="optical flow",
    classes=None,
    splits="943 / 98 pairs (both passes)",
    folders=("Sintel", "MPI-Sintel", "MPI-Sintel-complete", "sintel"),
    layouts=tuple(
        tuple(Need(f"training/{part}", ARCHIVES[part]) for part in (each, "flow", "occlusions", "invalid"))
        for each in PASSES
    ),
    tasks=(Task("flow", read, "EPE", {"train": 943, "test": 98}, PUBLISHED),),
    download=(
        "MPI-Sintel-complete.zip, or MPI-Sintel-training_images.zip and MPI-Sintel-training_extras.zip "
        "(flow, occlusions, invalid); the test part has no public flow and is not needed"
    ),
    licence="derived from the Blender film Sintel, CC BY as commonly stated; not verified",
    options={"pass": option("both", "which rendering is matched", choices=(*PASSES, "both"))},
    aliases=("mpi-sintel", "mpi_sintel"),
)

if __name__ == "__main__":
    BENCHMARK.script()
