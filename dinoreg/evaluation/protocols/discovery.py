"""P7, object discovery: LOST on every image of a split, scored by CorLoc (LOST §4; registers' paper §3.3).

One image at a time at its own size, padded at the bottom and right to whole patches with what normalisation turns into
zeros, as LOST does; the padded patches take part. Blocks and biases are swept in one pass, so that what the papers
chose by hand can be repeated; then the best is quoted, says so, and the whole sweep stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.evaluation.data import Boxed, Data
from dinoreg.evaluation.dense.lost import Found, gram, lost
from dinoreg.evaluation.features.images import parallel, read_rgb
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.boxes import PREDICTION, TRUTH, areas, boxed, draw_boxes, overlaps, padded, side_by_side
from dinoreg.evaluation.options import DiscoveryOptions, EvalOptions
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import RunError, UserError

PROTOCOL = "object discovery (LOST)"
MIN_OVERLAP = 0.5  # of the box with a true one
MAX_PATCHES = 20_000  # of one image: their similarities take 1.6 GB


@dataclass
class Boxes:
    """What was found so far, for every setting of the sweep (S) and every image (n).

    boxes  (S, n, 4) float32 in pixels, clipped to the image
    alone  (S, n) bool: the seed was left alone
    sizes  (n, 2) int64 height and width
    done   images that are finished
    """

    boxes: Tensor
    alone: Tensor
    sizes: Tensor
    done: int = 0


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """CorLoc of the best block and bias, then of the box that is the whole image, which needs no model at all."""
    if task.metric != "CorLoc":
        raise UserError(f"metric {task.metric!r}: object discovery has CorLoc")
    chosen, started = options.discovery, time.monotonic()
    test = boxed(data, "test")
    blocks = _blocks(encoder, chosen.blocks)
    sweep = [(block, bias) for block in blocks for bias in dict.fromkeys(chosen.biases)]
    found = _find(encoder, test, blocks, chosen, context)

    count = len(test)
    truth = [np.asarray(boxes)[~np.asarray(crowd, dtype=bool)] for boxes, crowd in zip(test.boxes, test.crowd)]
    hits = np.array([correct(boxes, truth) for boxes in found.boxes.numpy()])  # (S, n)
    whole = np.zeros((count, 4), dtype=np.float32)
    whole[:, 2:] = found.sizes.flip(1).numpy()
    whole_hits = correct(whole, truth)
    shares = hits.mean(axis=1)
    best = int(shares.argmax())
    covers = (found.boxes.numpy() == whole).all(axis=2)
    figures = [
        {
            "block": block,
            "bias": bias,
            "CorLoc": float(shares[place]),
            "box is the whole image": float(covers[place].mean()),
            "box is the seed alone": float(found.alone[place].float().mean()),
        }
        for place, (block, bias) in enumerate(sweep)
    ]
    details: dict[str, Any] = {
        "whole-image box": float(whole_hits.mean()),
        "box is the whole image": figures[best]["box is the whole image"],
        "box is the seed alone": figures[best]["box is the seed alone"],
        "images without boxes": sum(not len(boxes) for boxes in truth),
        "sweep": figures,
    }
    if len(sweep) > 1 and count > 1:
        details["chosen on one half of the images, scored on the other"] = crosswise(hits)
    if context.examples is not None:
        _draw(encoder, test, sweep[best], found.boxes[best].numpy(), truth, chosen, context)
    block, bias = sweep[best]
    common: dict[str, Any] = {
        "seeds": (context.seed,),
        "n_test": count,
        "hours": (time.monotonic() - started) / 3600,
    }
    kind = f"{chosen.feature}s{', normalised' if chosen.normalise else ''}"
    kind += f", best of {len(chosen.blocks)} x {len(chosen.biases)} blocks x biases" if _swept(chosen) else ""
    return [
        Row(
            PROTOCOL,
            "CorLoc",
            float(shares[best]),
            *bootstrap_interval(hits[best], seed=context.seed),
            variant=", ".join(filter(None, (kind, data.variant))),
            chosen_on="the reported split itself" if len(sweep) > 1 else "",
            settings={**asdict(chosen), "block": block, "bias": bias, "image_size": "the image's own"},
            details=details,
            **common,
        ),
        Row(
            PROTOCOL,
            "CorLoc",
            float(whole_hits.mean()),
            *bootstrap_interval(whole_hits, seed=context.seed),
            variant=", ".join(filter(None, ("whole-image box", data.variant))),
            note="no model: one box around the whole image",
            **common,
        ),
    ]


def correct(boxes: np.ndarray, truth: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) bool: whether each image's box (n, 4) overlaps a true one of it by half or more; without any it does not."""
    return np.array(
        [bool((overlaps(box, true) >= MIN_OVERLAP).any()) for box, true in zip(boxes, truth, strict=True)], dtype=bool
    )


def crosswise(hits: np.ndarray) -> float:
    """CorLoc without having chosen on what is scored: each half of the images by the other half's best setting.

    hits  (S, n) bool; the halves are the images of even and of odd number
    """
    even = np.arange(hits.shape[1]) % 2 == 0
    right = sum(int(hits[hits[:, ~half].mean(axis=1).argmax(), half].sum()) for half in (even, ~even))
    return right / hits.shape[1]


def features_of(encoder: Encoder, image: Tensor, blocks: Sequence[int], feature: str) -> list[Tensor]:
    """Patch features (N, D) of one image (3, H, W) after (token) or inside (query, key, value) each block."""
    if feature == "token":
        return [tokens.patches[0] for tokens in encoder.layers(image[None], blocks)]
    return [encoder.qkv(image[None], block)[feature][0] for block in blocks]


