"""Linear depth: RMSE in metres of linear heads on frozen patch and class tokens, lin.1 and lin.4.
Follows DINOv2 §7.4 and its released heads: lin.1 reads the last block, lin.4 four blocks spread over the network. Both,
and all learning rates, are trained at once on one pass of the backbone (`depth_head`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import DepthMaps
from dinoreg.evaluation.dense.depth_head import (
    CLIP_GRAD,
    GRADIENT_WEIGHT,
    DepthHeads,
    Key,
    loss_warmup_steps,
    resized,
    warmup_steps,
)
from dinoreg.evaluation.dense.depth_images import CROP, as_seen, crop_size, example, read_pair
from dinoreg.evaluation.features.images import stack_images, to_array
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.depth import SCORES, Crop, depth_scores, mean_scores, valid_pixels
from dinoreg.evaluation.options import DepthOptions
from dinoreg.evaluation.protocols.measurement import Measurement, choose_best
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.parallel import parallel

MEAN_IMAGES = 1000  # training images that the mean depth is taken over, at most
MISSING = "linear depth needs a {name} split of images with depth maps"

Valid = Callable[[np.ndarray], np.ndarray]  # depth map (H, W) -> (H, W) bool: pixels that count
Scores = dict[Key, dict[str, np.ndarray]]  # {head: {score: (n,), NaN where no pixel of an image is valid}}


def evaluate(measured: Measurement) -> list[Row]:
    """One row for each variant, in the options' order: RMSE in metres, per image and then averaged, lower is better.

    Of several rates the best is quoted, chosen on an official validation split where there is one, else as published
    on the reported images; `details` then holds all.

    data.extra  "eigen_crop": where test pixels count; "train_crop": what training crops are taken from (each a Crop of
                `metrics.depth`; without it the entire image); "samples": of own data, whose limit is measured
    raises      UserError for missing splits and for depth maps that do not fit their images; RunError where no pixel is
                in the range of depths, all heads diverge or a feature is not finite
    """
    settings, context = measured.options.depth, measured.context
    train, test, val = measured.splits(DepthMaps, MISSING)
    border, window = (measured.data.extra.get(name) for name in ("train_crop", "eigen_crop"))
    valid = partial(valid_pixels, min_depth=settings.min_depth, max_depth=settings.max_depth)
    in_border, in_window = partial(valid, crop=border), partial(valid, crop=window)
    metres, baseline = _mean_depth(train, test, in_border, in_window, settings, context)
    size = crop_size(train, border, settings.max_size, settings.min_size)
    heads = DepthHeads(measured.encoder, settings, context.seed)
    ended = heads.fit(train, size, border, context)
    scores = _score(heads, test, in_window, context, "depth: test")
    several = len(settings.lrs) > 1
    tried = _score(heads, val, in_window, context, "depth: val") if several and val is not None else None
    rows: list[Row] = []
    for variant in settings.variants:
        rmse_by_lr = _rmse_by_lr(scores, variant)
        validation = None if tried is None else _rmse_by_lr(tried, variant)
        lr, chosen_on = choose_best(rmse_by_lr, validation, higher_is_better=False)
        if not rows:
            _draw(heads, (variant, lr), test, in_window, context)
        means, rmse = mean_scores(scores[variant, lr]), scores[variant, lr]["rmse"]
        rmse = rmse[np.isfinite(rmse)]
        details: dict[str, Any] = {
            **{key: value for key, value in means.items() if key != "rmse"},
            "baselines": {"mean training depth": baseline},
            "mean_training_depth": metres,
            "images_without_depth": len(test) - len(rmse),
            "final_loss": ended[variant, lr],
        }
        if several:
            details["rmse_by_lr"] = {f"{each:g}": value for each, value in rmse_by_lr.items()}
        row = measured.row(
            float(rmse.mean()),
            bootstrap_interval(rmse, seed=context.seed),
            variant=f"lin.{variant}",
            unit="m",
            higher_is_better=False,
            chosen_on=chosen_on,
            n_train=len(train),
            n_test=len(rmse),
            settings={
                **_described(settings, size, border, window),
                "lr": lr,
                "blocks": [block + 1 for block in heads.blocks[variant]],
            },
            details=details,
            note=f"depths up to {settings.max_depth:g} m" if "samples" in measured.data.extra else "",
        )
        rows.append(row)
    return rows


def _described(
    settings: DepthOptions, size: tuple[int, int], border: Crop | None, window: Crop | None
) -> dict[str, Any]:
    warmup = f"SigLoss ({loss_warmup_steps(settings)} warm-up steps)"
    return {
        **asdict(settings),
        "warmup_steps": warmup_steps(settings),
        "crop": size,
        "crop_reason": "as published" if size == CROP else f"{CROP[0]}x{CROP[1]} in proportion to smaller images",
        "train_border": border[0] if border else "none",
        "eval_crop": window[0] if window else "the whole image",
        "loss": f"{warmup} + {GRADIENT_WEIGHT} x multi-scale gradient loss",
        "schedule": "cosine to 0 from the first step, times a linear warm-up",
        "clip_grad": CLIP_GRAD,
        "final_norm": False,
        "test": "mean with the mirrored image, centre padding to whole patches, clamped",
    }


def _score(heads: DepthHeads, split: DepthMaps, valid: Valid, context: Context, what: str) -> Scores:
    scores: Scores = {key: {score: np.full(len(split), np.nan) for score in SCORES} for key in heads.heads}
    for index, true, predicted in context.progress(heads.predictions(split, context), len(split), what):
        for key, depth in predicted.items():
            for score, value in depth_scores(depth, true, valid(true)).items():
                scores[key][score][index] = value
    return scores


def _rmse_by_lr(scores: Scores, variant: int) -> dict[float, float]:
    return {lr: mean_scores(each)["rmse"] for (of, lr), each in scores.items() if of == variant}


def _mean_depth(
    train: DepthMaps, test: DepthMaps, in_border: Valid, in_window: Valid, settings: DepthOptions, context: Context
) -> tuple[float, dict[str, float]]:
    """The mean depth of training pixels, and the scores of predicting it everywhere."""

    def over(indices: Sequence[int], function: Callable[[int], Any]) -> list[Any]:
        return list(context.progress(parallel(function, indices, context.workers), len(indices), "depth: baseline"))

    def summed(index: int) -> tuple[float, int]:
        depth = read_pair(train, index)[1]
        valid = in_border(depth)
        return float(depth[valid].sum(dtype=np.float64)), int(valid.sum())

    def scored(index: int) -> dict[str, float]:
        depth = read_pair(test, index)[1]
        return depth_scores(np.full_like(depth, metres), depth, in_window(depth))

    sums, counts = zip(
        *over(np.random.default_rng(context.seed).permutation(len(train))[:MEAN_IMAGES].tolist(), summed)
    )
    where = f"between {settings.min_depth:g} and {settings.max_depth:g} m"
    if not sum(counts):
        raise RunError(f"linear depth: no training image has a pixel {where}")
    metres = sum(sums) / sum(counts)
    scores = over(range(len(test)), scored)
    if not any(math.isfinite(each["rmse"]) for each in scores):
        raise RunError(f"linear depth: no test image has a pixel {where} that counts")
    return metres, mean_scores({key: np.array([each[key] for each in scores]) for key in SCORES})


def _draw(heads: DepthHeads, key: Key, test: DepthMaps, valid: Valid, context: Context) -> None:
    """Image | prediction | truth of evenly spaced test images, by one head."""
    for number, index in enumerate(context.example_indices(len(test))):
        image, true = read_pair(test, index)
        pixels = stack_images([to_array(as_seen(image, heads.options.max_size, heads.options.min_size))])
        predicted = resized(heads.predict(pixels, [key], [test.source.name(index)])[key][0], true.shape)
        error = depth_scores(predicted, true, valid(true))["rmse"]
        picture = example(image, predicted, true, valid(true), f"lin.{key[0]}, RMSE {error:.2f} m")
        context.save_example(picture, "depth", number)
