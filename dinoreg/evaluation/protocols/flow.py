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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import SAVE_SECONDS, Context
from dinoreg.evaluation.data import Data, FlowPairs
from dinoreg.evaluation.dense.flow_frames import forget_tokens, frame_tokens, truth
from dinoreg.evaluation.dense.flow_matching import TALLY, Geometry, Projection, Truth, figures, match, tally
from dinoreg.evaluation.dense.flow_pictures import draw
from dinoreg.evaluation.features.images import parallel, read_rgb
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.options import EvalOptions, FlowOptions
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import cosine, generator, train_heads
from dinoreg.runtime.errors import UserError

ROUNDING = 0.01  # pixels; the loss is the end-point error, but smooth below this
AHEAD = 1  # loading threads: each holds four batches of pairs, tokens included
Matcher = Callable[[Tensor, Tensor], Tensor]  # unit tokens (N, D) of two frames -> (N, 2) in patches
INTERVAL_NOTE = "the interval draws pairs; pairs of one scene are alike, so for other scenes it is too narrow"


class _Pass:
    """One rendering of the frames: its splits and the cached tokens of their frames."""

    def __init__(self, name: str, splits: Mapping[str, FlowPairs]) -> None:
        self.name, self.splits = name, splits
        self.tokens: dict[str, np.ndarray] = {}

    def prepare(self, encoder: Encoder, geometry: Geometry, context: Context, known: dict[int, np.ndarray]) -> None:
        """Extract what is not yet known of the splits' sources, which may be one and the same."""
        for split, pairs in self.splits.items():
            if id(pairs.source) not in known:
                known[id(pairs.source)] = frame_tokens(encoder, pairs.source, geometry, context)
            self.tokens[split] = known[id(pairs.source)]

    def load(self, split: str, index: int, geometry: Geometry) -> tuple[Tensor, Tensor, Truth]:
        """Tokens (N, D) of both frames and the truth of one pair, on the CPU."""
        pairs, tokens = self.splits[split], self.tokens[split]
        frames = (torch.from_numpy(np.array(tokens[int(which[index])])) for which in (pairs.first, pairs.second))
        return *frames, truth(pairs, index, geometry)  # type: ignore[return-value]


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """Rows "linear" and "zero-shot" of each pass: end-point error in pixels, lower is better.

    data  splits "train" and "test" of FlowPairs, all frames of one size; several renderings of the same scenes come as
          extra["passes"] = {name: splits}, the first of which gives the headline
    """
    started = time.monotonic()
    if task.metric != "EPE":
        raise UserError(f"metric {task.metric!r}: optical flow has EPE")
    chosen = options.flow
    passes = [_Pass(name, splits) for name, splits in _passes(data).items()]
    width, height = read_rgb(passes[0].splits["train"].source, 0).size
    geometry = Geometry((height, width), encoder.patch_size, chosen.upscale)
    known: dict[int, np.ndarray] = {}
    for each in passes:
        each.prepare(encoder, geometry, context, known)
    tag = _tag(encoder, passes, geometry, chosen, context)
    constants = torch.stack([torch.zeros(2), _mean_flow(passes[0].splits["train"], geometry, context, tag)])

    def zero_shot(first: Tensor, second: Tensor) -> Tensor:
        return match(first, second, geometry.grid, chosen.temperature, chosen.window)

    direct = {
        (each.name, split): _measure(zero_shot, each, split, geometry, constants, encoder, context, f"{tag}_zero_shot")
        for each in passes
        for split in ("test", "train")
    }
    projection = _fit(passes, geometry, chosen, encoder, context, f"{tag}_linear")

    def linear(first: Tensor, second: Tensor) -> Tensor:
        return projection(first, second, geometry.grid)

    learned = {
        each.name: _measure(linear, each, "test", geometry, constants, encoder, context, f"{tag}_projected")
        for each in passes
    }
    if context.examples is not None:
        _draw_examples(linear, passes[0], geometry, encoder, context)
    settings = {
        "patches": list(geometry.grid),
        "frames_resized_to": list(geometry.working),
        "upscale": chosen.upscale,
        "tokens_on_disk": context.features.dtype.name,
        "test_scenes": sorted(set(passes[0].splits["test"].scenes)),
    }
    fixed = {**settings, "temperature": chosen.temperature, "window": chosen.window}
    fitted = {
        **settings,
        "dim": chosen.dim,
        "steps": chosen.steps,
        "lr": chosen.lr,
        "batch_size": chosen.batch_size,
        "first_temperature": chosen.temperature,
        "temperature": float(projection.temperature.detach()),
        "window": 0,
        "fitted_on": "the training scenes of " + (" and ".join(each.name for each in passes if each.name) or "all"),
    }
    common = {"hours": (time.monotonic() - started) / 3600, "seeds": (context.seed,)}
    n_train = sum(len(each.splits["train"]) for each in passes)
    found: list[tuple[_Pass, tuple[str, ...], Tensor, str, str, int, dict[str, Any]]]
    found = [(each, ("test",), learned[each.name], "linear", data.variant, n_train, fitted) for each in passes]
    found += [(each, ("test",), direct[each.name, "test"], "zero-shot", data.variant, 0, fixed) for each in passes]
    for each in passes:
        both = torch.cat([direct[each.name, split] for split in ("train", "test")])
        found.append((each, ("train", "test"), both, "zero-shot", "all pairs", 0, fixed))
    rows = []
    for each, splits, tallies, kind, where, learnt_from, used in found:
        variant = ", ".join(filter(None, (kind, each.name, where)))
        scenes = [scene for split in splits for scene in each.splits[split].scenes]
        rows.append(_row(tallies, scenes, variant=variant, n_train=learnt_from, settings=used, **common))
    forget_tokens(context)
    return rows


