"""torch.compile of a run: whole graphs, few of them, and the losses of the uncompiled run."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import on_processes
from training import read_lines, tiny_config

from dinoreg.models.layers import Block
from dinoreg.train import loop
from dinoreg.train.step import train_step


def compiled_run(out: Path | str, backend: str, graphs: int = 4, **options: Any) -> None:
    """A run with a compiler that stops after tracing; it makes at most `graphs` graphs, and none after step 2."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    made = []

    def counted(*arguments: Any, **named: Any) -> Any:
        result = train_step(*arguments, **named)
        made.append(counters["stats"]["unique_graphs"])
        return result

    with (
        mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)),
        mock.patch.object(loop, "train_step", counted),
    ):
        loop.pretrain(tiny_config(out, model__compile=True, **options))
    assert not counters["graph_break"]
    assert 0 < made[1] == made[-1] <= graphs, made


def losses(out: Path) -> list[float]:
    return [line["total_loss"] for line in read_lines(out / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim__accumulate": 2},
        {"model__checkpointing": True},
        {"precision": "bf16"},
        {"loss__centering": "softmax", "head__separate": True},
        {"model__layerscale": 1e-5, "crops__num_local": 0},
        {"model__depth": 3, "model__drop_path_uniform": False},
        {"probe__every": 2},
        {"model__name": "vitt8_reg4_rope", "model__rope_jitter": 1.5},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_every_kind_of_step_compiles_without_a_break(options: dict[str, Any], tmp_path: Path) -> None:
    loop.pretrain(tiny_config(tmp_path / "plain", **options))
    # Two more: passes of the student without gradients; a block without stochastic depth, then any number of images.
    graphs = 6 if {"optim__accumulate", "model__drop_path_uniform"} & set(options) else 4
    compiled_run(tmp_path / "compiled", "aot_eager", graphs, **options)
    rounding = 1e-2 if "precision" in options else 1e-4
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_blocks_compile_without_a_break_on_several_processes(strategy: str, tmp_path: Path) -> None:
    options = {"parallel__strategy": strategy, "batch_size": 3}
    on_processes(2, _plain_run, str(tmp_path / "plain"), options)
    on_processes(2, _compiled_run, str(tmp_path / "compiled"), options)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def _plain_run(out: str, options: dict[str, Any]) -> None:
    loop.pretrain(tiny_config(out, **options))


def _compiled_run(out: str, options: dict[str, Any]) -> None:
    compiled_run(out, "aot_eager", **options)


def test_a_copy_of_a_compiled_block_computes_with_its_own_weights() -> None:
    block = Block(8, 2)
    block.forward = partial(block.forward)  # type: ignore[method-assign] - bound to the block, as what compiling makes
    other, x, rest = copy.deepcopy(block), torch.randn(5, 8), (((1, 5),), ("plain",))
    before = block(x, *rest)
    with torch.no_grad():
        other.ls1.gamma.fill_(1.0)
    assert torch.equal(block(x, *rest), before)
    assert not torch.allclose(other(x, *rest), before)
