"""Object discovery: LOST on every image of a split, scored by CorLoc (LOST, arXiv 2109.14279; Registers §3.3).

One image at a time at its own size, padded at the bottom and right to whole patches with what normalisation turns into
zeros, as LOST does; the padded patches take part. Blocks and biases are swept in one pass, so that what the papers
chose by hand can be repeated; then the best is quoted, with a note that it is, and all of the sweep in the details.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.data import Boxed
from dinoreg.evaluation.dense.lost import Found, gram, lost
from dinoreg.evaluation.dense.pictures import PREDICTION, TRUTH, draw_boxes, strip
from dinoreg.evaluation.dense.windows import pad_to_patches
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.features.images import read_picture, shown, to_array
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.box_ap import MISSING, areas, overlaps
from dinoreg.evaluation.options import DiscoveryOptions
from dinoreg.evaluation.protocols.measurement import Measurement, choose_best, resumable_map
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import UserError

MIN_OVERLAP = 0.5  # of the box with a true one
MAX_PATCHES = 20_000  # of one image: their similarities take 1.6 GB


def evaluate(measured: Measurement) -> list[Row]:
    """CorLoc, in [0, 1], of the best block and bias, then of the box around the whole image, which needs no model.

    raises  UserError for another metric, a missing split, a block that does not exist and an image of too many
            patches; RunError where a feature is not finite
    """
    measured.check_metric("object discovery", ("CorLoc",))
    settings, encoder, context = measured.options.discovery, measured.encoder, measured.context
    test = measured.split("test", Boxed, MISSING)
    # An encoder of one block (raw pixels) has no others to sweep.
    numbers = [0] if encoder.depth == 1 else [encoder.block(each) for each in settings.blocks]
    distinct = replace(settings, blocks=tuple(dict.fromkeys(numbers)), biases=tuple(dict.fromkeys(settings.biases)))
    sweep = list(product(distinct.blocks, distinct.biases))
    *boxes, image_box = _find(measured, test, distinct)
    truth = [np.asarray(each)[~np.asarray(crowd, dtype=bool)] for each, crowd in zip(test.boxes, test.crowd)]
    hits = np.array([correct(each, truth) for each in boxes])  # (S, n)
    figures = [
        {
            "block": block,
            "bias": bias,
            "CorLoc": float(hit.mean()),
            "box is the whole image": float((each == image_box).all(axis=1).mean()),
        }
        for (block, bias), each, hit in zip(sweep, boxes, hits, strict=True)
    ]
    best, chosen_on = choose_best({place: each["CorLoc"] for place, each in enumerate(figures)})
    block, bias = sweep[best]
    _draw(measured, test, replace(settings, blocks=(block,), biases=(bias,)), boxes[best], truth)
    baseline_hits = correct(image_box, truth)
    details: dict[str, Any] = {
        "whole-image box": float(baseline_hits.mean()),
        "box is the whole image": figures[best]["box is the whole image"],
        "images without boxes": sum(not len(each) for each in truth),
        "sweep": figures,
    }
    if len(sweep) > 1 and len(test) > 1:
        details["chosen on one half of the images, scored on the other"] = crosswise(hits)
    kind = f"{settings.feature}s{', normalised' if settings.normalise else ''}"
    blocks, biases = len(settings.blocks), len(settings.biases)
    variant = kind if blocks * biases == 1 else f"{kind}, best of {blocks} x {biases} blocks x biases"
    settled = {**asdict(settings), "block": block, "bias": bias, "image_size": "the image's own"}

    def row(right: np.ndarray, **fields: Any) -> Row:
        interval = bootstrap_interval(right, seed=context.seed)
        return measured.row(float(right.mean()), interval, n_test=len(test), **fields)

    model = row(hits[best], variant=variant, chosen_on=chosen_on, settings=settled, details=details)
    return [model, row(baseline_hits, variant="whole-image box", note="no model: one box around the whole image")]


def correct(boxes: np.ndarray, truth: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) bool: whether each image's box has an IoU of at least 0.5 with any true one; without true boxes it does not.

    boxes  (n, 4) x0, y0, x1, y1 in pixels
    truth  (k, 4) of each image
    """
    return np.array(
        [bool((overlaps(box, true) >= MIN_OVERLAP).any()) for box, true in zip(boxes, truth, strict=True)], dtype=bool
    )