def _passes(data: Data) -> dict[str, dict[str, FlowPairs]]:
    found = data.extra.get("passes") or {"": data.splits}
    for name, splits in found.items():
        for split in ("train", "test"):
            pairs = splits.get(split)
            if not isinstance(pairs, FlowPairs) or not len(pairs):
                which = f" of the {name} pass" if name else ""
                raise UserError(f"the {split} split{which} is missing, or it does not hold pairs of frames with flow")
    return {name: {split: splits[split] for split in ("train", "test")} for name, splits in found.items()}


def _tag(encoder: Encoder, passes: list[_Pass], geometry: Geometry, chosen: FlowOptions, context: Context) -> str:
    """What states of unfinished work are named by, so that none is taken up under other options."""
    pairs = [
        (each.name, split, len(found), found.source.stamp()) for each in passes for split, found in each.splits.items()
    ]
    key = [encoder.identity, str(encoder.dtype), context.features.dtype.name, pairs, asdict(geometry), asdict(chosen)]
    return "flow_" + hashlib.sha256(json.dumps([*key, context.seed]).encode()).hexdigest()[:12]


def _mean_flow(pairs: FlowPairs, geometry: Geometry, context: Context, tag: str) -> Tensor:
    """(2,): the flow of all valid pixels of the training pairs, averaged; the best that knows no picture."""
    saved = context.load_state(f"{tag}_mean")
    if saved is not None:
        return saved["mean"]
    total, count = torch.zeros(2, dtype=torch.float64), 0
    truths = parallel(lambda index: truth(pairs, index, geometry), range(len(pairs)), context.workers)
    for known in context.progress(truths, len(pairs), "mean flow of the training pairs"):
        total += known.flow[known.valid].double().sum(dim=0)
        count += int(known.valid.sum())
    mean = (total / max(count, 1)).float()
    context.save_state(f"{tag}_mean", {"mean": mean})
    return mean


@torch.no_grad()
def _measure(
    matcher: Matcher,
    which: _Pass,
    split: str,
    geometry: Geometry,
    constants: Tensor,
    encoder: Encoder,
    context: Context,
    name: str,
) -> Tensor:
    """Tallies (pairs, 1 + len(constants), len(TALLY)) of the matcher's flow and of flows that are the same everywhere.

    Kept now and then under the name, so that a measurement that was stopped goes on where it was.
    """
    name = "_".join(filter(None, (name, which.name, split)))
    count = len(which.splits[split])
    saved = context.load_state(name)
    found = list(saved["tallies"]) if saved is not None else []
    last_saved = time.monotonic()
    loaded = parallel(
        lambda index: which.load(split, index, geometry), range(len(found), count), min(context.workers, AHEAD)
    )
    for first, second, known in context.progress(loaded, count - len(found), f"{name.partition('_')[2]} pairs"):
        first, second, known = _on(encoder.device, first, second, known)
        predicted = geometry.to_pixels(matcher(first, second))
        found.append(torch.stack([tally(each, known) for each in (predicted, *constants.to(encoder.device))]))
        if time.monotonic() - last_saved > SAVE_SECONDS or len(found) == count:
            context.save_state(name, {"tallies": torch.stack(found)})
            last_saved = time.monotonic()
    return torch.stack(found)


