"""Crops in stages, and runs whose end is not fixed: what was computed does not depend on where a run was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import loss_trace, read_lines, stopped_after, tiny_config

from dinoreg.checkpoint.format import step_name
from dinoreg.config.load import load_config
from dinoreg.data.loader import BatchLoader, Views
from dinoreg.data.source import ScenesSource
from dinoreg.plan.run import plan
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from dinoreg.train.prepare import Setup

SMALL = {"model__depth": 1, "batch_size": 3, "crops__stages": ["0.3:16/8", "0.6:24/16"]}
# Stages end before the steps 1 and 2 of 4; the cool-down begins with step 6 of 8.
OPEN = {**SMALL, "schedule__shape": "constant", "steps": 4}
COOLED: dict[str, Any] = {**OPEN, "steps": 8, "schedule__cooldown": 2}


def same_end(out: Path, other: Path) -> bool:
    """Whether two runs of eight steps have the same losses and the same teacher, bit for bit."""
    one, two = (load_file(run / "teacher" / f"{step_name(8)}.safetensors") for run in (out, other))
    return loss_trace(out) == loss_trace(other) and all(torch.equal(two[name], one[name]) for name in one)


def test_a_constant_run_is_extended_and_cooled_down_as_if_it_had_been_that_long(tmp_path: Path) -> None:
    whole = pretrain(tiny_config(tmp_path / "whole", **COOLED, schedule__horizon=4))
    out = pretrain(tiny_config(tmp_path / "run", **OPEN))
    assert loss_trace(out) == loss_trace(whole)[:4]
    description = json.loads((out / "teacher" / f"{step_name(4)}.json").read_text())
    assert description["preprocessing"]["image_size"] == 32
    with pytest.raises(UserError, match=r"schedule\.cooldown=5: expected at most 4, .* after step 4"):
        Setup(tiny_config(out, **{**COOLED, "schedule__cooldown": 5}, resume=True))
    pretrain(tiny_config(out, **COOLED, resume=True))
    assert same_end(out, whole)
    rates = [line["lr"] for line in read_lines(out / "metrics.jsonl")]
    assert rates[1:7] == [1e-3] * 6
    assert rates[7] < 1e-3


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_with_the_crops_of_its_stage_bit_for_bit(tmp_path: Path) -> None:
    whole, out = pretrain(tiny_config(tmp_path / "whole", **COOLED, schedule__horizon=4)), tmp_path / "parts"
    for stop in (1, 3, 7):  # between two stages, in the last one, in the cool-down
        with stopped_after(stop, out):
            pretrain(tiny_config(out, **COOLED, schedule__horizon=4, resume=stop > 1))
    pretrain(tiny_config(out, **COOLED, schedule__horizon=4, resume=True))
    assert same_end(out, whole)


def test_each_stage_has_batches_of_its_sizes_and_the_images_of_any_other() -> None:
    config = tiny_config(**SMALL, steps=10)
    stages = config.stages(10)
    assert {first: (crops.global_size, crops.local_size) for first, crops in stages.items()} == {
        0: (16, 8),
        3: (24, 16),
        6: (32, 16),
    }
    batches = []
    for crops in stages.values():
        views = Views(crops, config.augment, config.mask, 8)
        with BatchLoader(ScenesSource(9, 40), views, config.data, batch_size=3, position=6) as loader:
            batches.append(next(loader))
    for batch, crops in zip(batches, stages.values()):
        assert batch.global_crops.shape[-2:] == (crops.global_size, crops.global_size)
        assert batch.mask.shape[1] == (crops.global_size // 8) ** 2
        assert np.array_equal(batch.sample_ids, batches[-1].sample_ids)
        # The same box and colours, seen with fewer pixels.
        means = [each.global_crops.mean(dim=(2, 3)) for each in (batch, batches[-1])]
        torch.testing.assert_close(*means, atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("[0.75:20/16]", "a multiple of the patch size 8"),
        ("[0.75:16/12]", "a multiple of the patch size 8"),
        ("[75:16/8]", "UNTIL:GLOBAL/LOCAL"),
        ("[0.75:16]", "UNTIL:GLOBAL/LOCAL"),
        ("[0.6:16/8,0.3:24/8]", "rising"),
        ("[0.0:16/8]", "rising"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_a_line(stages: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"^crops\.stages=.*expected .*{expected}[^\n]*$"):
        load_config("quickstart", [f"crops.stages={stages}"])


def test_a_plan_counts_every_stage_and_the_memory_of_the_largest() -> None:
    whole = plan(tiny_config(steps=10, crops__stages=["0.7:16/8"], device="cpu"), probe=False)
    first, last = (
        plan(tiny_config(steps=10, crops__global_size=size, crops__local_size=local), probe=False)
        for size, local in ((16, 8), (32, 16))
    )
    assert whole.operations.total == pytest.approx(0.7 * first.operations.total + 0.3 * last.operations.total)
    assert whole.memory.allocated == last.memory.allocated
    assert [(stage.steps, stage.job.config.crops.global_size) for stage in whole.stages] == [(7, 16), (3, 32)]
    assert whole.run.seconds == pytest.approx(sum(stage.seconds for stage in whole.stages))  # type: ignore[misc]
