"""MPI Sintel (Butler et al. 2012): optical flow of a rendered film, in a clean and a final pass.

Pairs are consecutive frames of a scene; the flow file of frame k leads from k to k + 1, and the last frame has none.
Occlusion masks come one for each pair, masks of invalid pixels one for each frame.
"""

import io
import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from dinoreg.commands.main import script
from dinoreg.config.option import option
from dinoreg.data.source import PathSource
from dinoreg.evaluation.benchmark import Benchmark, Need, Options, Published, Task
from dinoreg.evaluation.data import Data, FlowPairs
from dinoreg.evaluation.readers.files import missing, paths_source, read_bytes
from dinoreg.runtime.errors import UserError

NAME = "sintel"
PASSES = ("clean", "final")
TEST_SCENES = ("temple_2", "temple_3")  # CroCo's validation scenes; the official test set's flow is not public
IMAGES = "MPI-Sintel-complete.zip or MPI-Sintel-training_images.zip"
EXTRAS = "MPI-Sintel-complete.zip or MPI-Sintel-training_extras.zip"
ARCHIVES = {"clean": IMAGES, "final": IMAGES, "flow": EXTRAS, "occlusions": EXTRAS, "invalid": EXTRAS}
UNKNOWN_FLOW = 1e9  # components beyond it are unknown, by the convention of .flo files
LARGEST_FLOW = 1000.0  # pixels; flow as long or longer is not believed, as RAFT has it
LARGEST_SIDE = 100_000  # pixels; beyond it a .flo header is damaged
HEADER = 12  # bytes of a .flo file before its data
FRAME = re.compile(r"frame_(\d{4})\.png")


def read(folder: Path, options: Options) -> Data:
    """Pairs of temple_2 and temple_3 as "test", those of the other scenes as "train"; by default of both passes.

    The splits are those of the first pass; all passes are extra["passes"] = {pass: splits}, with one source of frames.
    """
    wanted = PASSES if options["pass"] == "both" else (options["pass"],)
    root = folder / "training"
    for part in (*wanted, "flow", "occlusions", "invalid"):
        if not (root / part).is_dir():
            raise missing(root / part, NAME, ARCHIVES[part])
    scenes = {name: _frames(root, wanted, name) for name in _scenes(root / wanted[0])}
    if not set(scenes) - set(TEST_SCENES) or not set(scenes) & set(TEST_SCENES):
        raise UserError(
            f"{NAME}: {root / wanted[0]} has the scenes {', '.join(scenes) or '(none)'}, expected one of "
            f"{' and '.join(TEST_SCENES)} to score on and others to fit on; they come from {IMAGES}"
        )
    paths = [f"{each}/{name}/{frame}" for each in wanted for name, frames in scenes.items() for frame in frames]
    source = paths_source(root, paths, NAME)
    place = {path: number for number, path in enumerate(paths)}
    passes = {each: _splits(root, each, scenes, source, place) for each in wanted}
    scored = [name for name in TEST_SCENES if name in scenes]
    return Data(passes[wanted[0]], variant=" and ".join(scored), extra={"passes": passes})


def _scenes(folder: Path) -> list[str]:
    """In alphabetical order: that of a folder's entries is the file system's."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _frames(root: Path, wanted: tuple[str, ...], scene: str) -> list[str]:
    """The file names of a scene's frames in order; UserError for a gap, or for what a frame lacks."""
    names = sorted({path.name for each in wanted for path in (root / each / scene).glob("frame_*.png")})
    names = [name for name in names if FRAME.fullmatch(name)]
    numbers = [int(FRAME.fullmatch(name)[1]) for name in names]  # type: ignore[index]
    if len(names) < 2:
        raise UserError(f"{NAME}: {root / wanted[0] / scene} has {len(names)} frames, expected frame_0001.png and more")
    for before, after in pairwise(numbers):
        if after != before + 1:
            raise missing(root / wanted[0] / scene / f"frame_{before + 1:04d}.png", NAME, IMAGES)
    needed = [(each, name) for each in wanted for name in names]
    needed += [(each, name) for each in ("occlusions", "invalid") for name in names[:-1]]
    needed += [("flow", _flow_name(name)) for name in names[:-1]]
    for part, name in needed:
        if not (root / part / scene / name).is_file():
            raise missing(root / part / scene / name, NAME, ARCHIVES[part])
    return names