def _on(device: torch.device, first: Tensor, second: Tensor, known: Truth) -> tuple[Tensor, Tensor, Truth]:
    return first.to(device).float(), second.to(device).float(), Truth(*(part.to(device) for part in known))


def _fit(
    passes: list[_Pass], geometry: Geometry, chosen: FlowOptions, encoder: Encoder, context: Context, name: str
) -> Projection:
    """The projection trained on the end-point error of the training pairs of all passes, at the frames' own size."""
    dim = passes[0].tokens["train"].shape[2]
    projection = Projection(dim, chosen.dim, chosen.temperature, context.seed).to(encoder.device)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=chosen.lr, weight_decay=0.0)
    pairs = [(each, index) for each in passes for index in range(len(each.splits["train"]))]
    ahead: Iterator[list[tuple[Tensor, Tensor, Truth]]] | None = None

    def batch(step: int) -> list[tuple[Tensor, Tensor, Truth]]:
        rng = generator(context.seed, step)
        picked = rng.choice(len(pairs), size=min(chosen.batch_size, len(pairs)), replace=False)
        return [which.load("train", index, geometry) for which, index in (pairs[each] for each in picked)]

    def losses(step: int) -> dict[str, Tensor]:
        nonlocal ahead
        if ahead is None:  # a training that goes on does not begin at step 0
            ahead = parallel(batch, range(step, chosen.steps), min(context.workers, AHEAD))
        total, count = torch.zeros((), device=encoder.device), 0
        for example in next(ahead):
            first, second, known = _on(encoder.device, *example)
            difference = geometry.to_pixels(projection(first, second, geometry.grid))[known.valid]
            difference = difference - known.flow[known.valid]
            total = total + (difference.square().sum(dim=-1) + ROUNDING**2).sqrt().sum()
            count += len(difference)
        return {"linear": total / max(count, 1)}

    train_heads(
        {"linear": projection},
        {"linear": optimizer},
        losses,
        chosen.steps,
        lambda step: cosine(step, chosen.steps, chosen.steps // 20),
        context,
        name,
    )
    return projection


def _row(tallies: Tensor, scenes: Sequence[str], **given: Any) -> Row:
    """The row of one measurement: tallies (pairs, 3, len(TALLY)) of the matcher, of zero and of mean flow."""
    mine = tallies[:, 0]
    sums, counts = (mine[:, TALLY.index(key)].numpy() for key in ("sum", "count"))

    def pooled(drawn: np.ndarray) -> float:
        pixels = float(drawn @ counts)
        return float(drawn @ sums) / pixels if pixels else float("nan")

    low, high = bootstrap_statistic(len(tallies), pooled, seed=given["seeds"][0])
    own, zero, mean = (figures(tallies[:, place]) for place in range(3))
    of_scene = np.asarray(scenes)
    by_scene = {name: figures(mine[torch.from_numpy(of_scene == name)])["all"] for name in sorted(set(scenes))}
    return Row(
        "optical flow",
        "EPE",
        own.pop("all"),
        low,
        high,
        unit="px",
        higher_is_better=False,
        n_test=len(tallies),
        details={**own, "zero flow": zero, "mean flow of train": mean, "scenes": by_scene},
        note=INTERVAL_NOTE,
        **given,
    )


@torch.no_grad()
def _draw_examples(matcher: Matcher, which: _Pass, geometry: Geometry, encoder: Encoder, context: Context) -> None:
    """First frame, flow of the projection and true flow of some test pairs, evenly spaced."""
    assert context.examples is not None
    pairs = which.splits["test"]
    picked = np.unique(np.linspace(0, len(pairs) - 1, min(context.num_examples, len(pairs))).round().astype(int))
    for number, index in enumerate(picked.tolist()):
        first, second, known = _on(encoder.device, *which.load("test", index, geometry))
        predicted = geometry.to_pixels(matcher(first, second))
        error = figures(tally(predicted, known)[None])["all"]
        draw(
            read_rgb(pairs.source, int(pairs.first[index])),
            predicted.cpu().numpy(),
            known.flow.cpu().numpy(),
            known.valid.cpu().numpy(),
            f"linear; error {error:.1f} px",
            context.examples / f"flow_{number:02d}.png",
        )
