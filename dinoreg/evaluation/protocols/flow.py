"""Optical flow with frozen features: matching as they are, and through one learned projection. No paper has it.

Two numbers for each rendering pass: *zero-shot*, the cosines of the tokens of two frames and a
soft-argmax around the best, on the test scenes and on all; *linear*, a D x c matrix and a temperature fitted on the
training scenes of all passes together, on the test scenes.

The headline is linear, first pass (clean), test scenes: its temperature is learned for each encoder, where the fixed
one of zero-shot suits the spread of one encoder's cosines and not another's, and the clean pass shows the same motion
without blur and fog, so that what differs between encoders is the matching. Nothing is chosen on the scored scenes.

The tokens of a frame serve as the first of one pair, the second of another and a few times in every fit, so the
backbone sees a frame once. On disk they take frames x patches x D numbers of the type `features_dtype`: 3.7 GB in
float32 for one pass of MPI Sintel with ViT-S/14. They lie in the folder of unfinished work and go when it is done.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import FlowPairs
from dinoreg.evaluation.dense.flow_matching import TALLY, Geometry, Projection, Truth, figures, match, tally
from dinoreg.evaluation.dense.pictures import draw_flow
from dinoreg.evaluation.features.cache import extract_rows
from dinoreg.evaluation.features.images import read_picture, resized, shown, size_of, to_array
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.protocols.measurement import Measurement, resumable_map
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import generator, train_heads
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel

ROUNDING = 0.01  # pixels; the loss is the end-point error, but smooth below this
AHEAD = 1  # loading threads: each holds four batches of pairs, tokens included
SPLITS = ("train", "test")
INTERVAL_NOTE = "the interval draws pairs; pairs of one scene are alike, so for other scenes it is too narrow"
MISSING = "the {{name}} split{which} is missing, or it does not hold pairs of frames with flow"

# Unit tokens (N, D) of two frames and their grid -> displacements (N, 2) in patches.
Matcher = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
Loaded = tuple[Tensor, Tensor, Truth]  # tokens (N, D) of both frames of a pair, and its ground truth


def evaluate(measured: Measurement) -> list[Row]:
    """Rows "linear" and "zero-shot" of each pass: end-point error in pixels, lower is better.

    data    splits "train" and "test" of FlowPairs, all frames of one size; several renderings of the same scenes come
            as extra["passes"] = {name: splits}, the first of which gives the headline
    raises  UserError for another metric, missing splits, and frames or truths of another size or unreadable; RunError
            where a token is not finite, the loss diverges or the disk is too small
    """
    measured.check_metric("optical flow", ("EPE",))
    settings, data, context = measured.options.flow, measured.data, measured.context
    passes: dict[str, dict[str, FlowPairs]] = {}
    for name, splits in (data.extra.get("passes") or {"": data.splits}).items():
        missing = MISSING.format(which=f" of the {name} pass" if name else "")
        of_pass = replace(measured, data=replace(data, splits=splits))
        passes[name] = {split: of_pass.split(split, FlowPairs, missing) for split in SPLITS}
    matching = Matching(measured, passes)
    matcher = partial(match, temperature=settings.temperature, window=settings.window)
    zero_shot = {
        (name, split): matching.measure(matcher, name, split, "zero_shot") for name in passes for split in SPLITS
    }
    projection = matching.fit()
    projected = {name: matching.measure(projection, name, "test", "projected") for name in passes}
    matching.draw(projection)
    grid = list(matching.geometry.grid)
    shared: dict[str, Any] = {"patches": grid, "tokens_on_disk": context.features_dtype, "upscale": settings.upscale}
    fixed = {**shared, "temperature": settings.temperature, "window": settings.window}
    learned = {**asdict(settings), **shared, "temperature": float(projection.temperature.detach()), "window": 0}
    n_train = sum(len(splits["train"]) for splits in passes.values())
    of_all = replace(measured, data=replace(data, variant="all pairs"))
    rows, shown, everything = [], [], []
    for name, splits in passes.items():
        test, both = splits["test"].scenes, [*splits["train"].scenes, *splits["test"].scenes]
        rows.append(_row(measured, "linear", name, projected[name], test, settings=learned, n_train=n_train))
        shown.append(_row(measured, "zero-shot", name, zero_shot[name, "test"], test, settings=fixed))
        tallies = torch.cat([zero_shot[name, split] for split in SPLITS])
        everything.append(_row(of_all, "zero-shot", name, tallies, both, settings=fixed))
    for path in context.state.glob("flow_tokens_*"):  # room on the disk for those of the baselines
        with suppress(OSError):  # some systems cannot delete mapped files; these go with the folder
            path.unlink()
    return rows + shown + everything


class Matching:
    """The tokens of an encoder on all frames: matched as they are, projected, matched again.

    passes  {name of a rendering: {"train" and "test": pairs}}; the tokens of their frames are read or extracted here
    """

    def __init__(self, measured: Measurement, passes: dict[str, dict[str, FlowPairs]]) -> None:
        encoder, settings, context = measured.encoder, measured.options.flow, measured.context
        self.passes, self.settings, self.device = passes, settings, encoder.device
        self.first = next(iter(passes.values()))
        size = size_of(read_picture(self.first["train"].source, 0))
        self.geometry = Geometry(size, encoder.patch_size, settings.upscale)
        everything = [(name, split, pairs) for name, splits in passes.items() for split, pairs in splits.items()]
        self.tokens: dict[int, np.ndarray] = {}  # by the identity of a source, which splits may share
        for _, _, pairs in everything:
            if id(pairs.source) not in self.tokens:
                self.tokens[id(pairs.source)] = frame_tokens(encoder, pairs.source, self.geometry, context)
        # A pair takes many megabytes, so that few are loaded ahead.
        self.context = replace(context, workers=min(context.workers, AHEAD))
        stamps = [(name, split, len(pairs), pairs.source.stamp()) for name, split, pairs in everything]
        # Saved states have this key, so that none is resumed under other options.
        made_of = (encoder.identity, encoder.dtype, context.features_dtype)
        self.key = (*made_of, stamps, self.geometry, settings, context.seed)
        self.constants = torch.stack([torch.zeros(2), self._mean_flow()]).to(self.device)

    @torch.no_grad()
    def measure(self, matcher: Matcher, name: str, split: str, kind: str) -> Tensor:
        """Tallies (pairs, 3, len(TALLY)) float64 of the matcher's flow, of no flow and of the mean flow everywhere.

        name, split  pass and split that are measured
        kind         of the matcher, for progress and saved states
        """
        pairs = self.passes[name][split]

        def compute(_index: int, loaded: Loaded) -> Tensor:
            predicted, known = self._predict(matcher, loaded)
            return torch.stack([tally(each, known) for each in (predicted, *self.constants)])

        what = "_".join(filter(None, (kind, name, split)))
        load = partial(self._load, pairs)
        tallies = resumable_map(self.context, f"flow_{what}", self.key, len(pairs), compute, f"{what} pairs", load)
        return torch.stack(tallies)

    def fit(self) -> Projection:
        """The projection trained on the end-point error of all passes' training pairs, at the frames' own size.

        raises  RunError where the loss diverges
        """
        settings, seed = self.settings, self.context.seed
        dim = self.tokens[id(self.first["train"].source)].shape[2]
        projection = Projection(dim, settings.dim, settings.temperature, seed).to(self.device)
        optimizer = torch.optim.AdamW(projection.parameters(), lr=settings.lr, weight_decay=0.0)
        train = [splits["train"] for splits in self.passes.values()]
        pairs = [(each, index) for each in train for index in range(len(each))]

        def batch(step: int) -> list[Loaded]:
            size = min(settings.batch_size, len(pairs))
            picked = generator(seed, step).choice(len(pairs), size=size, replace=False)
            return [self._load(*pairs[each]) for each in picked]

        def batches(first: int) -> Iterator[list[Loaded]]:
            return parallel(batch, range(first, settings.steps), self.context.workers)

        def losses(_step: int, batch: list[Loaded]) -> dict[str, Tensor]:
            total, count = torch.zeros((), device=self.device), 0
            for loaded in batch:
                predicted, known = self._predict(projection, loaded)
                difference = predicted[known.valid] - known.flow[known.valid]
                total = total + (difference.square().sum(dim=-1) + ROUNDING**2).sqrt().sum()
                count += len(difference)
            return {"linear": total / max(count, 1)}

        heads, optimizers = {"linear": projection}, {"linear": optimizer}
        given: dict[str, Any] = {"warmup": settings.steps // 20, "depends_on": self.key, "shorter": "flow.steps"}
        train_heads(heads, optimizers, batches, losses, settings.steps, self.context, "flow_linear", **given)
        return projection

    @torch.no_grad()
    def draw(self, matcher: Matcher) -> None:
        """Save examples: first frame, predicted flow and true flow of some test pairs of the first pass."""
        pairs = self.first["test"]
        for number, index in enumerate(self.context.example_indices(len(pairs))):
            predicted, known = self._predict(matcher, self._load(pairs, index))
            error = figures(tally(predicted, known)[None])["all"]
            flow, valid = known.flow.cpu().numpy(), known.valid.cpu().numpy()
            frame = shown(read_picture(pairs.source, int(pairs.first[index])))
            picture = draw_flow(frame, predicted.cpu().numpy(), flow, valid, f"linear; error {error:.1f} px")
            self.context.save_example(picture, "flow", number)

    def _load(self, pairs: FlowPairs, index: int) -> Loaded:
        tokens = self.tokens[id(pairs.source)]
        first, second = (torch.from_numpy(np.array(tokens[int(of[index])])) for of in (pairs.first, pairs.second))
        return first, second, truth(pairs, index, self.geometry)

    def _predict(self, matcher: Matcher, loaded: Loaded) -> tuple[Tensor, Truth]:
        """The matcher's flow (H, W, 2) in pixels, and the ground truth, both on the device."""
        first, second = (tokens.to(self.device).float() for tokens in loaded[:2])
        flow = self.geometry.to_pixels(matcher(first, second, self.geometry.grid))
        return flow, Truth(*(part.to(self.device) for part in loaded[2]))

    def _mean_flow(self) -> Tensor:
        """(2,): the flow of all valid pixels of the training pairs, averaged; the best that knows no picture."""
        pairs = self.first["train"]

        def summed(_index: int, known: Truth) -> list[float]:
            return [*known.flow[known.valid].double().sum(dim=0).tolist(), int(known.valid.sum())]

        what = "mean flow of the training pairs"
        load = partial(truth, pairs, geometry=self.geometry)
        sums = resumable_map(self.context, "flow_mean", self.key, len(pairs), summed, what, load)
        *total, count = np.sum(sums, axis=0)
        return (torch.tensor(total) / max(count, 1)).float()


