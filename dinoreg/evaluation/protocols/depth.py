"""Linear depth: RMSE in metres of linear heads on frozen patch and class tokens, lin.1 and lin.4.
Follows DINOv2 §7.4 and its released heads: lin.1 reads the last block, lin.4 four blocks spread over the network, both
without the final norm; 256 bins, scores normalised by their sum, the expected depth; trained by the scale-invariant
loss and half the multi-scale gradient loss. Both, and all learning rates, are trained at once on one pass of the
backbone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.data.preprocess import to_unit
from dinoreg.evaluation.backbones.encoder import Encoder, seeded
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import DepthMaps
from dinoreg.evaluation.dense.depth_images import as_seen, crop_size, example, read_pair, training_crop
from dinoreg.evaluation.dense.windows import batches_of_one_shape, centre_pad, centre_padding, training_batches
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.features.images import stack_images, to_array
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.depth import SCORES, Crop, depth_scores, mean_scores, valid_pixels
from dinoreg.evaluation.options import DepthOptions
from dinoreg.evaluation.protocols.measurement import Measurement, choose_best
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import train_heads
from dinoreg.models.vit import Tokens
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.parallel import parallel

UPSAMPLE = 4  # of the patch grid, before scores become depths
SCORE_FLOOR = 0.1  # added to every bin's score
GRADIENT_WEIGHT = 0.5
CLIP_GRAD = 35.0
LOG_EPS = 1e-3  # metres, added before every logarithm of the losses
MEAN_WEIGHT = 0.15  # of the squared mean in the scale-invariant loss
GRADIENT_STRIDES = (1, 2, 4, 6)  # pixels between those that the gradient loss looks at
LOSS_WARMUP = 100  # steps, of 38,400, without the variance in the scale-invariant loss; a tenth of all at most
# The published choice of four blocks, from 1; elsewhere they are evenly spaced.
FOUR_BLOCKS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24), 40: (10, 20, 30, 40)}

MEAN_IMAGES = 1000  # training images that the mean depth is taken over, at most
BASELINE = (0, 0.0)  # no head: the mean training depth everywhere
MISSING = "linear depth needs a {name} split of images with depth maps"

Key = tuple[int, float]  # a head: its variant and its learning rate
Valid = Callable[[np.ndarray], np.ndarray]  # depth map (H, W) -> (H, W) bool: pixels that count
Scores = dict[Key, dict[str, np.ndarray]]  # {head: {score: (n,), NaN where no pixel of an image is valid}}


def head_blocks(variant: int, depth: int) -> tuple[int, ...]:
    """The blocks, from 0, that lin.`variant` reads of a backbone with `depth` blocks; ascending and distinct.

    lin.4 reads those of DINOv2 (§7.4) where the depth is 12, 24 or 40; otherwise blocks are evenly spaced.
    """
    if variant == 4 and depth in FOUR_BLOCKS:
        return tuple(block - 1 for block in FOUR_BLOCKS[depth])
    return tuple(sorted({max(round(depth * part / variant), 1) - 1 for part in range(1, variant + 1)}))


def warmup_steps(options: DepthOptions) -> int:
    """Steps of the learning rate's warm-up; a third of all, as published, when there are fewer."""
    return min(options.warmup_steps, options.steps // 3)


def scale_invariant_loss(predicted: Tensor, true: Tensor, valid: Tensor, warming_up: bool = False) -> Tensor:
    """sqrt(variance + 0.15 mean²) of the logarithms' differences over all valid pixels of a batch.

    The loss of Eigen et al. (arXiv 1406.2283) with lambda = 0.85, under a root.

    predicted, true  (B, H, W) metres
    valid            (B, H, W) bool
    warming_up       the variance is left out, so that the scale is found first
    returns          (), differentiable; 0 where no pixel is valid
    """
    g = (predicted[valid] + LOG_EPS).log() - (true[valid] + LOG_EPS).log()
    if not g.numel():
        return predicted.sum() * 0.0
    if warming_up:
        return MEAN_WEIGHT**0.5 * g.mean().abs()
    variance = g.var() if g.numel() > 1 else g.new_zeros(())
    # The root's slope at 0 is infinite; a perfect batch must not break the head.
    return (variance + MEAN_WEIGHT * g.mean() ** 2).clamp(min=1e-12).sqrt()


def gradient_loss(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """How much the logarithms' difference changes from a pixel to the next but one, over four subsamplings.

    predicted, true  (B, H, W) metres
    valid            (B, H, W) bool; a difference counts where both of its pixels are valid
    returns          () summed over both directions and the subsamplings, each divided by its number of valid pixels

    DINOv2's release takes these differences along the batch and channel axes of (B, 1, H, W), the first two; here they
    are along height and width, as in MegaDepth, from which the loss comes.
    """
    difference = (predicted + LOG_EPS).log() - (true.clamp(min=0) + LOG_EPS).log()
    difference = difference.where(valid, difference.new_zeros(()))
    total = predicted.new_zeros(())
    for stride in GRADIENT_STRIDES:
        d, v = difference[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = (d[:, :-2] - d[:, 2:]).abs() * (v[:, :-2] & v[:, 2:])
        right = (d[:, :, :-2] - d[:, :, 2:]).abs() * (v[:, :, :-2] & v[:, :, 2:])
        total = total + (down.sum() + right.sum()) / v.sum().clamp(min=1)
    return total


class DepthHead(nn.Module):
    """Patch tokens beside their image's class token -> depth at four times the patch grid (DINOv2 §7.4).

    Each bin's score is ReLU(logit) + 0.1, divided by their sum; the depth is the mean of the bins under these shares.

    widths                per block (patch width, class token width)
    min_depth, max_depth  centres of the first and last bin, in metres
    """

    bins: Tensor

    def __init__(self, widths: Sequence[tuple[int, int]], num_bins: int, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.widths = [width for pair in widths for width in pair]
        self.project = nn.Linear(sum(self.widths), num_bins)
        # The released heads' centres: evenly spaced with both ends among them.
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    def forward(self, tokens: Sequence[Tokens], grid: tuple[int, int]) -> Tensor:
        """Depth (B, 4h, 4w) in metres.

        tokens  of each block in the order of `widths`: cls (B, D), patches (B, N, D)
        grid    (h, w), rows and columns of patches
        """
        # The published head enlarges the features and then projects; both are linear and bilinear weights sum to one,
        # so projecting first gives the same scores for a sixteenth of the work. The class token is projected once.
        weights = self.project.weight.split(self.widths, dim=1)
        scores = self.project.bias
        for each, of_patches, of_class in zip(tokens, weights[::2], weights[1::2]):
            scores = scores + each.patches @ of_patches.T + (each.cls @ of_class.T)[:, None]  # (B, N, bins)
        maps = scores.mT.unflatten(2, grid)
        maps = F.interpolate(maps, scale_factor=UPSAMPLE, mode="bilinear", align_corners=False)
        shares = maps.relu() + SCORE_FLOOR
        return torch.einsum("bkhw,k->bhw", shares, self.bins) / shares.sum(dim=1)


class DepthHeads:
    """A head for every (variant, rate), all on one encoder; lin.`variant` reads that many blocks."""

    def __init__(self, encoder: Encoder, options: DepthOptions, seed: int) -> None:
        self.encoder, self.options, self.seed = encoder, options, seed
        self.blocks = {variant: head_blocks(variant, encoder.depth) for variant in options.variants}
        self.heads: dict[Key, DepthHead] = {}

    def fit(self, train: DepthMaps, size: tuple[int, int], border: Crop | None, context: Context) -> dict[Key, float]:
        """Train all heads on crops of `size` from inside `border`.

        size     (height, width) of the crops in pixels
        border   the part of each image that crops are taken from; None: all of it
        returns  {head: mean loss of the last tenth of the steps}, NaN for a head that diverged
        raises   RunError where all heads diverge or a token is not finite; UserError as `read_pair`
        """
        options, device = self.options, self.encoder.device
        self._build(*size)
        loss_warmup = min(LOSS_WARMUP, options.steps // 10)

        def load(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            image, metres = read_pair(train, index)
            return training_crop(as_seen(image, options.max_size, options.min_size), metres, size, border, rng)

        def losses(step: int, batch: list[tuple[int, tuple[np.ndarray, np.ndarray]]]) -> Mapping[Key, Tensor]:
            indices, crops = zip(*batch)
            images = torch.from_numpy(np.stack([pixels for pixels, _ in crops])).permute(0, 3, 1, 2).to(device)
            depth = torch.from_numpy(np.stack([metres for _, metres in crops])).to(device)
            # In the loss the largest depth counts, in the scores it does not: both as DINOv2 has it.
            valid = (depth > options.min_depth) & (depth <= options.max_depth)
            tokens, grid = self._tokens(images, [train.source.name(index) for index in indices])
            found = {}
            for key in self.heads:
                predicted = self._depth(key, tokens, grid, size)
                loss = scale_invariant_loss(predicted, depth, valid, step < loss_warmup)
                found[key] = loss + GRADIENT_WEIGHT * gradient_loss(predicted, depth, valid)
            return found

        optimizers = {
            (variant, lr): torch.optim.AdamW(head.parameters(), lr, weight_decay=options.weight_decay)
            for (variant, lr), head in self.heads.items()
        }
        batches = training_batches(load, len(train), options.batch_size, options.steps, context)
        given: dict[str, Any] = {"warmup": warmup_steps(options), "clip_grad": CLIP_GRAD, "shorter": "depth.steps"}
        return train_heads(self.heads, optimizers, batches, losses, options.steps, context, "depth", **given)

    @torch.no_grad()
    def predict(self, images: Tensor, keys: Sequence[Key], names: Sequence[str]) -> dict[Key, Tensor]:
        """The mean prediction on images and on their mirror images, each clamped to the bins' range.

        images   (B, C, H, W) uint8, or float in [0, 1]
        names    of the images, for the RunError when a feature is not finite
        returns  {head: (B, H, W) float32 metres}
        """
        pixels = to_unit(images.to(self.encoder.device))
        size = (images.shape[2], images.shape[3])
        total: dict[Key, Tensor] = {}
        for mirrored in (False, True):
            tokens, grid = self._tokens(pixels.flip(-1) if mirrored else pixels, names)
            for key in keys:
                depth = self._depth(key, tokens, grid, size).clamp(self.options.min_depth, self.options.max_depth)
                total[key] = (total[key] + depth.flip(-1)) / 2 if mirrored else depth
        return total

    def predictions(
        self, split: DepthMaps, context: Context
    ) -> Iterator[tuple[int, np.ndarray, dict[Key, np.ndarray]]]:
        """Every image's prediction by every head; batches are of equal size, so that the order changes.

        yields  (index, truth (H, W) float32 metres, {head: prediction (H, W) float32 metres})
        raises  RunError where a feature is not finite; UserError as `read_pair`
        """

        def load(index: int) -> tuple[int, np.ndarray, np.ndarray]:
            image, depth = read_pair(split, index)
            return index, to_array(as_seen(image, self.options.max_size, self.options.min_size)), depth

        loaded = parallel(load, range(len(split)), context.workers)
        batch_size = min(context.batch_size, self.options.batch_size)
        for batch in batches_of_one_shape(loaded, batch_size, lambda each: each[1].shape):
            images = stack_images([pixels for _, pixels, _ in batch])
            predicted = self.predict(images, [*self.heads], [split.source.name(index) for index, _, _ in batch])
            for row, (index, _, true) in enumerate(batch):
                yield index, true, {key: resized(depth[row], true.shape) for key, depth in predicted.items()}

    def _tokens(self, images: Tensor, names: Sequence[str]) -> tuple[dict[int, Tokens], tuple[int, int]]:
        """{block: tokens} of the blocks that heads read, and the grid; images are padded with what normalises to 0."""
        padded = centre_pad(images, self.encoder.patch_size, self.encoder.preprocessing.mean)
        layers = sorted({block for blocks in self.blocks.values() for block in blocks})
        tokens = dict(zip(layers, self.encoder.layers(padded, layers, norm=False), strict=True))
        for each in tokens.values():
            require_finite(each.cls, names, self.encoder)
            require_finite(each.patches, names, self.encoder)
        return tokens, self.encoder.grid(padded.shape[2], padded.shape[3])

    def _depth(self, key: Key, tokens: Mapping[int, Tokens], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """(B, H, W) metres at the pixels of the images of `size`: the padding is cut off again."""
        patch = self.encoder.patch_size
        depth = self.heads[key]([tokens[block] for block in self.blocks[key[0]]], grid)
        full = (grid[0] * patch, grid[1] * patch)
        depth = F.interpolate(depth[:, None], size=full, mode="bilinear", align_corners=False)[:, 0]
        top, left = (centre_padding(side, patch)[0] for side in size)
        return depth[:, top : top + size[0], left : left + size[1]]

    def _build(self, height: int, width: int) -> None:
        """Heads for the widths of the tokens that an image of this size has."""
        blank = torch.zeros(1, self.encoder.in_channels, height, width, device=self.encoder.device)
        tokens, _ = self._tokens(blank, ["a blank image"])
        options = self.options
        for variant, blocks in self.blocks.items():
            widths = [(tokens[block].patches.shape[-1], tokens[block].cls.shape[-1]) for block in blocks]
            for lr in options.lrs:
                with seeded(self.seed):  # the same start for every rate
                    head = DepthHead(widths, options.num_bins, options.min_depth, options.max_depth)
                self.heads[variant, lr] = head.to(self.encoder.device)


def resized(depth: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A map (h, w), resized bilinearly to `shape` (H, W): float32, on the CPU."""
    return F.interpolate(depth[None, None], size=tuple(shape), mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


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
    where = f"between {settings.min_depth:g} and {settings.max_depth:g} m"
    metres = _mean_depth(train, in_border, where, context)
    size = crop_size(train, border, settings.max_size, settings.min_size)
    heads = DepthHeads(measured.encoder, settings, context.seed)
    ended = heads.fit(train, size, border, context)
    scores = _score(heads, test, metres, in_window, context, "depth: test")
    if not np.isfinite(scores[BASELINE]["rmse"]).any():
        raise RunError(f"linear depth: no test image has a pixel {where} that counts")
    several = len(settings.lrs) > 1
    tried = _score(heads, val, metres, in_window, context, "depth: val") if several and val is not None else None
    rows: list[Row] = []
    settled = {**asdict(settings), "warmup_steps": warmup_steps(settings), "crop": size}
    settled |= {"train_border": border[0] if border else "none"}
    settled |= {"eval_crop": window[0] if window else "the whole image"}
    note = f"depths up to {settings.max_depth:g} m" if "samples" in measured.data.extra else ""
    shared: dict[str, Any] = {"unit": "m", "higher_is_better": False, "n_train": len(train), "note": note}
    for variant in settings.variants:
        errors = _errors(scores, variant)
        lr, chosen_on = choose_best(errors, None if tried is None else _errors(tried, variant))
        if not rows:
            _draw(heads, (variant, lr), test, in_window, context)
        means, rmse = mean_scores(scores[variant, lr]), scores[variant, lr]["rmse"]
        rmse = rmse[np.isfinite(rmse)]
        means.pop("rmse")
        details: dict[str, Any] = {
            **means,
            "baselines": {"mean training depth": mean_scores(scores[BASELINE])},
            "mean_training_depth": metres,
            "images_without_depth": len(test) - len(rmse),
            "final_loss": ended[variant, lr],
        }
        if several:
            details["rmse_by_lr"] = {f"{each:g}": -error for each, error in errors.items()}
        of_head = {**settled, "lr": lr, "blocks": [block + 1 for block in heads.blocks[variant]]}
        fields = {"variant": f"lin.{variant}", "chosen_on": chosen_on, "details": details, **shared}
        interval = bootstrap_interval(rmse, seed=context.seed)
        rows.append(measured.row(float(rmse.mean()), interval, n_test=len(rmse), settings=of_head, **fields))
    return rows


def _score(heads: DepthHeads, split: DepthMaps, metres: float, valid: Valid, context: Context, what: str) -> Scores:
    """Of every head, and of `metres` everywhere under BASELINE."""
    scores: Scores = {key: {score: np.full(len(split), np.nan) for score in SCORES} for key in (BASELINE, *heads.heads)}
    for index, true, predicted in context.progress(heads.predictions(split, context), len(split), what):
        for key, depth in {BASELINE: np.full_like(true, metres), **predicted}.items():
            for score, value in depth_scores(depth, true, valid(true)).items():
                scores[key][score][index] = value
    return scores


def _errors(scores: Scores, variant: int) -> dict[float, float]:
    """{rate: minus the RMSE in metres}, so that the best is the highest."""
    return {lr: -mean_scores(each)["rmse"] for (of, lr), each in scores.items() if of == variant}


def _mean_depth(train: DepthMaps, valid: Valid, where: str, context: Context) -> float:
    """The mean depth of training pixels in metres; RunError where none is `where` depths count."""

    def summed(index: int) -> tuple[float, int]:
        depth = read_pair(train, index)[1]
        counted = depth[valid(depth)]
        return float(counted.sum(dtype=np.float64)), counted.size

    indices = np.random.default_rng(context.seed).permutation(len(train))[:MEAN_IMAGES].tolist()
    found = parallel(summed, indices, context.workers)
    sums, counts = zip(*context.progress(found, len(indices), "depth: baseline"))
    if not sum(counts):
        raise RunError(f"linear depth: no training image has a pixel {where}")
    return sum(sums) / sum(counts)


def _draw(heads: DepthHeads, key: Key, test: DepthMaps, valid: Valid, context: Context) -> None:
    """Image | prediction | truth of evenly spaced test images, by one head."""
    for number, index in enumerate(context.example_indices(len(test))):
        image, true = read_pair(test, index)
        pixels = stack_images([to_array(as_seen(image, heads.options.max_size, heads.options.min_size))])
        predicted = resized(heads.predict(pixels, [key], [test.source.name(index)])[key][0], true.shape)
        error = depth_scores(predicted, true, valid(true))["rmse"]
        picture = example(image, predicted, true, valid(true), f"lin.{key[0]}, RMSE {error:.2f} m")
        context.save_example(picture, "depth", number)