def crosswise(hits: np.ndarray) -> float:
    """CorLoc in [0, 1] without choosing on what is scored: each half of the images by the other half's best setting.

    hits  (S, n) bool under S settings; the halves are the images of even and of odd number
    """
    even = np.arange(hits.shape[1]) % 2 == 0
    right = sum(int(hits[hits[:, ~half].mean(axis=1).argmax(), half].sum()) for half in (even, ~even))
    return right / hits.shape[1]


def features_of(encoder: Encoder, image: Tensor, blocks: Sequence[int], feature: str) -> list[Tensor]:
    """Patch features (N, D) float32 of one image, for each block: tokens after it, or parts of its attention.

    image    (C, H, W) as for `Encoder.prepare`
    feature  "token", "query", "key" or "value"
    """
    if feature == "token":
        return [tokens.patches[0] for tokens in encoder.layers(image[None], blocks)]
    return [encoder.qkv(image[None], block)[feature][0] for block in blocks]


def _find(measured: Measurement, test: Boxed, sweep: DiscoveryOptions) -> np.ndarray:
    """Every image's box under the S settings, blocks first, and last the box that is the whole image.

    sweep    all blocks, from 0, and biases, each once
    returns  (S + 1, n, 4) float64: x0, y0, x1, y1 in pixels, clipped to the image
    """
    encoder = measured.encoder

    def boxes_of(index: int, image: np.ndarray) -> list[list[int]]:
        height, width = image.shape[:2]
        found = _objects(encoder, image, sweep, test.source.name(index))
        boxes = np.array([each.box for each in found]) * encoder.patch_size
        return [*np.minimum(boxes, [width, height, width, height]).tolist(), [0, 0, width, height]]

    def load(index: int) -> np.ndarray:
        return to_array(read_picture(test.source, index))

    key = (encoder.identity, test.source.stamp(), sweep)
    what = f"object discovery (LOST) ({encoder.name})"
    boxes = resumable_map(measured.context, "discovery", key, len(test), boxes_of, what, load)
    return np.array(boxes, dtype=np.float64).transpose(1, 0, 2)


def _objects(encoder: Encoder, image: np.ndarray, sweep: DiscoveryOptions, name: str) -> list[Found]:
    """The object of one image (h, w, C) under every setting, blocks first."""
    batch = pad_to_patches(image, encoder.patch_size, encoder.preprocessing.mean)
    grid = encoder.grid(batch.shape[1], batch.shape[2])
    if grid[0] * grid[1] > MAX_PATCHES:
        raise UserError(
            f"{name}: {image.shape[1]}x{image.shape[0]} pixels are {grid[0] * grid[1]:,} patches, all of which are "
            f"compared with one another; expected at most {MAX_PATCHES:,}"
        )
    found = []
    for features in features_of(encoder, batch, sweep.blocks, sweep.feature):
        require_finite(features[None], [name], encoder)
        similarity = gram(features, sweep.normalise)
        for bias in sweep.biases:
            found.append(lost(similarity + bias if bias else similarity, grid, sweep.k_patches))
    return found


def _draw(
    measured: Measurement, test: Boxed, setting: DiscoveryOptions, boxes: np.ndarray, truth: Sequence[np.ndarray]
) -> None:
    """Pictures of a few images: the patches found under one setting, the box around them, and the true boxes."""
    encoder, context = measured.encoder, measured.context
    for number, index in enumerate(context.example_indices(len(test))):
        picture = read_picture(test.source, index)
        image = shown(picture)
        (found,) = _objects(encoder, to_array(picture), setting, test.source.name(index))
        true = truth[index][np.argsort(-areas(truth[index]), kind="stable")]
        panels = (
            draw_boxes(_highlighted(image, found, encoder.patch_size), np.zeros((0, 4)), PREDICTION),
            draw_boxes(image, boxes[index], PREDICTION),
            draw_boxes(image, true, TRUTH),
        )
        hit = bool(correct(boxes[index][None], [truth[index]])[0])
        captions = ("patches of the object", f"found ({'hit' if hit else 'miss'})", "truth")
        context.save_example(strip(panels, captions), "discovery", number)


def _highlighted(image: Image.Image, found: Found, patch_size: int) -> Image.Image:
    """The picture, dark except for the found patches."""
    light = np.where(found.mask, 1.0, 0.35).repeat(patch_size, 0).repeat(patch_size, 1)[: image.height, : image.width]
    return Image.fromarray(np.uint8(np.asarray(image) * light[..., None]))
