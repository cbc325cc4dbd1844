"""The flow protocol's inputs: unit patch tokens of every frame, kept once in a memory-mapped file, and the truth.

The tokens of a frame serve as the first of one pair, the second of another and a few times in every fit, so the
backbone sees a frame once. On disk they take frames x patches x D numbers of the type `features_dtype`: 3.7 GB in
float32 for one pass of MPI Sintel with ViT-S/14. They lie in the folder of unfinished work and go when it is done.
"""

import hashlib
import json
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F

from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import FlowPairs
from dinoreg.evaluation.dense.flow_matching import Geometry, Truth
from dinoreg.evaluation.features.cache import extract_rows
from dinoreg.evaluation.features.images import read_picture, resized, size_of, to_array
from dinoreg.runtime.errors import UserError

FLUSH_FRAMES = 32  # written between notes of how far the extraction is


def frame_tokens(encoder: Encoder, source: Source, geometry: Geometry, context: Context) -> np.ndarray:
    """Unit patch tokens (frames, N, D) of `features_dtype` of every frame of a source, memory-mapped and read only.

    An interrupted extraction resumes. UserError naming a frame of another size than the geometry's or that cannot be
    read; RunError naming one whose tokens are not finite, or where the disk is too small.
    """
    key = {
        "weights": encoder.identity,
        "precision": str(encoder.dtype),
        "frames": source.stamp(),
        "working": geometry.working,
        "dtype": context.features_dtype,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    # As many pixels at once as in a batch of crops, for which the batch size is meant.
    height, width = geometry.working
    batch_size = max(context.batch_size * context.image_size**2 // (height * width), 1)

    def load(index: int) -> np.ndarray:
        picture = read_picture(source, index)
        found = size_of(picture)
        if found != tuple(geometry.size):
            raise UserError(
                f"{source.name(index)}: a frame of {found[0]}x{found[1]} pixels, "
                f"expected {geometry.size[0]}x{geometry.size[1]} as the first frame has"
            )
        return to_array(resized(picture, height, width))

    return extract_rows(
        context,
        context.state / f"flow_tokens_{name}.npy",
        encoder,
        source,
        load,
        lambda images: F.normalize(encoder.tokens(images).patches.float(), dim=-1),
        batch_size=batch_size,
        what="tokens of frames",
        flush_every=FLUSH_FRAMES,
        advice="features_dtype=float16 takes half, flow.upscale=1 a quarter of 2",
    )


def forget_tokens(context: Context) -> None:
    """Delete the token files of this evaluation, to make room on the disk for those of the baselines."""
    for path in context.state.glob("flow_tokens_*"):
        with suppress(OSError):  # some systems cannot delete mapped files; these go with the folder
            path.unlink()


def truth(pairs: FlowPairs, index: int, geometry: Geometry) -> Truth:
    """The ground truth of a pair on the CPU; UserError naming the pair when it is not of the frames' size.

    index  of the pair
    """
    flow = np.ascontiguousarray(pairs.flow(index), dtype=np.float32)
    masks = [np.ascontiguousarray(mask(index), dtype=bool) for mask in (pairs.valid, pairs.occluded)]
    shapes = [flow.shape[:2], *(mask.shape for mask in masks)]
    if any(shape != geometry.size for shape in shapes):
        name = pairs.source.name(int(pairs.first[index]))
        sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
        expected = "x".join(map(str, geometry.size))
        raise UserError(f"{name}: flow, validity and occlusion are of {sizes} pixels, expected {expected} each")
    return Truth(torch.from_numpy(flow), torch.from_numpy(masks[0]), torch.from_numpy(masks[1]))
