"""P9, optical flow with frozen features: matching as they are, and through one learned projection. No paper has it.

Two numbers for each rendering pass: *zero-shot*, the cosines of the tokens of two frames and a
soft-argmax around the best, on the test scenes and on all; *linear*, a D x c matrix and a temperature fitted on the
training scenes of all passes together, on the test scenes.

The headline is linear, first pass (clean), test scenes: its temperature is learned for each encoder, where the fixed
one of zero-shot suits the spread of one encoder's cosines and not another's, and the clean pass shows the same motion
without blur and fog, so that what differs between encoders is the matching. Nothing is chosen on the scored scenes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, FlowPairs
from dinoreg.evaluation.dense.flow_frames import forget_tokens, frame_tokens, truth
from dinoreg.evaluation.dense.flow_matching import TALLY, Geometry, Projection, Truth, figures, match, tally
from dinoreg.evaluation.dense.flow_pictures import draw
from dinoreg.evaluation.features.images import parallel, read_rgb
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.options import EvalOptions, FlowOptions
from dinoreg.evaluation.protocols.measurement import Measurement, resumable_map
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import cosine, generator, train_heads

ROUNDING = 0.01  # pixels; the loss is the end-point error, but smooth below this
AHEAD = 1  # loading threads: each holds four batches of pairs, tokens included
SPLITS = ("train", "test")
INTERVAL_NOTE = "the interval draws pairs; pairs of one scene are alike, so for other scenes it is too narrow"
MISSING = "the {{name}} split{which} is missing, or it does not hold pairs of frames with flow"

Matcher = Callable[[Tensor, Tensor], Tensor]  # unit tokens (N, D) of two frames -> (N, 2) in patches


@dataclass(frozen=True)
class _Pass:
    """One rendering of the frames: the pairs and the cached tokens of their frames, both by split."""

    name: str
    pairs: Mapping[str, FlowPairs]
    tokens: Mapping[str, np.ndarray]

    def load(self, split: str, index: int, geometry: Geometry) -> tuple[Tensor, Tensor, Truth]:
        """Tokens (N, D) of both frames and the truth of one pair, on the CPU."""
        pairs, tokens = self.pairs[split], self.tokens[split]
        frames = (torch.from_numpy(np.array(tokens[int(which[index])])) for which in (pairs.first, pairs.second))
        return *frames, truth(pairs, index, geometry)  # type: ignore[return-value]


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """Rows "linear" and "zero-shot" of each pass: end-point error in pixels, lower is better.

    data  splits "train" and "test" of FlowPairs, all frames of one size; several renderings of the same scenes come as
          extra["passes"] = {name: splits}, the first of which gives the headline
    """
    settings = options.flow
    of_test = Measurement(data, task, context, FlowPairs, MISSING.format(which=""), "optical flow", ("EPE",))
    of_all = Measurement(replace(data, variant="all pairs"), task, context, FlowPairs, "")
    by_pass = {
        name: _pairs(replace(data, splits=splits), task, context, name)
        for name, splits in (data.extra.get("passes") or {"": data.splits}).items()
    }
    width, height = read_rgb(next(iter(by_pass.values()))["train"].source, 0).size
    geometry = Geometry((height, width), encoder.patch_size, settings.upscale)
    passes = _with_tokens(by_pass, encoder, geometry, context)
    matching = _Matching(passes, encoder, geometry, settings, context)
    zero_shot = {
        (each.name, split): matching.measure(matching.zero_shot, each, split, "zero_shot")
        for each in passes
        for split in ("test", "train")
    }
    projection = matching.fit()

    def linear(first: Tensor, second: Tensor) -> Tensor:
        return projection(first, second, geometry.grid)

    projected = {each.name: matching.measure(linear, each, "test", "projected") for each in passes}
    matching.draw(linear)
    shared = {
        "patches": list(geometry.grid),
        "frames_resized_to": list(geometry.working),
        "upscale": settings.upscale,
        "tokens_on_disk": context.features.dtype.name,
        "test_scenes": sorted(set(passes[0].pairs["test"].scenes)),
    }
    fixed = {**shared, "temperature": settings.temperature, "window": settings.window}
    learned = {
        **shared,
        **{key: getattr(settings, key) for key in ("dim", "steps", "lr", "batch_size")},
        "first_temperature": settings.temperature,
        "temperature": float(projection.temperature.detach()),
        "window": 0,
        "fitted_on": "the training scenes of " + (" and ".join(each.name for each in passes if each.name) or "all"),
    }
    n_train = sum(len(each.pairs["train"]) for each in passes)
    rows = []
    for each in passes:
        rows.append(_row(of_test, "linear", each, ("test",), projected[each.name], settings=learned, n_train=n_train))
    for each in passes:
        rows.append(_row(of_test, "zero-shot", each, ("test",), zero_shot[each.name, "test"], settings=fixed))
    for each in passes:
        both = torch.cat([zero_shot[each.name, split] for split in SPLITS])
        rows.append(_row(of_all, "zero-shot", each, SPLITS, both, settings=fixed))
    forget_tokens(context)
    return rows


def _pairs(data: Data, task: Task, context: Context, name: str) -> dict[str, FlowPairs]:
    """The pairs of one pass; UserError where a split is missing."""
    missing = MISSING.format(which=f" of the {name} pass" if name else "")
    measured = Measurement(data, task, context, FlowPairs, missing)
    return {split: measured.split(split) for split in SPLITS}


def _with_tokens(
    by_pass: Mapping[str, dict[str, FlowPairs]], encoder: Encoder, geometry: Geometry, context: Context
) -> list[_Pass]:
    """The passes with the tokens of their frames; splits may share a source, which is encoded once."""
    tokens: dict[int, np.ndarray] = {}
    for pairs in by_pass.values():
        for each in pairs.values():
            if id(each.source) not in tokens:
                tokens[id(each.source)] = frame_tokens(encoder, each.source, geometry, context)
    return [
        _Pass(name, pairs, {split: tokens[id(each.source)] for split, each in pairs.items()})
        for name, pairs in by_pass.items()
    ]


class _Matching:
    """What is done with the tokens of an encoder: measured as they are, projected, measured again."""

    def __init__(
        self, passes: list[_Pass], encoder: Encoder, geometry: Geometry, settings: FlowOptions, context: Context
    ) -> None:
        self.passes, self.geometry, self.settings, self.device = passes, geometry, settings, encoder.device
        # A pair takes many megabytes, so that few are loaded ahead.
        self.context = replace(context, workers=min(context.workers, AHEAD))
        pairs = [
            (each.name, split, len(found), found.source.stamp())
            for each in passes
            for split, found in each.pairs.items()
        ]
        key: list[Any] = [encoder.identity, str(encoder.dtype), context.features.dtype.name, pairs]
        key += [asdict(geometry), asdict(settings), context.seed]
        # States of unfinished work are named by this, so that none is taken up under other options.
        self.key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        self.constants = torch.stack([torch.zeros(2), self._mean_flow()]).to(self.device)

    def _mean_flow(self) -> Tensor:
        """(2,): the flow of all valid pixels of the training pairs, averaged; the best that knows no picture."""
        pairs = self.passes[0].pairs["train"]

        def summed(_index: int, known: Truth) -> list[float]:
            return [*known.flow[known.valid].double().sum(dim=0).tolist(), int(known.valid.sum())]

        sums = resumable_map(
            self.context,
            "flow_mean",
            self.key,
            len(pairs),
            summed,
            "mean flow of the training pairs",
            lambda index: truth(pairs, index, self.geometry),
        )
        *total, count = np.sum(sums, axis=0)
        return (torch.tensor(total) / max(count, 1)).float()

    def zero_shot(self, first: Tensor, second: Tensor) -> Tensor:
        return match(first, second, self.geometry.grid, self.settings.temperature, self.settings.window)

    @torch.no_grad()
    def measure(self, matcher: Matcher, which: _Pass, split: str, kind: str) -> Tensor:
        """Tallies (pairs, 3, len(TALLY)) of the matcher's flow, of no flow and of the mean flow everywhere."""

        def compute(_index: int, loaded: tuple[Tensor, Tensor, Truth]) -> Tensor:
            first, second, known = self._on_device(loaded)
            predicted = self.geometry.to_pixels(matcher(first, second))
            return torch.stack([tally(each, known) for each in (predicted, *self.constants)])

        name = "_".join(filter(None, (kind, which.name, split)))
        tallies = resumable_map(
            self.context,
            f"flow_{name}",
            self.key,
            len(which.pairs[split]),
            compute,
            f"{name} pairs",
            lambda index: which.load(split, index, self.geometry),
        )
        return torch.stack(tallies)

    def fit(self) -> Projection:
        """The projection trained on the end-point error of all passes' training pairs, at the frames' own size."""
        settings, seed = self.settings, self.context.seed
        dim = self.passes[0].tokens["train"].shape[2]
        projection = Projection(dim, settings.dim, settings.temperature, seed).to(self.device)
        optimizer = torch.optim.AdamW(projection.parameters(), lr=settings.lr, weight_decay=0.0)
        pairs = [(each, index) for each in self.passes for index in range(len(each.pairs["train"]))]
        ahead: Iterator[list[tuple[Tensor, Tensor, Truth]]] | None = None

        def batch(step: int) -> list[tuple[Tensor, Tensor, Truth]]:
            size = min(settings.batch_size, len(pairs))
            picked = generator(seed, step).choice(len(pairs), size=size, replace=False)
            return [which.load("train", index, self.geometry) for which, index in (pairs[each] for each in picked)]

        def losses(step: int) -> dict[str, Tensor]:
            nonlocal ahead
            if ahead is None:  # a training that goes on does not begin at step 0
                ahead = parallel(batch, range(step, settings.steps), self.context.workers)
            total, count = torch.zeros((), device=self.device), 0
            for first, second, known in map(self._on_device, next(ahead)):
                predicted = self.geometry.to_pixels(projection(first, second, self.geometry.grid))
                difference = predicted[known.valid] - known.flow[known.valid]
                total = total + (difference.square().sum(dim=-1) + ROUNDING**2).sqrt().sum()
                count += len(difference)
            return {"linear": total / max(count, 1)}

        def factor(step: int) -> float:
            return cosine(step, settings.steps, settings.steps // 20)

        name = f"flow_{self.key}_linear"
        train_heads({"linear": projection}, {"linear": optimizer}, losses, settings.steps, factor, self.context, name)
        return projection

    @torch.no_grad()
    def draw(self, matcher: Matcher) -> None:
        """First frame, predicted flow and true flow of some test pairs of the first pass."""
        which = self.passes[0]
        pairs = which.pairs["test"]
        for number, index in enumerate(self.context.example_indices(len(pairs))):
            first, second, known = self._on_device(which.load("test", index, self.geometry))
            predicted = self.geometry.to_pixels(matcher(first, second))
            error = figures(tally(predicted, known)[None])["all"]
            flow, valid = known.flow.cpu().numpy(), known.valid.cpu().numpy()
            frame = read_rgb(pairs.source, int(pairs.first[index]))
            picture = draw(frame, predicted.cpu().numpy(), flow, valid, f"linear; error {error:.1f} px")
            self.context.save_example(picture, "flow", number)

    def _on_device(self, loaded: tuple[Tensor, Tensor, Truth]) -> tuple[Tensor, Tensor, Truth]:
        first, second, known = loaded
        device = self.device
        return first.to(device).float(), second.to(device).float(), Truth(*(part.to(device) for part in known))


def _row(
    measured: Measurement[FlowPairs], kind: str, which: _Pass, splits: tuple[str, ...], tallies: Tensor, **fields: Any
) -> Row:
    """The row of one measurement: tallies (pairs, 3, len(TALLY)) of the matcher, of no flow and of mean flow."""
    sums, counts = (tallies[:, 0, TALLY.index(key)].numpy() for key in ("sum", "count"))

    def pooled(drawn: np.ndarray) -> float:
        pixels = float(drawn @ counts)
        return float(drawn @ sums) / pixels if pixels else float("nan")

    scenes = np.array([scene for split in splits for scene in which.pairs[split].scenes])
    own, zero, mean = (figures(tallies[:, place]) for place in range(3))
    by_scene = {}
    for name in np.unique(scenes).tolist():
        by_scene[name] = figures(tallies[torch.from_numpy(scenes == name), 0])["all"]
    return measured.row(
        own.pop("all"),
        bootstrap_statistic(len(tallies), pooled, seed=measured.context.seed),
        variant=", ".join(filter(None, (kind, which.name))),
        unit="px",
        higher_is_better=False,
        n_test=len(tallies),
        details={**own, "zero flow": zero, "mean flow of train": mean, "scenes": by_scene},
        note=INTERVAL_NOTE,
        **fields,
    )
