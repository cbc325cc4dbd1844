"""What the flow protocol reads: unit patch tokens of every frame, kept once in a memory-mapped file, and the truth.

The tokens of a frame serve as the first of one pair, the second of another and a few times in every fit, so the
backbone sees a frame once. On disk they take frames x patches x D numbers of the type `features_dtype`: 3.7 GB in
float32 for one pass of MPI Sintel with ViT-S/14. They lie in the folder of unfinished work and go when it is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import FlowPairs
from dinoreg.evaluation.dense.flow_matching import Geometry, Truth
from dinoreg.evaluation.features.images import parallel, read_rgb
from dinoreg.runtime.errors import RunError, UserError

FLUSH_FRAMES = 32  # written between notes of how far the extraction is


def frame_tokens(encoder: Encoder, source: Source, geometry: Geometry, context: Context) -> np.ndarray:
    """Unit patch tokens (frames, N, D) of every frame of a source, memory-mapped and read only.

    An extraction that was stopped goes on where it was. UserError naming a frame of another size than the geometry's
    or that cannot be read; RunError naming one whose tokens are not finite, or for want of space.
    """
    key = {
        "weights": encoder.identity,
        "precision": str(encoder.dtype),
        "frames": source.stamp(),
        "working": geometry.working,
        "dtype": context.features.dtype.name,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path, note = context.state / f"flow_tokens_{name}.npy", context.state / f"flow_tokens_{name}.json"
    done = _frames_done(path, note)
    rows: np.ndarray | None = np.load(path, mmap_mode="r+") if done else None
    # As many pixels at once as a batch of the crops that the batch size is meant for.
    height, width = geometry.working
    at_once = max(context.batch_size * context.image_size**2 // (height * width), 1)
    batches = _batches(source, geometry, at_once, context.workers, done)
    left = -(-(len(source) - done) // at_once)
    flushed = done
    for images in context.progress(batches, left, f"tokens of frames ({encoder.name})") if left else ():
        tokens = F.normalize(encoder.tokens(images).patches.float(), dim=-1)
        bad = (~torch.isfinite(tokens).flatten(1).all(dim=1)).nonzero()
        if len(bad):
            raise RunError(f"{source.name(done + int(bad[0]))}: its tokens are not finite ({encoder.name})")
        if rows is None:
            rows = _create(path, (len(source), *tokens.shape[1:]), context.features.dtype)
        rows[done : done + len(tokens)] = tokens.cpu().numpy()
        done += len(tokens)
        if done - flushed >= FLUSH_FRAMES or done == len(source):
            rows.flush()  # type: ignore[attr-defined]
            write_atomic(note, json.dumps({"done": done}) + "\n")
            flushed = done
    return np.load(path, mmap_mode="r")


def forget_tokens(context: Context) -> None:
    """Give back the disk that the tokens of this evaluation take: those of the baselines come after it."""
    for path in context.state.glob("flow_tokens_*"):
        with suppress(OSError):  # a system that keeps mapped files; they go with the folder
            path.unlink()


def _batches(source: Source, geometry: Geometry, size: int, workers: int, start: int) -> Iterator[Tensor]:
    """Resized frames from `start` on, in order: (b, 3, h, w) uint8."""
    held: list[np.ndarray] = []
    height, width = geometry.working

    def resized(index: int) -> np.ndarray:
        image = read_rgb(source, index)
        if image.size != geometry.size[::-1]:
            raise UserError(
                f"{source.name(index)}: a frame of {image.height}x{image.width} pixels, "
                f"expected {geometry.size[0]}x{geometry.size[1]} as the first frame has"
            )
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)

    for pixels in parallel(resized, range(start, len(source)), workers):
        held.append(pixels)
        if len(held) == size:
            yield torch.from_numpy(np.stack(held)).permute(0, 3, 1, 2)
            held = []
    if held:
        yield torch.from_numpy(np.stack(held)).permute(0, 3, 1, 2)


def _frames_done(path: Path, note: Path) -> int:
    try:
        done = int(json.loads(note.read_text())["done"])
        return done if 0 <= done <= len(np.load(path, mmap_mode="r")) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    needed = int(np.prod(shape)) * dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        # A mapped file takes its space page by page, and a full disk would end the process without a word.
        if free < needed:
            raise RunError(
                f"{path.parent}: the frames' tokens need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free; "
                "features_dtype=float16 takes half, flow.upscale=1 a quarter of 2"
            )
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def truth(pairs: FlowPairs, index: int, geometry: Geometry) -> Truth:
    """The ground truth of a pair on the CPU; UserError naming the pair when it is not of the frames' size."""
    flow = np.ascontiguousarray(pairs.flow(index), dtype=np.float32)
    masks = [np.ascontiguousarray(mask(index), dtype=bool) for mask in (pairs.valid, pairs.occluded)]
    shapes = [flow.shape[:2], *(mask.shape for mask in masks)]
    if any(shape != geometry.size for shape in shapes):
        name = pairs.source.name(int(pairs.first[index]))
        given = ", ".join("x".join(map(str, shape)) for shape in shapes)
        expected = "x".join(map(str, geometry.size))
        raise UserError(f"{name}: flow, validity and occlusion are of {given} pixels, expected {expected} each")
    return Truth(torch.from_numpy(flow), torch.from_numpy(masks[0]), torch.from_numpy(masks[1]))
