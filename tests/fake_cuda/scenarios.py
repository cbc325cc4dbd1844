"""What the tests have done on the fake device; each function is called in processes of its own by `fixture.run`.

Configs come as a name (None: the schema's defaults) and overrides by dotted key.
"""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from dinoreg.commands.main import main
from dinoreg.config.load import Config, load_config
from dinoreg.data import loader as loading
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.masks import block_masks, mask_tensors
from dinoreg.data.open import open_source
from dinoreg.models.attention import resolve_backend
from dinoreg.plan.devices import find_device
from dinoreg.plan.job import describe
from dinoreg.plan.memory import memory_of
from dinoreg.plan.step import masked_batch, random_batch, take_step
from dinoreg.plan.traffic import collectives
from dinoreg.runtime.device import DTYPES
from dinoreg.train import loop
from dinoreg.train.loop import pretrain
from dinoreg.train.parallelize import compile_blocks
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.tutor import as_cut
from tests.fake_cuda.device import SOUND, Answers, Counts, counted
from tests.fake_cuda.traffic import Traffic

DEVICE = torch.device("cuda", 0)


def _dtype(config: Config) -> torch.dtype:
    return DTYPES["bf16" if config.precision == "auto" else config.precision]


def _state(config: Config) -> TrainState:
    with DEVICE:
        networks = build_networks(config)
        anchor = build_networks(config)[1].backbone if config.loss.anchor_weight > 0 else None
    return TrainState(config, *networks, DEVICE, _dtype(config), anchor)


def step(config: str | None, overrides: dict[str, Any], warm: int = 2, traffic: bool = False) -> dict[str, Any]:
    """One training step after `warm` others of the same batch, without augmentation: {"counts", "attention"}.

    traffic  also "traffic": bytes that operations read and write, by kind, see `Traffic`; with model.compile those of
             the kernels that inductor plans, see `planned_kernels`
    """
    settings = load_config(config, overrides)
    dtype, state = _dtype(settings), _state(settings)
    batch = random_batch(settings, state.student.backbone.patch_size, DEVICE)
    found = Traffic()
    with contextlib.ExitStack() as stack:
        if settings.model.compile:
            from tests.fake_cuda.compiled import planned_kernels  # seconds, which other steps do not need

            stack.enter_context(planned_kernels(found.bytes))
            compile_blocks(state.student, state.teacher)
        for _ in range(warm):
            take_step(state, batch)
        found.bytes.clear()
        with counted() as counts, found if traffic else contextlib.nullcontext():
            take_step(state, batch)
    attention = resolve_backend(settings.model.attention, DEVICE, 201, dtype)
    return {"counts": counts, "attention": attention, "traffic": dict(found.bytes)}