def _swept(chosen: DiscoveryOptions) -> bool:
    return len(chosen.blocks) * len(chosen.biases) > 1


def _blocks(encoder: Encoder, blocks: Sequence[int]) -> list[int]:
    """Distinct block numbers from 0; an encoder of one block (raw pixels) has only that to offer."""
    if encoder.depth == 1:
        return [0]
    return list(dict.fromkeys(encoder.block(each) for each in blocks))


def _find(encoder: Encoder, test: Boxed, blocks: Sequence[int], chosen: DiscoveryOptions, context: Context) -> Boxes:
    """Every image's box under every setting, blocks first; goes on where an earlier call was stopped."""
    count, settings = len(test), len(blocks) * len(dict.fromkeys(chosen.biases))
    key = repr((encoder.identity, test.source.stamp(), list(blocks), chosen))
    found = Boxes(
        torch.zeros(settings, count, 4), torch.zeros(settings, count, dtype=torch.bool), torch.zeros(count, 2).long()
    )
    saved = context.load_state("discovery")
    if saved is not None and saved.get("key") == key:
        found = Boxes(saved["boxes"], saved["alone"], saved["sizes"], int(saved["done"]))

    def pixels(index: int) -> np.ndarray:
        return np.asarray(read_rgb(test.source, index))

    first, last_saved = found.done, time.monotonic()
    images = parallel(pixels, range(first, count), context.workers)
    for index, image in enumerate(context.progress(images, count - first, f"{PROTOCOL} ({encoder.name})"), first):
        height, width = image.shape[:2]
        found.sizes[index] = torch.tensor((height, width))
        for place, each in enumerate(_objects(encoder, image, blocks, chosen, test.source.name(index))):
            found.boxes[place, index] = torch.tensor(_pixels(each, encoder.patch_size, height, width))
            found.alone[place, index] = each.alone
        found.done = index + 1
        if time.monotonic() - last_saved > SAVE_SECONDS:
            last_saved = time.monotonic()
            context.save_state("discovery", {"key": key, **vars(found)})
    return found


def _objects(
    encoder: Encoder, image: np.ndarray, blocks: Sequence[int], chosen: DiscoveryOptions, name: str
) -> list[Found]:
    """The object of one image (h, w, 3) uint8 under every setting, blocks first."""
    batch = padded(image, encoder.patch_size, encoder.mean)
    grid = encoder.grid(batch.shape[1], batch.shape[2])
    if grid[0] * grid[1] > MAX_PATCHES:
        raise UserError(
            f"{name}: {image.shape[1]}x{image.shape[0]} pixels are {grid[0] * grid[1]:,} patches, all of which are "
            f"compared with one another; expected at most {MAX_PATCHES:,}"
        )
    found = []
    for features in features_of(encoder, batch, blocks, chosen.feature):
        if not torch.isfinite(features).all():
            raise RunError(f"{name}: its feature is not finite ({encoder.name})")
        similarity = gram(features, chosen.normalise)
        for bias in dict.fromkeys(chosen.biases):
            found.append(lost(similarity + bias if bias else similarity, grid, chosen.k_patches))
    return found


def _pixels(found: Found, patch_size: int, height: int, width: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(side * patch_size) for side in found.box)
    return x0, y0, min(x1, float(width)), min(y1, float(height))


def _draw(
    encoder: Encoder,
    test: Boxed,
    setting: tuple[int, float],
    boxes: np.ndarray,
    truth: Sequence[np.ndarray],
    chosen: DiscoveryOptions,
    context: Context,
) -> None:
    """Pictures of a few images: the patches that were found, the box around them, and the true boxes."""
    assert context.examples is not None
    context.examples.mkdir(parents=True, exist_ok=True)
    picked = np.unique(np.linspace(0, len(test) - 1, min(context.num_examples, len(test))).astype(np.int64))
    one = DiscoveryOptions(
        feature=chosen.feature, biases=(setting[1],), normalise=chosen.normalise, k_patches=chosen.k_patches
    )
    for number, index in enumerate(picked.tolist()):
        image = read_rgb(test.source, index)
        (each,) = _objects(encoder, np.asarray(image), (setting[0],), one, test.source.name(index))
        true = truth[index][np.argsort(-areas(truth[index]), kind="stable")]
        panels = (
            draw_boxes(_lit(image, each, encoder.patch_size), np.zeros((0, 4)), PREDICTION),
            draw_boxes(image, boxes[index], PREDICTION),
            draw_boxes(image, true, TRUTH),
        )
        good = bool(correct(boxes[index][None], [truth[index]])[0])
        titles = ("patches of the object", f"found ({'hit' if good else 'miss'})", "truth")
        side_by_side(panels, titles).save(context.examples / f"discovery_{number:02d}.png")


def _lit(image: Image.Image, found: Found, patch_size: int) -> Image.Image:
    """The picture, dark except for the found patches; the seed has its own colour."""
    light = np.where(found.mask, 1.0, 0.35).repeat(patch_size, 0).repeat(patch_size, 1)[: image.height, : image.width]
    pixels = np.asarray(image) * light[..., None]
    row, column = divmod(found.seed, found.mask.shape[1])
    place = np.s_[row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
    pixels[place] = 0.4 * pixels[place] + 0.6 * np.array(PREDICTION)
    return Image.fromarray(np.uint8(pixels))