def _flow_name(frame: str) -> str:
    return f"{Path(frame).stem}.flo"


def _splits(
    root: Path, rendering: str, scenes: Mapping[str, list[str]], source: PathSource, place: Mapping[str, int]
) -> dict[str, FlowPairs]:
    splits = {}
    for split in ("train", "test"):
        names = [name for name in scenes if (name in TEST_SCENES) == (split == "test")]
        pairs = [(name, before, after) for name in names for before, after in pairwise(scenes[name])]
        splits[split] = FlowPairs(
            source,
            np.array([place[f"{rendering}/{name}/{before}"] for name, before, _ in pairs]),
            np.array([place[f"{rendering}/{name}/{after}"] for name, _, after in pairs]),
            [name for name, _, _ in pairs],
            flow=partial(_flow, root, pairs),
            valid=partial(_valid, root, pairs),
            occluded=partial(_occluded, root, pairs),
        )
    return splits


Pairs = list[tuple[str, str, str]]  # scene, first frame, second frame


def _flow(root: Path, pairs: Pairs, index: int) -> np.ndarray:
    scene, frame, _ = pairs[index]
    return read_flo(root / "flow" / scene / _flow_name(frame))


def _occluded(root: Path, pairs: Pairs, index: int) -> np.ndarray:
    scene, frame, _ = pairs[index]
    return _mask(root / "occlusions" / scene / frame)


def _valid(root: Path, pairs: Pairs, index: int) -> np.ndarray:
    """(H, W) bool: not marked invalid in the first frame of the pair, known, and of a length that can be."""
    scene, frame, _ = pairs[index]
    flow, invalid = _flow(root, pairs, index), _mask(root / "invalid" / scene / frame)
    if flow.shape[:2] != invalid.shape:
        sizes = ["x".join(map(str, each.shape[:2])) for each in (invalid, flow)]
        raise UserError(f"{NAME}: {root / 'invalid' / scene / frame} is {sizes[0]}, its flow {sizes[1]}")
    known = (np.abs(flow) <= UNKNOWN_FLOW).all(axis=-1)  # False for NaN, too
    length = np.linalg.norm(np.where(known[..., None], flow, 0), axis=-1)
    return ~invalid & known & (length < LARGEST_FLOW)


def read_flo(path: Path) -> np.ndarray:
    """(H, W, 2) float32 of a .flo file: PIEH, width and height as int32, then u and v of every pixel as float32.

    Little-endian throughout, row by row. UserError for a file that is missing, of another kind or cut off.
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
    data = read_bytes(path, NAME, EXTRAS)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("L")) != 0
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{NAME}: {path} cannot be read as a mask ({' '.join(str(error).split())[:200]})") from None


DINOFLOW = "DinoFlow (paper not at hand)"
LEARNED = (
    "an upper bound and no probe: a network is trained on the frozen features to refine the flow; "
    "quoted from a secondary source, training data and scored scenes not verified"
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
    tasks=(
        Task(
            protocol="flow",
            read=read,
            metric="EPE",
            counts={"train": 943, "test": 98},
            # No number of DINOv2, with registers or without, was found for matching or a linear probe on Sintel.
            published=(
                Published("trained matcher on frozen DINOv2 (upper bound)", 2.81, "arXiv 2605.08000", LEARNED, "final"),
                Published("DinoFlow, learned head on frozen DINOv3-S (upper bound)", 3.97, DINOFLOW, LEARNED, "clean"),
            ),
        ),
    ),
    download=(
        "MPI-Sintel-complete.zip, or MPI-Sintel-training_images.zip and MPI-Sintel-training_extras.zip "
        "(flow, occlusions, invalid); the test part has no public flow and is not needed"
    ),
    licence="derived from the Blender film Sintel, CC BY as commonly stated; not verified",
    options={"pass": option("both", "which rendering is matched", choices=(*PASSES, "both"))},
    aliases=("mpi-sintel", "mpi_sintel"),
)

if __name__ == "__main__":
    script(BENCHMARK)