def several(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`step` of each of several configs, given as its arguments, in one process."""
    return [step(**case) for case in cases]


def load_batches(overrides: dict[str, Any], batches: int) -> dict[str, Any]:
    """Batches of the second of two devices, after as many others: {"counts", "buffers"}.

    buffers  how many pieces of memory the workers wrote global crops to
    """
    torch.cuda.set_device(1)
    config = load_config(None, overrides)
    views = Views(config.crops, config.augment, config.mask, 8)
    used: set[int] = set()
    plan = loading._Engine._plan

    def noting(engine: Any, job: Any) -> None:
        plan(engine, job)
        used.add(job.groups[0].data_ptr())

    source = open_source(config.data.source)
    with mock.patch.object(loading._Engine, "_plan", noting):
        device = torch.device("cuda", 1)
        with BatchLoader(source, views, config.data, batch_size=config.batch_size, device=device) as loader:
            for _ in range(batches):
                next(loader)
            with counted() as counts:
                for _ in range(batches):
                    next(loader)
    return {"counts": counts, "buffers": len(used)}


def smoke(config: str, overrides: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Batches of the second device, then a step on the first, in one process."""
    batches = load_batches(loaded, 6)  # first: threads may use the context of a device that was used before
    torch.cuda.set_device(DEVICE)
    return {"batches": batches, "step": step(config, overrides)}


def varying_masks(config: str, overrides: dict[str, Any], steps: int, ranks: int) -> dict[str, Any]:
    """Steps of rank 0 of several, whose masks differ: {"counts", "masked"}; and of the plan "allocated" and "needed".

    ranks   over which the shares of hidden patches are spread
    masked  (fewest, most) masked patches of a step
    """
    settings = load_config(config, overrides)
    state = _state(settings)
    masked = []
    with counted() as counts:
        for number in range(steps):
            batch = _batch_of(number, settings, state, ranks)
            masked.append(len(batch.mask_indices))
            take_step(state, batch)
    plan = memory_of(describe(settings, 1, 1, find_device("h200")))
    planned = {"allocated": plan.allocated, "fragments": plan.fragments, "needed": plan.needed}
    return {"counts": counts, "masked": (min(masked), max(masked)), "plan": planned}


def _batch_of(number: int, settings: Config, state: TrainState, ranks: int) -> Batch:
    """The batch of a step on rank 0 of several, with that step's masks."""
    patch_size, images = state.student.backbone.patch_size, settings.batch_size
    crops, _ = as_cut(None, settings.crops, patch_size)
    grid, total = (crops.global_size // patch_size,) * 2, 2 * images * ranks
    firsts = (0, images * ranks)  # of the two views
    hidden = np.concatenate([block_masks(0, number, total, grid, settings.mask, at, images) for at in firsts])
    tensors = (tensor.to(DEVICE) for tensor in (torch.from_numpy(hidden), *mask_tensors(hidden)))
    return masked_batch(settings, crops, *tensors, hidden.sum(axis=1))


def compiled(overrides: dict[str, Any], steps: int) -> dict[str, Any]:
    """Steps under a compiler that stops after tracing: {"counts" of the last step, "graphs", "breaks"}.

    graphs  after each step, how many there are
    """
    settings = load_config(None, overrides)
    state, counters, graphs = _state(settings), torch._dynamo.utils.counters, []
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        compile_blocks(state.student, state.teacher)
    for number in range(steps):
        batch = _batch_of(number, settings, state, 4)
        with counted() as counts:
            take_step(state, batch)
        graphs.append(counters["stats"]["unique_graphs"])
    return {"counts": counts, "graphs": graphs, "breaks": list(counters["graph_break"])}


def run(
    overrides: dict[str, Any], out: str, answers: dict[str, Any] | None = None, at_step: int | None = None
) -> dict[str, Any]:
    """A whole run, in this process or as one of several: {"counts", "error"}.

    answers  of reads, in place of those that make a sound run
    at_step  count that step alone, without log line and checkpoint
    """
    config = load_config(None, {**overrides, "out": out, "resume": True, "device": "cuda"})
    answered = Answers(**{**SOUND, **(answers or {})})
    of_step = Counts()
    take = loop.train_step

    def counting(state: TrainState, *arguments: Any, **named: Any) -> Any:
        if state.step != at_step:
            return take(state, *arguments, **named)
        nonlocal of_step
        with counted(answered) as of_step:
            return take(state, *arguments, **named)

    error = None
    with mock.patch.object(loop, "train_step", counting), counted(answered) as counts:
        try:
            pretrain(config)
        except Exception:
            error = traceback.format_exc()
    return {"counts": counts, "step": of_step, "error": error}


def planned_collectives(overrides: dict[str, Any], world_size: int) -> dict[str, int]:
    """Bytes of the full tensors of a step's collectives, by kind, as the plan has them."""
    sizes: dict[str, int] = {}
    for each in collectives(describe(load_config(None, overrides), 1, world_size, find_device("h200"))):
        kind = next(kind for kind in ("all-reduce", "all-gather", "reduce-scatter") if kind in each.name)
        sizes[kind] = sizes.get(kind, 0) + each.size
    return sizes


def commands(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Commands of dinoreg, one after the other: each one's exit code, the end of what it said, and counts."""
    found = []
    os.environ["DINOREG_DEBUG"] = "1"
    for line in lines:
        with counted(Answers(**SOUND)) as counts, contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(line)
        found.append({"code": code, "said": said.getvalue()[-2000:], "counts": counts})
    return found