def _row(measured: Measurement, kind: str, name: str, tallies: Tensor, scenes: Sequence[str], **fields: Any) -> Row:
    """The row of one measurement: tallies (pairs, 3, len(TALLY)) of the matcher, of no flow and of mean flow."""
    sums, counts = (tallies[:, 0, TALLY.index(key)].numpy() for key in ("sum", "count"))

    def pooled(drawn: np.ndarray) -> float:
        pixels = float(drawn @ counts)
        return float(drawn @ sums) / pixels if pixels else float("nan")

    own, zero, mean = (figures(tallies[:, place]) for place in range(3))
    of_scene = {scene: torch.from_numpy(np.asarray(scenes) == scene) for scene in sorted(set(scenes))}
    by_scene = {scene: figures(tallies[pairs, 0])["all"] for scene, pairs in of_scene.items()}
    value, interval = own.pop("all"), bootstrap_statistic(len(tallies), pooled, seed=measured.context.seed)
    fields |= {"unit": "px", "higher_is_better": False, "n_test": len(tallies), "note": INTERVAL_NOTE}
    fields["details"] = {**own, "zero flow": zero, "mean flow of train": mean, "scenes": by_scene}
    return measured.row(value, interval, variant=", ".join(filter(None, (kind, name))), **fields)


def frame_tokens(encoder: Encoder, source: Source, geometry: Geometry, context: Context) -> np.ndarray:
    """Unit patch tokens (frames, N, D) of `features_dtype` of every frame of a source, memory-mapped and read only.

    An interrupted extraction resumes. UserError naming a frame of another size than the geometry's or that cannot be
    read; RunError naming one whose tokens are not finite, or where the disk is too small.
    """
    made_of = (encoder.identity, encoder.dtype, source.stamp(), *geometry.working, context.features_dtype)
    path = context.state / f"flow_tokens_{'_'.join(map(str, made_of))}.npy"
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

    def compute(images: Tensor) -> Tensor:
        return F.normalize(encoder.tokens(images).patches.float(), dim=-1)

    what, advice = "tokens of frames", "features_dtype=float16 takes half, flow.upscale=1 a quarter of 2"
    return extract_rows(context, path, encoder, source, load, compute, what=what, batch_size=batch_size, advice=advice)


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
