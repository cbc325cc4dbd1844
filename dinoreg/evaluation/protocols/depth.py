"""P6, linear depth: RMSE in metres of linear heads on frozen patch and class tokens, lin.1 and lin.4.

Follows DINOv2 §7.4 and its released heads: lin.1 reads the last block, lin.4 four blocks
spread over the depth. Both, and all learning rates, are trained at once on one pass of the backbone (`depth_heads`).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, DepthMaps
from dinoreg.evaluation.dense.depth_head import (
    CLIP_GRAD,
    GRADIENT_WEIGHT,
    DepthHeads,
    Key,
    loss_warmup_steps,
    resized,
    warmup_steps,
)
from dinoreg.evaluation.dense.depth_images import CROP, crop_size, example, read_pair, shrink
from dinoreg.evaluation.features.images import parallel
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.depth import SCORES, Crop, depth_scores, mean_scores, valid_pixels
from dinoreg.evaluation.options import DepthOptions, EvalOptions
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import RunError, UserError

MEAN_IMAGES = 1000  # training images that the mean depth is taken over, at most
_CHOSEN_ON = {"val": "the official validation split", "test": "the reported split itself"}

Scores = dict[Key, dict[str, np.ndarray]]  # {head: {score: (n,), NaN where no pixel of an image is valid}}


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """One row for each variant, in the options' order: RMSE in metres, per image and then averaged, lower is better.

    Of several rates the best is quoted, chosen on an official validation split where there is one, else as published
    on the reported images; `details` then holds all.

    data.extra  "eigen_crop": where test pixels count; "train_crop": what training crops are taken from (each a Crop of
                `depth_metrics`; the whole image where absent)

    Raises UserError for data without depth maps, RunError when none is known or a feature is not finite.
    """
    started = time.monotonic()
    chosen = options.depth
    train, test = _split(data, "train"), _split(data, "test")
    border, window = data.extra.get("train_crop"), data.extra.get("eigen_crop")
    size = crop_size(train, border, chosen.max_size)
    metres, baseline = _mean_depth(train, test, border, window, chosen, context)
    heads = DepthHeads(encoder, chosen, context.seed)
    ended = heads.fit(train, size, border, context)
    scores = {"test": _score(heads, test, window, context, "depth: test")}
    several = len(chosen.lrs) > 1
    if several and "val" in data.splits:
        scores["val"] = _score(heads, _split(data, "val"), window, context, "depth: val")
    choosing = "val" if "val" in scores else "test"
    best = {variant: _best(scores[choosing], variant, chosen.lrs) for variant in chosen.variants}
    hours = (time.monotonic() - started) / 3600
    _examples(heads, best[chosen.variants[0]], test, window, context)
    settings = {
        **asdict(chosen),
        "warmup_steps": warmup_steps(chosen),
        "crop": size,
        "crop_reason": "as published" if size == CROP else f"{CROP[0]}x{CROP[1]} in proportion to smaller images",
        "train_border": border[0] if border else "none",
        "eval_crop": window[0] if window else "the whole image",
        "loss": f"SigLoss ({loss_warmup_steps(chosen)} warm-up steps) + {GRADIENT_WEIGHT} x multi-scale gradient loss",
        "clip_grad": CLIP_GRAD,
        "final_norm": False,
        "test": "mean with the mirrored image, centre padding to whole patches, clamped",
    }
    rows = []
    for variant in chosen.variants:
        lr = best[variant]
        found = scores["test"][variant, lr]
        rmse = found["rmse"][np.isfinite(found["rmse"])]
        low, high = bootstrap_interval(rmse, seed=context.seed)
        details: dict[str, Any] = {
            **{key: value for key, value in mean_scores(found).items() if key != "rmse"},
            "baselines": {"mean training depth": baseline},
            "mean_training_depth": metres,
            "images_without_depth": len(test) - len(rmse),
            "final_loss": ended[variant, lr],
        }
        if several:
            details["rmse_by_lr"] = {f"{each:g}": _rmse(scores["test"][variant, each]) for each in chosen.lrs}
        rows.append(
            Row(
                protocol="linear depth",
                metric=task.metric,
                value=float(rmse.mean()),
                low=low,
                high=high,
                unit="m",
                higher_is_better=False,
                variant=", ".join(filter(None, (f"lin.{variant}", data.variant))),
                chosen_on=_CHOSEN_ON[choosing] if several else "",
                seeds=(context.seed,),
                n_train=len(train),
                n_test=len(rmse),
                hours=hours,
                settings={**settings, "lr": lr, "blocks": [block + 1 for block in heads.blocks[variant]]},
                details=details,
            )
        )
    return rows


def _split(data: Data, name: str) -> DepthMaps:
    split = data.splits.get(name)
    if not isinstance(split, DepthMaps) or not len(split):
        raise UserError(f"linear depth needs a {name} split of images with depth maps")
    return split


def _score(heads: DepthHeads, split: DepthMaps, window: Crop | None, context: Context, what: str) -> Scores:
    options = heads.options
    found: Scores = {key: {score: np.full(len(split), np.nan) for score in SCORES} for key in heads.heads}
    for index, true, predicted in context.progress(heads.predictions(split, context), len(split), what):
        valid = valid_pixels(true, options.min_depth, options.max_depth, window)
        for key, depth in predicted.items():
            for score, value in depth_scores(depth, true, valid).items():
                found[key][score][index] = value
    return found


def _rmse(scores: dict[str, np.ndarray]) -> float:
    return mean_scores(scores)["rmse"]


def _best(scores: Scores, variant: int, lrs: tuple[float, ...]) -> float:
    """The rate of least RMSE."""
    values = {lr: _rmse(scores[variant, lr]) for lr in lrs}
    return min(lrs, key=lambda lr: values[lr] if math.isfinite(values[lr]) else math.inf)


def _mean_depth(
    train: DepthMaps,
    test: DepthMaps,
    border: Crop | None,
    window: Crop | None,
    options: DepthOptions,
    context: Context,
) -> tuple[float, dict[str, float]]:
    """The mean depth of training pixels, and the scores of predicting it everywhere."""

    def known(split: DepthMaps, index: int, crop: Crop | None) -> tuple[np.ndarray, np.ndarray]:
        depth = read_pair(split, index)[1]
        return depth, valid_pixels(depth, options.min_depth, options.max_depth, crop)

    def summed(index: int) -> tuple[float, int]:
        depth, valid = known(train, index, border)
        return float(depth[valid].sum(dtype=np.float64)), int(valid.sum())

    def scored(index: int) -> dict[str, float]:
        depth, valid = known(test, index, window)
        return depth_scores(np.full_like(depth, metres), depth, valid)

    def over(indices: list[int], function: Any) -> list[Any]:
        return list(context.progress(parallel(function, indices, context.workers), len(indices), "depth: baseline"))

    drawn = np.random.default_rng(context.seed).permutation(len(train))[:MEAN_IMAGES]
    sums, counts = zip(*over([int(index) for index in drawn], summed))
    where = f"between {options.min_depth:g} and {options.max_depth:g} m"
    if not sum(counts):
        raise RunError(f"linear depth: no training image has a pixel {where}")
    metres = sum(sums) / sum(counts)
    found = over(list(range(len(test))), scored)
    if not any(math.isfinite(each["rmse"]) for each in found):
        raise RunError(f"linear depth: no test image has a pixel {where} that counts")
    return metres, mean_scores({key: np.array([each[key] for each in found]) for key in SCORES})


def _examples(heads: DepthHeads, lr: float, test: DepthMaps, window: Crop | None, context: Context) -> None:
    """Image | prediction | truth of evenly spaced test images, by the first variant."""
    if context.examples is None or context.num_examples < 1:
        return
    context.examples.mkdir(parents=True, exist_ok=True)
    options = heads.options
    key = (options.variants[0], lr)
    for number, index in enumerate(np.unique(np.linspace(0, len(test) - 1, context.num_examples).astype(int)).tolist()):
        image, true = read_pair(test, index)
        pixels = torch.from_numpy(np.array(shrink(image, options.max_size))).permute(2, 0, 1)[None]
        predicted = resized(heads.predict(pixels, [key], [test.source.name(index)])[key][0], true.shape)
        valid = valid_pixels(true, options.min_depth, options.max_depth, window)
        error = depth_scores(predicted, true, valid)["rmse"]
        picture = example(image, predicted, true, valid, f"lin.{key[0]}, RMSE {error:.2f} m")
        picture.save(context.examples / f"depth_{number:02d}.png")
